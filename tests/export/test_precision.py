"""Precisions of a bundle: the ladder, what is said about it, and graphs that keep the contract at every rung."""

from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from dendsam_deploy.bundle.bundle import Bundle  # noqa: E402 - after the check for torch
from dendsam_deploy.bundle.parity import ParityReport, ParityRow  # noqa: E402
from dendsam_deploy.bundle.reference import load_reference  # noqa: E402
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError  # noqa: E402
from dendsam_deploy.export.attention import choose_attention  # noqa: E402
from dendsam_deploy.export.bundle import Judges, export_bundle  # noqa: E402
from dendsam_deploy.export.options import ExportOptions  # noqa: E402
from dendsam_deploy.export.precision import LADDER, rungs_from  # noqa: E402
from dendsam_deploy.export.quantise import linear_layers  # noqa: E402
from dendsam_deploy.models.sam import build_sam  # noqa: E402
from dendsam_deploy.models.weights import TrainingRecord, save_sam  # noqa: E402
from dendsam_deploy.runtimes.session import SessionOptions, open_session  # noqa: E402

SIZE = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "sam.pt"
    save_sam(path, build_sam("tiny", SIZE).state_dict(), TrainingRecord("tiny", SIZE))
    return path


def report(precision, *, passed: bool) -> ParityReport:
    row = ParityRow(2, "encoder", "onnxruntime", "cpu", precision, "embedding_cosine", 0.5, 0.9, passed, "stored")
    return ParityReport((row,))


def export(checkpoint: Path, out: Path, precisions, fails=(), absent=()) -> tuple[Bundle, list[str], list[str]]:
    """Export with a gate that fails rungs by their number; return the bundle, what was judged and what was said."""
    judged, said = [], []

    def gate(folder: Path, precision) -> ParityReport:
        graph = Bundle.open(folder).manifest.graph("encoder", precision)
        judged.append(f"{precision} {graph.attention}")
        if precision in absent:
            raise MissingCapabilityError("no engine")
        return report(precision, passed=judged[-1] not in fails)

    path = export_bundle(
        ExportOptions(checkpoint, out, precisions=precisions, points=False), Judges(gate), tell=said.append
    )
    return Bundle.open(path), judged, said


def encoders(bundle: Bundle) -> list[tuple[str, str | None]]:
    return [(graph.precision, graph.attention) for graph in bundle.manifest.graphs if graph.role == "encoder"]


def test_the_ladder_begins_at_the_precision_asked_for():
    assert [rung.precision for rung in rungs_from("fp16")] == ["fp16", "bf16", "fp16", "bf16"]
    assert rungs_from("bf16") == LADDER[1:]


def test_a_precision_that_passes_is_published_with_its_proof(checkpoint: Path, tmp_path: Path):
    bundle, judged, said = export(checkpoint, tmp_path / "b", ("fp32", "fp16"))
    assert judged == ["fp32 added", "fp16 widened"]
    assert said == []
    assert encoders(bundle) == [("fp32", "added"), ("fp16", "widened")]
    assert bundle.parity is not None
    assert {c.precision for c in bundle.parity.proven} == {"fp32", "fp16"}
    assert (bundle.path / "decoder.fp16.onnx").is_file()


@pytest.mark.slow
def test_a_precision_that_fails_is_replaced_by_the_next_and_fp32_is_left_at_last(checkpoint: Path, tmp_path: Path):
    fails = {f"{rung.precision} {rung.attention}" for rung in LADDER}
    bundle, judged, said = export(checkpoint, tmp_path / "b", ("fp16",), fails)
    assert judged == ["fp32 added", "fp16 widened", "bf16 widened", "fp16 added", "bf16 added"]
    assert encoders(bundle) == [("fp32", "added")]
    assert said[0].startswith("fp16 with relative position widened differs from the weights in 1 of 1 checks")
    assert len(said) == 5
    assert "does without" in said[-1]
    assert sorted(path.name for path in bundle.path.glob("*.onnx")) == ["decoder.onnx", "encoder.onnx"]


def test_a_precision_that_no_engine_here_runs_is_published_as_unproven(checkpoint: Path, tmp_path: Path):
    bundle, _, said = export(checkpoint, tmp_path / "b", ("bf16",), absent={"bf16"})
    assert encoders(bundle)[-1] == ("bf16", "widened")
    assert "unproven" in said[0]
    assert bundle.parity is not None
    assert {c.precision for c in bundle.parity.proven} == {"fp32"}


def test_int8_is_quantised_less_where_it_fails(checkpoint: Path, tmp_path: Path):
    calls = []

    def gate(folder: Path, precision) -> ParityReport:
        calls.append(precision)
        return report(precision, passed=calls.count("int8") != 1)

    said: list[str] = []
    path = export_bundle(
        ExportOptions(checkpoint, tmp_path / "b", precisions=("int8", "int8"), points=False),
        Judges(gate),
        tell=said.append,
    )
    assert calls == ["fp32", "int8", "int8"]
    assert said[0].startswith("int8 in all linear layers differs")
    nodes = [node.op_type for node in onnx.load(path / "encoder.int8.onnx").graph.node]
    layers = linear_layers(path / "encoder.onnx")
    assert nodes.count("DequantizeLinear") >= len(layers) - 8  # the second layers of eight perceptrons are left out
    assert len(layers) == 8 * 6 + 1


@pytest.mark.slow
def test_every_published_precision_is_close_to_the_reference(exported, tmp_path: Path):
    """Run, not only judged: each engine's embeddings at each precision against the stored ones."""
    options = ExportOptions(
        exported.sam, tmp_path / "b", exported.detector, precisions=("fp16", "bf16", "int8"), points=False
    )
    bundle = Bundle.open(export_bundle(options))
    path = bundle.extra_path("reference.npz")
    assert path is not None
    stored = load_reference(path, 128)
    tiles = {"tiles": stored.inputs.tiles, "sizes": stored.inputs.sizes}
    scale = np.abs(stored.sam.embeddings).max()
    for precision, limit in (("fp32", 1e-4), ("fp16", 0.02), ("int8", 0.2)):
        with open_session(bundle, SessionOptions("onnxruntime", "cpu", precision, threads=1)) as session:
            found = session.encoder.run(tiles)["embeddings"]
        assert found.dtype == np.float32
        assert np.abs(found - stored.sam.embeddings).max() < limit * scale
    for graph in bundle.manifest.graphs:
        assert (graph.attention is not None) == (graph.role == "encoder")


def test_the_faster_form_is_chosen_by_time(checkpoint: Path, tmp_path: Path):
    sam = build_sam("tiny", 512)
    seen = []

    def stopwatch(path: Path, spec) -> dict[str, float]:
        seen.append(spec.attention)
        assert path.is_file()
        return {"one": 1.0, "other": 2.0} if spec.attention == "added" else {"one": 3.0, "other": 0.1}

    assert choose_attention(sam, None, stopwatch) == "widened"
    assert seen == ["added", "widened"]
    assert choose_attention(sam, "added", stopwatch) == "added"
    assert choose_attention(build_sam("tiny", 64), None, stopwatch) == "added"
    assert choose_attention(build_sam("vit_t", 64), None, stopwatch) is None
    assert len(seen) == 2


def test_mobile_sam_is_refused_at_half_precision(tmp_path: Path):
    torch.manual_seed(0)
    save_sam(tmp_path / "t.pt", build_sam("vit_t", 64).state_dict(), TrainingRecord("vit_t", 64))
    steps: list[str] = []
    with pytest.raises(InvalidArgumentError, match="vit_t has no encoder graph at fp16, only at fp32"):
        export_bundle(
            ExportOptions(tmp_path / "t.pt", tmp_path / "b", precisions=("fp32", "fp16"), points=False),
            progress=lambda progress: steps.append(progress.note),
        )
    assert steps == ["reading the weights"], "nothing is worked on before it is refused"
    assert not (tmp_path / "b").exists()
