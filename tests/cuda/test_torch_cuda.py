"""torch on a GPU: compiled, fused, recorded, and still the bundle's own graphs; the labels are those of the CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
from dendsam_deploy.evaluate.scores import evaluate_labels
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume
from dendsam_deploy.runtimes.captured import CapturedOptions, CapturedRunner
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.runner import share_memory
from dendsam_deploy.runtimes.session import Session, SessionOptions, open_session

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dendsam_deploy.bundle.manifest import Precision, Role

pytestmark = pytest.mark.cuda

CPU = SessionOptions(engine="onnxruntime", device="cpu", precision="fp32")
ATTENTION = pytest.mark.parametrize("attention", ["in_kernel", "widened"])


@pytest.fixture(scope="module")
def session(requires_torch: str, trained_bundle: Path) -> Iterator[Session]:
    """The trained bundle on the GPU at fp32."""
    with open_session(Bundle.open(trained_bundle), replace(CPU, engine="torch", device=requires_torch)) as opened:
        yield opened


def open_runner(folder: Path, role: Role, options: CapturedOptions, precision: Precision = "fp32") -> CapturedRunner:
    bundle = Bundle.open(folder)
    spec = bundle.manifest.graph(role, precision)
    assert spec is not None
    return CapturedRunner(bundle.graph_path(role, precision), spec, options)


def tiles_of(count: int, side: int) -> dict[str, np.ndarray]:
    """Structured tiles, one of them padded."""
    y, x = np.indices((side, side))
    tiles = np.stack([127 + 60 * np.sin(x / (9 + n)) + 60 * np.cos(y / (13 + n)) for n in range(count)])
    sizes = np.full((count, 2), side)
    sizes[0] = side - 37, side // 2
    return {"tiles": tiles.astype(np.uint8), "sizes": sizes}


def test_all_three_graphs_share_the_memory_of_the_gpu(session: Session, requires_torch: str):
    assert {(runner.engine, runner.device) for runner in session.runners} == {("torch", requires_torch)}
    assert share_memory(*session.runners)


def test_every_precision_that_torch_executes_is_proven(trained_bundle: Path, requires_torch: str, tmp_path: Path):
    copy = shutil.copytree(trained_bundle, tmp_path / "bundle")
    precisions = {graph.precision for graph in Bundle.open(copy).manifest.graphs if graph.role == "encoder"}
    report = verify_bundle(copy, VerifyOptions(session=SessionOptions(engine="torch", device=requires_torch)))
    assert not report.failures
    assert {skipped.precision for skipped in report.not_judged} <= {"int8"}
    assert {row.precision for row in report.rows} >= precisions - {"int8"}


@ATTENTION
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 0.02), ("bf16", 0.1)])
def test_fused_attention_equals_the_graph(
    trained_bundle: Path, requires_torch: str, attention: str, precision: Precision, limit: float
):
    """Against the same graph, not compiled, with its attention written out."""
    inputs = tiles_of(1, 512)
    written_out = CapturedOptions(requires_torch, is_compiled=False)
    with open_runner(trained_bundle, "encoder", written_out, precision) as plain:
        expected = plain.run(inputs)["embeddings"]
    with open_runner(
        trained_bundle, "encoder", CapturedOptions(requires_torch, attention=attention), precision
    ) as fused:
        found = fused.run(inputs)["embeddings"]
    np.testing.assert_allclose(found, expected, atol=limit * expected.std())


def test_what_is_replayed_is_what_was_asked_for(trained_bundle: Path, requires_torch: str):
    """A recording keeps the addresses of its tensors: every call has to bring its own numbers there."""
    first, second = tiles_of(2, 512), tiles_of(4, 512)
    second = {name: values[2:] for name, values in second.items()}
    with open_runner(trained_bundle, "encoder", CapturedOptions(requires_torch)) as runner:
        fresh = [runner.run(inputs)["embeddings"] for inputs in (first, second, first)]
    np.testing.assert_array_equal(fresh[0], fresh[2])
    assert np.abs(fresh[0] - fresh[1]).max() > 0.1 * fresh[0].std()
    with open_runner(trained_bundle, "encoder", CapturedOptions(requires_torch)) as runner:
        np.testing.assert_array_equal(runner.run(second)["embeddings"], fresh[1])


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 64, 100])
def test_any_number_of_boxes_is_decoded_as_on_the_cpu(
    session: Session, trained_bundle: Path, requires_torch: str, count: int
):
    rng = np.random.default_rng(count)
    corners = rng.uniform(0, 400, (count, 2))
    inputs = {
        "embeddings": rng.normal(size=(5, 256, 32, 32)).astype(np.float32),
        "boxes": np.concatenate([corners, corners + rng.uniform(8, 110, (count, 2))], axis=1).astype(np.float32),
        "tile_index": np.sort(rng.integers(0, 5, count)),
        "region": np.array([8]),
    }
    bundle = Bundle.open(trained_bundle)
    spec = bundle.manifest.graph("decoder", "fp32")
    assert spec is not None
    with OnnxRunner(bundle.graph_path("decoder", "fp32"), spec, RunnerOptions()) as plain:
        expected = plain.run(inputs)
    found = session.decoder.run(inputs)
    np.testing.assert_array_equal(found["origin"], expected["origin"])
    np.testing.assert_allclose(found["iou"], expected["iou"], atol=1e-4)
    spread = expected["logits"].std() if count else 1.0
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-3 * spread)


def test_embeddings_stay_on_the_gpu(session: Session):
    encoder, decoder = session.encoder, session.decoder
    assert isinstance(encoder, CapturedRunner)
    inputs = tiles_of(3, 512)
    uploaded, room = encoder.upload(inputs["tiles"]), encoder.allocate("embeddings", 3)
    for rows in (slice(0, 2), slice(2, 3)):
        encoder.run_into({"tiles": uploaded[rows], "sizes": inputs["sizes"][rows]}, {"embeddings": room[rows]})
    assert room.held.is_cuda
    prompt = {
        "boxes": np.array([[40, 40, 90, 100], [200, 210, 260, 250]], np.float32),
        "tile_index": np.array([0, 1]),
        "region": np.array([8]),
    }
    stayed, travelled = (decoder.run({"embeddings": tensor, **prompt}) for tensor in (room[1:], room[1:].numpy()))
    for name, values in stayed.items():
        np.testing.assert_array_equal(values, travelled[name])


def test_any_array_goes_up_and_may_change_at_once(session: Session):
    encoder = session.encoder
    assert isinstance(encoder, CapturedRunner)
    array = np.random.default_rng(0).integers(0, 256, (6, 40, 50), np.uint8)
    frozen = array.copy()
    frozen.flags.writeable = False
    expected = array.copy()
    uploaded = [encoder.upload(given) for given in (array, frozen, array[::2], array.transpose(2, 0, 1), array[:0])]
    array[:] = 0
    for found, want in zip(
        uploaded, (expected, expected, expected[::2], expected.transpose(2, 0, 1), expected[:0]), strict=True
    ):
        np.testing.assert_array_equal(found.numpy(), want)
        assert found.device == session.device


def test_a_segmented_volume_is_that_of_the_cpu(session: Session, trained_bundle: Path, phantom: Path, tmp_path: Path):
    ours = segment_volume(phantom, session, SegmentOptions(out=tmp_path / "gpu"))
    with open_session(Bundle.open(trained_bundle), CPU) as on_cpu:
        theirs = segment_volume(phantom, on_cpu, SegmentOptions(out=tmp_path / "cpu"))
    scores = evaluate_labels(ours.out, theirs.out / "labels.tif").to_document()
    assert scores["slices"]["pq"] > 0.99
    assert scores["volume"]["arand_error"] < 0.01
    again = segment_volume(phantom, session, SegmentOptions(out=tmp_path / "again"))
    np.testing.assert_array_equal(tifffile.imread(again.out / "labels.tif"), tifffile.imread(ours.out / "labels.tif"))


def test_a_full_memory_says_what_to_do_and_spoils_nothing(session: Session):
    encoder = session.encoder
    assert isinstance(encoder, CapturedRunner)
    with pytest.raises(InvalidArgumentError, match=r"expected float32\[3, "):
        encoder.run_into(tiles_of(3, 512), {"embeddings": encoder.allocate("embeddings", 2)})
    with pytest.raises(MissingCapabilityError, match=r"failed on .*free memory") as caught:
        encoder.allocate("embeddings", 1 << 22)
    assert "\n" not in str(caught.value)
    assert np.isfinite(encoder.run(tiles_of(1, 512))["embeddings"]).all()


def test_a_gpu_that_does_not_exist_is_refused(trained_bundle: Path, requires_torch: str):
    with pytest.raises(MissingCapabilityError, match=r"device cuda:99: torch .* sees \d+ GPUs"):
        open_runner(trained_bundle, "encoder", CapturedOptions("cuda:99"))


def test_wrong_inputs_are_refused_on_the_gpu_as_well(session: Session):
    with pytest.raises(InvalidArgumentError, match="'tiles' is float32"):
        session.encoder.run({"tiles": np.zeros((1, 64, 64), np.float32), "sizes": np.zeros((1, 2), np.int64)})
