"""TensorRT on a GPU: equal to the weights, for any shapes, and the labels are those of the CPU. ``-m tensorrt -rs``."""

from __future__ import annotations

import itertools
import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorrt_inputs import assert_close, box_inputs, copies, graph_of, tile_inputs

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.manifest import PRECISIONS, Precision, Role
from dendsam_deploy.cli.main import main
from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
from dendsam_deploy.evaluate.scores import evaluate_labels
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume
from dendsam_deploy.runtimes.gpu_engine_plan import MOST_BOXES, MOST_TILES
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.runner import keeps_tensors, share_memory
from dendsam_deploy.runtimes.session import SessionOptions, open_session

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.tensorrt


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_equals_the_weights(
    bundle: Bundle, engines, requires_tensorrt: str, precision: Precision, tmp_path: Path
) -> None:
    """All levels of `verify`, against what the original modules returned; or no engine at all, and why."""
    from dendsam_deploy.export.parser_support import unsupported_nodes  # noqa: PLC0415 - needs onnx

    path, graph = graph_of(bundle, "encoder", precision)
    if unsupported_nodes(path):
        with pytest.raises(BundleError, match="the parser of TensorRT"):
            engines.EngineRunner(path, graph).__enter__()
        return
    copy = shutil.copytree(bundle.path, tmp_path / "bundle")
    report = verify_bundle(copy, VerifyOptions(session=SessionOptions("tensorrt", requires_tensorrt, precision)))
    assert report.rows
    assert {(row.engine, row.device, row.precision) for row in report.rows} == {
        ("tensorrt", requires_tensorrt, precision)
    }
    assert report.failures == ()
    assert Bundle.open(copy).parity is not None


@pytest.fixture(scope="module")
def decoders(bundle: Bundle, engines) -> Iterator[tuple]:
    """The decoder on TensorRT with and without recordings, and on the CPU."""
    path, graph = graph_of(bundle, "decoder")
    with ExitStack() as opened:
        yield tuple(
            opened.enter_context(runner)
            for runner in (
                engines.EngineRunner(path, graph),
                engines.EngineRunner(path, graph, engines.EngineOptions(is_recording=False)),
                OnnxRunner(path, graph, RunnerOptions()),
            )
        )


@pytest.mark.parametrize("tiles", [1, 3, MOST_TILES, MOST_TILES + 3])
@pytest.mark.parametrize("boxes", [1, 2, 7, 33, MOST_BOXES, MOST_BOXES + 1, 3 * MOST_BOXES])
def test_any_number_of_boxes_of_any_number_of_tiles(bundle: Bundle, decoders: tuple, tiles: int, boxes: int) -> None:
    recording, _, cpu = decoders
    for region in bundle.manifest.decoding.region_sizes:
        inputs = box_inputs(bundle, tiles, boxes, region, seed=boxes)
        assert_close(recording.run(inputs), cpu.run(inputs), 2e-3)


def test_regions_take_turns(bundle: Bundle, decoders: tuple) -> None:
    """The region is a value that decides shapes; each call must see its own."""
    recording, _, cpu = decoders
    cells = bundle.manifest.preprocessing.tile_size_px // 16
    for region in (1, cells, 2, cells, 1, 3, 2, cells - 1):
        inputs = box_inputs(bundle, 1, 5, region, seed=region)
        assert_close(recording.run(inputs), cpu.run(inputs), 2e-3)


def test_recorded_shapes_give_what_executed_ones_give(bundle: Bundle, decoders: tuple) -> None:
    """Shapes and values return in another order than that in which they were recorded."""
    recording, eager, _ = decoders
    regions = bundle.manifest.decoding.region_sizes
    cases = list(itertools.product(regions, (1, 16, 60), (1, 2)))
    random = np.random.default_rng(0)
    for turn in range(5):
        for number in random.permutation(len(cases)):
            region, boxes, tiles = cases[number]
            inputs = box_inputs(bundle, tiles, boxes, region, seed=100 * turn + int(number))
            assert_close(recording.run(inputs), copies(eager.run(inputs)), 1e-4)
    assert recording.recordings >= min(len(cases), 16)
    assert eager.recordings == 0


def test_larger_batches_may_move_all_memory(bundle: Bundle, engines) -> None:
    """What was recorded on the old places must not be replayed."""
    path, graph = graph_of(bundle, "decoder")
    with engines.EngineRunner(path, graph) as runner, OnnxRunner(path, graph, RunnerOptions()) as cpu:
        for tiles, boxes in ((1, 1), (1, 1), (1, 1), (2, 40), (1, 1), (1, 1), (1, 1), (8, 64), (1, 1), (2, 40), (1, 1)):
            inputs = box_inputs(bundle, tiles, boxes, 8, seed=boxes)
            assert_close(runner.run(inputs), cpu.run(inputs), 2e-3)


@pytest.mark.parametrize("count", [1, 2, 5, MOST_TILES, MOST_TILES + 1, 2 * MOST_TILES + 3])
@pytest.mark.parametrize("role", ["encoder", "detector"])
def test_any_number_of_tiles(bundle: Bundle, engines, role: Role, count: int) -> None:
    path, graph = graph_of(bundle, role)
    inputs = tile_inputs(bundle, count, role, seed=count)
    with engines.EngineRunner(path, graph) as runner, OnnxRunner(path, graph, RunnerOptions()) as cpu:
        expected = cpu.run(inputs)
        for _ in range(3):  # executed, recorded, replayed
            found = copies(runner.run(inputs))
            assert found.keys() == expected.keys()
            if role == "encoder":
                assert_close(found, expected, 2e-3)
            else:  # candidates of equal scores may change places
                np.testing.assert_allclose(found["scores"], expected["scores"], atol=2e-3)


def test_nothing_in_gives_nothing_out(bundle: Bundle, engines, decoders: tuple) -> None:
    recording, _, cpu = decoders
    assert_close(recording.run(box_inputs(bundle, 2, 0, 8)), cpu.run(box_inputs(bundle, 2, 0, 8)), 0.0)
    for role in ("encoder", "detector"):
        path, graph = graph_of(bundle, role)
        with engines.EngineRunner(path, graph) as runner:
            one = runner.run(tile_inputs(bundle, 1, role))
            none = runner.run(tile_inputs(bundle, 0, role))
            assert {name: values.shape for name, values in none.items()} == {
                name: (0, *values.shape[1:]) for name, values in one.items()
            }


def test_outputs_are_borrowed(bundle: Bundle, decoders: tuple) -> None:
    recording, *_ = decoders
    assert recording.borrows_outputs
    first = recording.run(box_inputs(bundle, 1, 4, 8, seed=1))["iou"]
    kept = first.copy()
    second = recording.run(box_inputs(bundle, 1, 4, 8, seed=2))["iou"]
    assert np.shares_memory(first, second)
    assert not np.array_equal(kept, first)


def test_embeddings_stay_on_the_gpu(bundle: Bundle, engines, decoders: tuple) -> None:
    decoder = decoders[0]
    path, graph = graph_of(bundle, "encoder")
    with engines.EngineRunner(path, graph) as encoder:
        assert keeps_tensors(encoder)
        assert share_memory(encoder, decoder)
        count = MOST_TILES + 3
        inputs = tile_inputs(bundle, count)
        room = encoder.allocate("embeddings", count)
        encoder.run_into({"tiles": encoder.upload(inputs["tiles"]), "sizes": inputs["sizes"]}, {"embeddings": room})
        expected = copies(encoder.run(inputs))["embeddings"]
        np.testing.assert_allclose(room.numpy(), expected, atol=1e-5)
        prompt = box_inputs(bundle, count, 90, 8)
        stayed = copies(decoder.run(prompt | {"embeddings": room}))
        travelled = decoder.run(prompt | {"embeddings": room.numpy()})
        assert_close(stayed, travelled, 1e-5)
        part = prompt | {"tile_index": prompt["tile_index"] % 2}
        assert_close(
            copies(decoder.run(part | {"embeddings": room[3:5]})),
            decoder.run(part | {"embeddings": room.numpy()[3:5]}),
            1e-5,
        )
        with pytest.raises(InvalidArgumentError, match="allocate"):
            encoder.run_into(inputs, {})
        with pytest.raises(InvalidArgumentError, match=rf"expected float32\[{count}, "):
            encoder.run_into(inputs, {"embeddings": room[1:]})  # the GPU would write beyond its end
        for array in (inputs["tiles"][::2], inputs["tiles"][:, ::3, 1:], inputs["tiles"][:0]):
            np.testing.assert_array_equal(encoder.upload(array).numpy(), array)


def test_a_segmented_volume_is_that_of_the_cpu(
    bundle: Bundle, requires_tensorrt: str, phantom: Path, tmp_path: Path
) -> None:
    labels = {}
    for engine, device in (("tensorrt", requires_tensorrt), ("onnxruntime", "cpu")):
        with open_session(bundle, SessionOptions(engine, device, "fp32")) as session:
            result = segment_volume(phantom, session, SegmentOptions(out=tmp_path / engine))
            assert (result.engine, result.device) == (engine, device)
            labels[engine] = result.out
    scores = evaluate_labels(labels["tensorrt"], labels["onnxruntime"] / "labels.tif").to_document()
    assert scores["slices"]["pq"] > 0.99
    assert scores["volume"]["arand_error"] < 0.01


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tiles": None}, "missing"),
        ({"tiles": np.zeros((1, 8, 8), np.uint8)}, "expected contiguous uint8"),
        ({"tiles": np.zeros((1, 8, 8), np.float32)}, "expected contiguous uint8"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(bundle: Bundle, engines, change: dict, complaint: str) -> None:
    path, graph = graph_of(bundle, "encoder")
    inputs = {name: array for name, array in (tile_inputs(bundle, 1) | change).items() if array is not None}
    with engines.EngineRunner(path, graph) as runner:
        with pytest.raises(InvalidArgumentError, match=complaint) as caught:
            runner.run(inputs)
        assert "\n" not in str(caught.value)
        runner.run(tile_inputs(bundle, 1))
    with pytest.raises(InvalidArgumentError, match="not open"):
        runner.run(tile_inputs(bundle, 1))


def test_a_box_of_a_region_beyond_the_grid_is_refused(bundle: Bundle, decoders: tuple) -> None:
    cells = bundle.manifest.preprocessing.tile_size_px // 16
    with pytest.raises(InvalidArgumentError, match=f"region \\[{cells + 1}\\]"):
        decoders[0].run(box_inputs(bundle, 1, 2, cells + 1))


def test_a_call_that_takes_too_long_has_failed(bundle: Bundle, engines) -> None:
    path, graph = graph_of(bundle, "encoder")
    hasty = engines.EngineRunner(path, graph, engines.EngineOptions(time_limit_s=0.0))
    with hasty, pytest.raises(MissingCapabilityError, match="did not answer within 0 s"):
        hasty.run(tile_inputs(bundle, MOST_TILES))


def test_a_gpu_that_is_not_there_is_refused(bundle: Bundle, engines) -> None:
    path, graph = graph_of(bundle, "encoder")
    with pytest.raises(MissingCapabilityError, match="device cuda:99"):
        engines.EngineRunner(path, graph, engines.EngineOptions("cuda:99")).__enter__()


def test_the_commands(bundle: Bundle, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu = ["--engine", "tensorrt", "--precision", "fp32"]
    assert main(["segment", str(phantom), "-b", str(bundle.path), "-o", str(tmp_path / "out"), *on_gpu]) == 0
    assert (tmp_path / "out" / "labels.tif").is_file()
    assert "tensorrt" in capsys.readouterr().err
    assert main(["doctor"]) == 0
    assert "tensorrt on cuda" in capsys.readouterr().out
