"""``export`` and ``verify``: weights become a bundle, and the bundle is compared with them."""

from __future__ import annotations

import dataclasses
import shutil

import onnx
import pytest

from dendsam_deploy.bundle.bundle import MANIFEST_FILE, digest_file
from dendsam_deploy.bundle.manifest import Manifest


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle of one's own to spoil."""
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy" / "parity.json").unlink(missing_ok=True)
    return tmp_path / "copy"


def test_export_verifies_before_it_publishes(run, random_sam, tmp_path) -> None:
    words = ["export", "--sam", random_sam, "-o", tmp_path / "exports" / "a"]
    document = run(*words, "--name", "ca1", "--json", "-").document
    assert document["proven"]
    assert document["name"] == "ca1"
    assert (tmp_path / "exports" / "a" / "parity.json").is_file()
    again = run(*words)
    assert again.code == 2
    assert "a bundle of that name exists; choose another name or pass --overwrite" in again.message


def test_export_without_verification_is_unproven(run, copy) -> None:
    facts = run("info", copy, "--json", "-").document
    assert facts["parity"] == "unproven"
    assert facts["model_pixel_size_nm"] == 12


def test_verify_lists_every_comparison(run, copy) -> None:
    outcome = run("verify", copy)
    assert outcome.code == 0
    levels = [line.split()[0] for line in outcome.out.splitlines()[1:-1]]
    assert set(levels) == {"1", "2", "4"}, "without a detector there are no boxes to compare"
    assert outcome.out.splitlines()[-1].endswith("limits kept by onnxruntime on cpu at fp32")
    document = run("verify", copy, "--json", "-").document
    assert document["passed"]
    row_keys = {"level", "graph", "engine", "device", "precision", "metric", "value", "limit", "passed"}
    assert all(row_keys <= row.keys() for row in document["rows"])


def test_verify_runs_the_weights_themselves_where_they_are_given(run, copy, random_sam) -> None:
    document = run("verify", copy, "--sam", random_sam, "--json", "-").document
    assert document["passed"]
    assert {row["reference"] for row in document["rows"] if row["graph"] == "encoder"} == {"torch"}


def test_verify_fails_on_other_weights(run, copy) -> None:
    graph = copy / "encoder.onnx"
    model = onnx.load(graph)
    biggest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    biggest.raw_data = bytes(len(biggest.raw_data))
    onnx.save(model, graph)
    _accept(copy)
    outcome = run("verify", copy)
    assert outcome.code == 1
    assert "FAILED" in outcome.out
    assert "break their limit" in outcome.message
    assert run("info", copy, "--json", "-").document["parity"] == "failed"


def test_an_altered_graph_is_not_opened_at_all(run, copy) -> None:
    graph = copy / "decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    outcome = run("verify", copy)
    assert outcome.code == 4
    assert str(graph) in outcome.message


def _accept(folder) -> None:
    """Write the digests of the files as they are now into the manifest, as an attacker or a bad disk could not."""
    path = folder / MANIFEST_FILE
    manifest = Manifest.from_json(path.read_text(), str(path))
    graphs = tuple(
        dataclasses.replace(graph, files=tuple(digest_file(folder, file.file) for file in graph.files))
        for graph in manifest.graphs
    )
    path.write_text(dataclasses.replace(manifest, graphs=graphs).to_json())
