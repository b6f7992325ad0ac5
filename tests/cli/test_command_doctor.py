"""``doctor``: what runs here, and what would mend the rest."""

from __future__ import annotations

import re
from importlib import metadata

import numpy as np
import onnx
import pytest

from dendsam_deploy.errors import BundleError
from dendsam_deploy.evaluate import doctor
from dendsam_deploy.runtimes import probe
from dendsam_deploy.runtimes.choice import PLACES
from dendsam_deploy.runtimes.runner import CallableRunner


def test_the_probe_is_a_valid_graph_of_one_node() -> None:
    model = onnx.load_from_string(probe.PROBE_GRAPH)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


def test_the_processor_runs_graphs_and_versions_are_listed(run) -> None:
    document = run("doctor", "--json", "-").document
    findings = {(finding["kind"], finding["name"]): finding for finding in document["findings"]}
    assert findings["engine", "onnxruntime on cpu"]["available"]
    assert document["packages"]["numpy"] == np.__version__
    assert document["packages"]["tifffile"] == metadata.version("tifffile")
    assert document["cpu_cores"] >= 1
    assert re.search(r"^engine onnxruntime on cpu +yes  runs a graph$", run("doctor").out, re.MULTILINE)


def test_without_a_driver_cuda_is_said_to_need_one(monkeypatch) -> None:
    monkeypatch.setattr(probe, "has_nvidia_driver", lambda: False)
    finding = next(f for f in doctor.examine_machine().findings if f.name == "onnxruntime on cuda")
    assert not finding.available
    assert finding.detail == "no NVIDIA driver found"
    assert "NVIDIA GPU" in finding.remedy


def test_an_engine_that_fails_is_reported_with_reason_and_remedy(monkeypatch) -> None:
    class Broken(CallableRunner):
        def __enter__(self):
            raise BundleError("the library is broken")

    monkeypatch.setattr(doctor, "ENGINES", {"onnxruntime": lambda path, spec, options: Broken(spec, dict)})
    monkeypatch.setattr(probe, "has_nvidia_driver", lambda: True)
    cuda, cpu, *_ = doctor.examine_machine().findings
    assert (cpu.available, cpu.detail, cpu.remedy) == (
        False,
        "the library is broken",
        "pip install -U dendsam-deploy",
    )
    assert cuda.remedy == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_every_engine_is_tried_where_it_can_run_and_has_a_remedy() -> None:
    names = {finding.name for finding in doctor.examine_machine().findings if finding.kind == "engine"}
    assert names == {f"{engine} on {device}" for device, engine in PLACES if engine in doctor.ENGINES}
    assert "openvino on cpu" in names
    assert "openvino on cuda" not in names
    assert set(PLACES) == doctor._REMEDIES.keys()


@pytest.mark.parametrize(("missing", "available"), [((), True), (("timm", "torch"), False)])
def test_an_extra_needs_all_its_packages(monkeypatch, missing, available) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in missing else version(name) or "1")
    finding = next(f for f in doctor.examine_machine().findings if f.kind == "extra")
    assert finding.available is available
    if missing:
        assert finding.detail.endswith("lacks timm, torch")
        assert finding.remedy == "pip install 'dendsam-deploy[train]'"


def test_requirements_of_an_extra_are_read_from_the_package(monkeypatch) -> None:
    lines = [
        "numpy>=1.26",
        "zarr[remote]>=3.1.3",
        'onnxruntime>=1.20; sys_platform == "darwin"',
        'numpy-not-installed>=1; sys_platform == "plan9"',
        'torch>=2.10; extra == "train"',
        "other; extra == 'all'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda package: lines)
    monkeypatch.setattr(doctor, "_version", lambda name: None if "not-installed" in name else "1")
    assert doctor._required_packages("") == ["numpy", "zarr", "onnxruntime"]
    assert doctor._required_packages("train") == ["torch"]
