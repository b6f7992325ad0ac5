"""`verify`: a whole bundle, on everything that this machine has, with a record of what was found."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from sabotage import judged

from dendsam_deploy.bundle.bundle import Bundle, digest_file
from dendsam_deploy.bundle.reference import load_reference, save_reference
from dendsam_deploy.errors import BundleError, CheckpointError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.evaluate.limits import METRICS
from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
from dendsam_deploy.runtimes import session as sessions
from dendsam_deploy.runtimes.session import ENGINES, SessionOptions, open_session

torch = pytest.importorskip("torch")

SIZE = 128
ON_ONE_THREAD = SessionOptions("onnxruntime", "cpu", threads=1)


@pytest.fixture
def bundle(exported, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(exported.bundle, tmp_path / "toy"))


def edit_manifest(bundle: Path, change) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    change(document)
    (bundle / "manifest.json").write_text(json.dumps(document))


def add_encoder(bundle: Path, precision: str, change) -> None:
    """Add the encoder once more under another precision, after a change of its ONNX file."""
    model = onnx.load(bundle / "encoder.onnx")
    change(model)
    name = f"encoder.{precision}.onnx"
    onnx.save(model, bundle / name)

    def enter(document: dict) -> None:
        (graph,) = (graph for graph in document["graphs"] if graph["role"] == "encoder")
        files = [dataclasses.asdict(digest_file(bundle, name))]
        document["graphs"].append({**graph, "precision": precision, "files": files})

    edit_manifest(bundle, enter)


def round_weights(model: onnx.ModelProto) -> None:
    """Round the larger weights to fp16, and compute in fp32 as before."""
    for tensor in model.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.dtype == np.float32 and weights.size > 1000:
            tensor.CopyFrom(numpy_helper.from_array(weights.astype(np.float16).astype(np.float32), tensor.name))


def halve_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.dtype == np.float32 and weights.size > 1000:
            tensor.CopyFrom(numpy_helper.from_array(weights / 2, tensor.name))


def use_an_unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "NobodyHasThis"


def test_a_faithful_bundle_is_proven(bundle: Path):
    assert Bundle.open(bundle).parity is None
    report = verify_bundle(bundle, VerifyOptions(session=ON_ONE_THREAD))
    assert report.passed, report.failures
    assert {row.level for row in report.rows} == {1, 2, 3, 4, 5}
    assert {row.reference for row in report.rows if not row.metric.startswith("detected")} == {"stored"}
    assert {(row.engine, row.device, row.precision) for row in report.rows} == {("onnxruntime", "cpu", "fp32")}
    metrics = {row.metric for row in report.rows}
    assert {f"logits_max_over_std:boxes={count}" for count in (1, 3, 17, 64)} <= metrics
    reopened = Bundle.open(bundle)
    assert reopened.parity is not None
    assert reopened.parity.proves("onnxruntime", "cpu", "fp32")
    assert open_session(reopened, ON_ONE_THREAD).is_proven
    document = json.loads((bundle / "parity.json").read_text())
    assert document["passed"] is True
    assert {"level", "graph", "engine", "device", "precision", "metric", "value", "limit", "passed"} <= set(
        document["rows"][0]
    )


def test_the_original_modules_are_run_where_checkpoints_are_given(exported, bundle: Path):
    options = VerifyOptions(exported.sam, exported.detector, session=ON_ONE_THREAD, box_counts=(3,))
    report = verify_bundle(bundle, options)
    assert report.passed, report.failures
    assert {row.reference for row in report.rows} == {"torch"}


WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "onnx", "onnxscript", "segment_anything", "ultralytics"):
    sys.modules[name] = None  # importing it now raises ImportError
from pathlib import Path
from dendsam_deploy.errors import MissingCapabilityError
from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
from dendsam_deploy.runtimes.session import SessionOptions
bundle, sam = map(Path, sys.argv[1:])
report = verify_bundle(bundle, VerifyOptions(session=SessionOptions("onnxruntime"), box_counts=(3,)))
assert report.passed and {row.level for row in report.rows} == {1, 2, 3, 4, 5}
try:
    verify_bundle(bundle, VerifyOptions(sam))
except MissingCapabilityError as error:
    print(error)
"""


def test_stored_outputs_are_enough_where_torch_is_not_installed(exported, bundle: Path):
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(bundle), str(exported.sam)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "install dendsam-deploy[train]" in result.stdout


def test_another_checkpoint_is_refused(exported, bundle: Path, tmp_path: Path):
    content = torch.load(exported.sam, weights_only=True)
    torch.save(content["model_state"], tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt"):
        verify_bundle(bundle, VerifyOptions(sam=tmp_path / "other.pt", session=ON_ONE_THREAD))
    with pytest.raises(InvalidArgumentError, match="no original to compare with"):
        verify_bundle(bundle, VerifyOptions(detector=tmp_path / "model.onnx", session=ON_ONE_THREAD))
    assert not (bundle / "parity.json").exists()


def test_a_bundle_without_a_reference_cannot_be_judged(bundle: Path):
    edit_manifest(bundle, lambda document: document.update(extra_files=[]))
    with pytest.raises(BundleError, match=r"no reference\.npz"):
        verify_bundle(bundle)


def test_more_boxes_than_stored_cannot_be_judged(session, truth):
    with pytest.raises(InvalidArgumentError, match="12 boxes"):
        judged(session, truth, box_counts=(13,))


def test_every_engine_and_precision_is_judged_and_recorded(bundle: Path):
    add_encoder(bundle, "fp16", round_weights)
    steps = []
    report = verify_bundle(bundle, VerifyOptions(session=SessionOptions(device="cpu", threads=1)), steps.append)
    assert {str(combination) for combination in report.combinations} == {
        f"{engine} on cpu at {precision}" for engine in ("onnxruntime", "openvino") for precision in ("fp32", "fp16")
    }
    assert report.passed, report.failures
    assert Bundle.open(bundle).parity == report
    told = [(step.done, step.total) for step in steps]
    assert told == sorted(told)
    assert told[-1] == (21, 21)
    assert "openvino on cpu at fp16: encoder" in {step.note for step in steps}
    # The decoder is that of fp32, and held to the limits of fp32.
    limits = {row.precision: row.limit for row in report.rows if row.metric == "logits_max_over_std:boxes=3"}
    assert limits == {"fp32": METRICS["logits_max_over_std"].fp32, "fp16": METRICS["logits_max_over_std"].fp32}
    limits = {row.precision: row.limit for row in report.rows if row.metric == "embedding_relative_rms:batch=1"}
    assert limits["fp16"] == METRICS["embedding_relative_rms"].half


def test_wishes_narrow_what_is_judged(bundle: Path):
    add_encoder(bundle, "fp16", round_weights)
    options = VerifyOptions(session=SessionOptions("openvino", precision="fp16", threads=1), box_counts=(3,))
    report = verify_bundle(bundle, options)
    assert [str(combination) for combination in report.combinations] == ["openvino on cpu at fp16"]
    session = open_session(Bundle.open(bundle), SessionOptions(device="cpu"))
    assert (session.engine, session.precision) == ("openvino", "fp16"), "the only combination that is proven"


def test_a_precision_that_fails_leaves_the_others_proven(bundle: Path):
    add_encoder(bundle, "fp16", halve_weights)
    report = verify_bundle(bundle, VerifyOptions(session=ON_ONE_THREAD, box_counts=(3,)))
    assert not report.passed
    assert report.failures_of(precision="fp16")
    assert not report.failures_of(precision="fp32")
    assert [combination.precision for combination in report.proven] == ["fp32"]


def test_what_an_engine_cannot_load_is_not_judged(bundle: Path):
    add_encoder(bundle, "fp16", use_an_unknown_operator)
    report = verify_bundle(bundle, VerifyOptions(session=ON_ONE_THREAD, box_counts=(3,)))
    assert [combination.precision for combination in report.combinations] == ["fp32"]
    assert report.passed
    (refused,) = report.not_judged
    assert (refused.engine, refused.precision) == ("onnxruntime", "fp16")
    assert "NobodyHasThis" in refused.reason
    with pytest.raises(MissingCapabilityError, match="NobodyHasThis"):
        verify_bundle(bundle, VerifyOptions(session=dataclasses.replace(ON_ONE_THREAD, precision="fp16")))


def test_an_engine_that_is_not_installed_is_not_judged(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(path, spec, options):
        raise MissingCapabilityError("engine openvino: not installed; run: pip install 'dendsam-deploy[openvino]'")

    monkeypatch.setattr(sessions, "ENGINES", MappingProxyType({**ENGINES, "openvino": missing}))
    report = verify_bundle(bundle, VerifyOptions(session=SessionOptions(device="cpu", threads=1), box_counts=(3,)))
    assert {combination.engine for combination in report.combinations} == {"onnxruntime"}
    with pytest.raises(MissingCapabilityError, match="pip install"):
        verify_bundle(bundle, VerifyOptions(session=SessionOptions("openvino")))


def test_a_detector_without_original_is_held_to_its_own_fp32_graph(bundle: Path):
    """One that came as a graph: nothing is stored about it."""
    path = bundle / "reference.npz"
    save_reference(path, dataclasses.replace(load_reference(path, SIZE), detector=None))

    def enter(document: dict) -> None:
        document["extra_files"] = [dataclasses.asdict(digest_file(bundle, "reference.npz"))]

    edit_manifest(bundle, enter)
    options = VerifyOptions(session=SessionOptions(device="cpu", threads=1), box_counts=(3,))
    report = verify_bundle(bundle, options)
    assert report.passed, report.failures
    compared = {row.engine: row.reference for row in report.rows if row.metric.startswith("box_iou_min")}
    assert compared == {"openvino": "fp32"}, "what answers for the weights is not compared with itself"
    assert {row.engine for row in report.rows if row.metric.startswith("detected_pq50")} == {"openvino", "onnxruntime"}


def test_a_bundle_that_differs_is_not_proven(bundle: Path):
    path = bundle / "reference.npz"
    stored = load_reference(path, SIZE)
    save_reference(path, dataclasses.replace(stored, sam=dataclasses.replace(stored.sam, logits=stored.sam.logits * 2)))
    digest = dataclasses.asdict(digest_file(bundle, "reference.npz"))
    edit_manifest(bundle, lambda document: document.update(extra_files=[digest]))
    report = verify_bundle(bundle, VerifyOptions(session=ON_ONE_THREAD, box_counts=(3,)))
    assert not report.passed
    parity = Bundle.open(bundle).parity
    assert parity == report
    assert not parity.proves("onnxruntime", "cpu", "fp32")


def test_an_edited_file_is_refused_before_it_is_loaded(bundle: Path):
    path = bundle / "decoder.onnx"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.onnx: altered"):
        verify_bundle(bundle)


AT_LEAST = ("iou_mean", "_p1", "iou_min", "cosine", "_pq50", "_pq90", "_compared", "truth_pq", "truth_box_iou")


def test_every_metric_is_in_the_table_and_explained():
    for name, metric in METRICS.items():
        assert metric.meaning, name
        assert (metric.sense == "at least") == name.endswith(AT_LEAST)


def test_limits_are_kept_or_broken():
    at_most, at_least = METRICS["embedding_relative_max"], METRICS["mask_iou_mean"]
    assert at_most.judge(1e-4, "fp32") == (1e-4, True)
    assert at_most.judge(1.1e-4, "fp32") == (1e-4, False)
    assert at_least.judge(0.9999, "fp32") == (0.9999, True)
    assert at_least.judge(0.9998, "fp32") == (0.9999, False)
    assert at_least.judge(0.996, "fp16") == at_least.judge(0.996, "fp16") == (0.995, True)
    assert at_least.judge(0.97, "int8") == (0.98, False)
    # What is not judged passes, unless it is no number at all.
    assert at_most.judge(7.0, "fp16") == (None, True)
    assert at_most.judge(math.nan, "fp16") == (None, False)
    assert at_least.judge(math.inf, "fp32") == (0.9999, False)
