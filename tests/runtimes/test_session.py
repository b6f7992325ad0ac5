"""Choosing what a bundle runs on: wishes are fulfilled or refused, never replaced."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.manifest import (
    SCHEMA_VERSION,
    Decoding,
    FileDigest,
    GraphSpec,
    Manifest,
    Precision,
    Preprocessing,
    Role,
    TensorSpec,
    Thresholds,
)
from dendsam_deploy.bundle.parity import (
    Combination,
    CompiledGraph,
    ParityReport,
    ParityRow,
    parity_from_json,
    parity_to_json,
)
from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes.runner import CallableRunner
from dendsam_deploy.runtimes.session import Session, SessionOptions, open_session

ROLES: tuple[Role, ...] = ("detector", "encoder", "decoder")


def graph_spec(role: Role, precision: Precision) -> GraphSpec:
    return GraphSpec(
        role=role,
        precision=precision,
        opset=17,
        files=(FileDigest(f"{role}.{precision}.onnx", "", 0),),
        inputs=(TensorSpec("x", "float32", (1,)),),
        outputs=(TensorSpec("y", "float32", (1,)),),
    )


def make_bundle(
    folder: Path, graphs: Mapping[Role, tuple[Precision, ...]], parity: ParityReport | None = None
) -> Bundle:
    """A folder of graphs that return their input, and the record that opening it would give."""
    specs = tuple(graph_spec(role, precision) for role, precisions in graphs.items() for precision in precisions)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    for spec in specs:
        onnx.save(model, folder / spec.files[0].file)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name="toy",
        created_utc="2026-01-01T00:00:00Z",
        licence="CC0-1.0",
        model_type="tiny",
        sources=(),
        graphs=specs,
        preprocessing=Preprocessing("minmax_uint8", 64, 16, None, None),
        decoding=Decoding((2, 4), 0.1, 8.0),
        thresholds=Thresholds(0.3, 0.7, 0.0, 20),
        producers={},
        extra_files=(),
    )
    return Bundle(folder, manifest, parity)


def test_every_graph_is_opened_and_closed(tmp_path: Path):
    bundle = make_bundle(tmp_path, dict.fromkeys(ROLES, ("fp32",)))
    with open_session(bundle, SessionOptions("onnxruntime", "cpu", threads=1)) as session:
        assert (session.engine, session.device, session.precision) == ("onnxruntime", "cpu", "fp32")
        assert session.detector is not None
        for runner in (session.detector, session.encoder, session.decoder):
            assert runner.run({"x": np.ones(1, np.float32)})["y"] == 1
    with pytest.raises(InvalidArgumentError, match="not open"):
        session.encoder.run({"x": np.ones(1, np.float32)})


def test_a_bundle_without_detector_has_no_detector_runner(tmp_path: Path):
    bundle = make_bundle(tmp_path, {"encoder": ("fp32",), "decoder": ("fp32",)})
    assert open_session(bundle, SessionOptions()).detector is None


def test_a_precision_is_that_of_the_encoder(tmp_path: Path):
    graphs = {"detector": ("fp32",), "encoder": ("fp32", "int8"), "decoder": ("fp32", "int8", "fp16")}
    bundle = make_bundle(tmp_path, graphs)
    with pytest.raises(MissingCapabilityError, match="at fp16; it has fp32, int8"):
        open_session(bundle, SessionOptions(precision="fp16"))
    session = open_session(bundle, SessionOptions(precision="int8"))
    assert session.precision == "int8"
    assert {runner.spec.role: runner.spec.precision for runner in session.runners} == {
        "detector": "fp32",
        "encoder": "int8",
        "decoder": "int8",
    }
    assert session.description.endswith("detector at fp32)")
    half = dict.fromkeys(ROLES, ("fp16",))
    assert open_session(make_bundle(tmp_path, half), SessionOptions()).precision == "fp16"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (SessionOptions(engine="coreml"), MissingCapabilityError, "choose auto or onnxruntime"),
        (SessionOptions("openvino", "cuda"), MissingCapabilityError, "the engine openvino runs on cpu"),
        (SessionOptions(device="tpu"), InvalidArgumentError, "choose cpu, cuda"),
        (SessionOptions("onnxruntime", "cuda"), MissingCapabilityError, "no CUDA provider"),
        (SessionOptions(precision="fp8"), InvalidArgumentError, "choose fp32, fp16"),
    ],
    ids=["engine", "no such place", "device", "cuda", "precision"],
)
def test_what_cannot_be_had_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: SessionOptions, error: type[Exception], message: str
):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(error, match=message):
        open_session(make_bundle(tmp_path, dict.fromkeys(ROLES, ("fp32",))), options)


def test_only_a_passed_verification_of_this_combination_is_a_proof(tmp_path: Path):
    row = ParityRow(2, "encoder", "onnxruntime", "cpu", "fp32", "cosine", 1.0, 0.999, True, "torch")
    graphs: dict[Role, tuple[Precision, ...]] = dict.fromkeys(ROLES, ("fp32",))
    wish = SessionOptions("onnxruntime", "cpu")
    proven = open_session(make_bundle(tmp_path, graphs, ParityReport((row,))), wish)
    failed = open_session(make_bundle(tmp_path, graphs, ParityReport((replace(row, passed=False),))), wish)
    unknown = open_session(make_bundle(tmp_path, graphs), wish)
    assert [session.is_proven for session in (proven, failed, unknown)] == [True, False, False]
    assert proven.description == "toy on onnxruntime, cpu, fp32 (proven)"
    assert failed.description.endswith("(unproven: run `dendsam-deploy verify`; 1 limits broken)")
    assert unknown.description.endswith("(unproven: run `dendsam-deploy verify`)")


def test_a_graph_that_does_not_load_leaves_nothing_open(tmp_path: Path):
    bundle = make_bundle(tmp_path, dict.fromkeys(ROLES, ("fp32",)))
    (tmp_path / "decoder.fp32.onnx").write_bytes(b"broken")
    session = open_session(bundle, SessionOptions("onnxruntime"))
    with pytest.raises(BundleError, match=r"decoder\.fp32\.onnx"):
        session.__enter__()
    assert session.detector is not None
    with pytest.raises(InvalidArgumentError, match="not open"):
        session.detector.run({"x": np.ones(1, np.float32)})


def test_a_session_can_be_made_of_any_runners(tmp_path: Path):
    manifest = make_bundle(tmp_path, {"encoder": ("fp32",), "decoder": ("fp32",)}).manifest
    twice, thrice = (
        CallableRunner(spec, lambda inputs, factor=factor: {"y": inputs["x"] * factor})
        for spec, factor in zip(manifest.graphs, (2, 3), strict=True)
    )
    with Session(manifest, twice, thrice, None) as session:
        assert session.decoder.run({"x": np.ones(1)})["y"] == 3
        assert session.engine == "callable"


class CompiledDouble(CallableRunner):
    """A runner whose engine compiled its graph and kept the result, as TensorRT's does."""

    def __init__(self, role: Role, sha256: str) -> None:
        super().__init__(graph_spec(role, "fp32"), dict)
        self.compiled_sha256 = sha256


@pytest.mark.parametrize("stale", [(), ("encoder",), ("detector", "decoder")])
def test_a_proof_is_about_the_engines_that_it_was_made_with(tmp_path: Path, stale: tuple[Role, ...]):
    """To compile a graph again, for a new driver say, gives another engine: it may be wrong where the old one was not.

    What is recorded survives the file, and is replaced by what a later judgement says of the same combination.
    """
    proven = Combination("callable", "cpu", "fp32")
    row = ParityRow(2, "encoder", *proven, "cosine", 1.0, 0.9, True, "stored")
    earlier = ParityReport((row,), (), tuple(CompiledGraph(*proven, role, "before") for role in ROLES))
    report = ParityReport((row,), (), tuple(CompiledGraph(*proven, role, role * 2) for role in ROLES))
    bundle = make_bundle(tmp_path, dict.fromkeys(ROLES, ("fp32",)))
    text = parity_to_json(report.merged_into(earlier), bundle.manifest)
    read = parity_from_json(text, bundle.manifest, "parity.json")
    assert read == report
    runners = {role: CompiledDouble(role, "anew" if role in stale else role * 2) for role in ROLES}
    session = Session(bundle.manifest, **runners, is_proven=True, proven_engines=read.compiled_of(proven))
    with session as opened:
        assert opened.is_proven == (not stale)
        assert all(role in opened.description for role in stale)
        assert ("unproven: run" in opened.description) == bool(stale)
    with replace(session, proven_engines={}) as opened:
        assert not opened.is_proven, "a proof without digests is not about these engines"


def test_runners_are_told_how_a_session_ended():
    told = []

    class Listener(CallableRunner):
        def __exit__(self, kind, error, traceback) -> None:
            told.append(error)

    runners = [Listener(graph_spec(role, "fp32"), dict) for role in ROLES]
    failure = MissingCapabilityError("the GPU did not answer")
    with pytest.raises(MissingCapabilityError), Session(None, runners[1], runners[2], runners[0]):
        raise failure
    assert told == [failure] * 3
