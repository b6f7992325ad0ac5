"""TensorRT on a GPU: equal to the weights, compiled once, never from elsewhere, for any shapes. ``-m tensorrt -rs``."""

from __future__ import annotations

import importlib
import itertools
import shutil
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import tifffile

from dendsam_deploy.bundle.bundle import Bundle, digest_file
from dendsam_deploy.bundle.manifest import PRECISIONS, FileDigest, GraphSpec, Precision, Role
from dendsam_deploy.cli.main import main
from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError, UnsafeFileError
from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
from dendsam_deploy.evaluate.scores import evaluate_labels
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume
from dendsam_deploy.runtimes.gpu_engine_cache import ENGINE_FILE
from dendsam_deploy.runtimes.gpu_engine_plan import MOST_BOXES, MOST_TILES
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.runner import keeps_tensors, share_memory
from dendsam_deploy.runtimes.session import SessionOptions, open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dendsam_deploy.progress import Progress

pytestmark = pytest.mark.tensorrt

ROLES: tuple[Role, ...] = ("detector", "encoder", "decoder")
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def bundle(requires_tensorrt: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The packaged weights, exported once; the engines that tests compile stay in it for the others."""
    from dendsam_deploy.export.bundle import export_bundle  # noqa: PLC0415 - loads torch, which a skipped test needs not
    from dendsam_deploy.export.options import ExportOptions  # noqa: PLC0415
    from dendsam_deploy.weights import PACKAGED_DETECTOR, PACKAGED_SAM  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("tensorrt") / "trained"
    options = ExportOptions(PACKAGED_SAM, folder, PACKAGED_DETECTOR, precisions=("fp16", "bf16", "int8"))
    return Bundle.open(export_bundle(options))


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of it, with its engines, for tests that spoil something."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def engines(requires_tensorrt: str):
    """The modules that need TensorRT."""
    return importlib.import_module("dendsam_deploy.runtimes.gpu_engine")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom  # noqa: PLC0415

    path = tmp_path_factory.mktemp("phantom") / "raw.tif"
    tifffile.imwrite(path, make_phantom(PhantomOptions((3, 512, 512), 7)).raw, photometric="minisblack")
    return path


def graph_of(bundle: Bundle, role: Role, precision: Precision = "fp32") -> tuple[Path, GraphSpec]:
    graph = bundle.manifest.graph(role, precision)
    if graph is None:
        pytest.skip(f"the bundle has no {role} at {precision}")
    return bundle.graph_path(role, precision), graph


def tile_inputs(bundle: Bundle, count: int, role: Role = "encoder", seed: int = 0) -> Arrays:
    """Smooth structures of random size, as tissue has them; noise alone shows little."""
    size = bundle.manifest.preprocessing.tile_size_px
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    tiles = (
        np.stack([np.sin(y * random.uniform(9, 90)) * np.cos(x * random.uniform(9, 90)) for _ in range(count)])
        if (count)
        else np.zeros((0, size, size))
    )
    grey = np.clip(120 + 90 * tiles + random.normal(0, 12, tiles.shape), 0, 255).astype(np.uint8)
    sizes = np.full((count, 2), size, np.int64)
    sizes[1::3] -= 37
    return {"tiles": grey} if role == "detector" else {"tiles": grey, "sizes": sizes}


def box_inputs(bundle: Bundle, tiles: int, boxes: int, region: int, seed: int = 0) -> Arrays:
    size = bundle.manifest.preprocessing.tile_size_px
    random = np.random.default_rng(seed)
    corner = random.uniform(0, size - 60, (boxes, 2))
    return {
        "embeddings": random.normal(0, 0.1, (tiles, 256, size // 16, size // 16)).astype(np.float32),
        "boxes": np.concatenate([corner, corner + random.uniform(8, 60, (boxes, 2))], axis=1).astype(np.float32),
        "tile_index": random.integers(0, tiles, boxes),
        "region": np.array([region]),
    }


def assert_close(found: Arrays, expected: Arrays, share_of_spread: float) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert found[name].shape == values.shape, name
        if values.dtype.kind == "f":
            limit = share_of_spread * max(float(values.std()), 1e-3) if values.size else 0.0
            np.testing.assert_allclose(found[name], values, rtol=0, atol=limit, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def copies(outputs: Arrays) -> Arrays:
    return {name: values.copy() for name, values in outputs.items()}


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


@pytest.mark.parametrize("role", ROLES)
def test_an_engine_is_compiled_once(bundle: Bundle, engines, role: Role) -> None:
    path, graph = graph_of(bundle, role)
    told: list[Progress] = []
    options = engines.EngineOptions(progress=told.append)
    with engines.EngineRunner(path, graph, options) as first:
        digest = first.stored.sha256
    told.clear()
    with engines.EngineRunner(path, graph, options) as second:
        assert not second.stored.is_new
        assert second.stored.sha256 == digest
    assert told == []


def test_compiling_is_reported_and_says_how_many_attentions_were_fused(copied: Bundle, engines) -> None:
    shutil.rmtree(copied.path / "engines", ignore_errors=True)
    path, graph = graph_of(copied, "encoder")
    told: list[Progress] = []
    with engines.EngineRunner(path, graph, engines.EngineOptions(progress=told.append)) as runner:
        built = runner.stored.built
        assert runner.stored.is_new
    operators = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert built.attention_layers == operators.count("Softmax") + operators.count("Attention") > 0
    assert 0 <= built.fused_attention_layers <= built.attention_layers
    assert {progress.stage for progress in told} == {"compile"}
    assert len(told) > 2
    assert all(0 <= progress.done <= progress.total for progress in told)
    assert f"{built.fused_attention_layers} of {built.attention_layers} attention" in told[-1].note


def test_whoever_loses_interest_stops_a_build(copied: Bundle, engines) -> None:
    shutil.rmtree(copied.path / "engines", ignore_errors=True)

    def interrupted(progress: Progress) -> None:
        raise KeyboardInterrupt

    path, graph = graph_of(copied, "decoder")
    with pytest.raises(KeyboardInterrupt):
        engines.EngineRunner(path, graph, engines.EngineOptions(progress=interrupted)).__enter__()
    assert not list((copied.path / "engines").glob("*/record.json"))


@pytest.mark.parametrize("change", ["graph", "profiles"])
def test_a_stale_engine_is_not_used(copied: Bundle, engines, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    path, graph = graph_of(copied, "decoder")
    with engines.EngineRunner(path, graph) as runner:
        old = runner.stored.sha256
    if change == "graph":
        model = onnx.load(path)
        model.doc_string = "another file, though the same function"
        onnx.save(model, path)
        graph = replace(graph, files=(digest_file(path.parent, path.name), *graph.files[1:]))
    else:
        monkeypatch.setattr("dendsam_deploy.runtimes.gpu_engine_plan.MOST_TILES", MOST_TILES - 1)
    with engines.EngineRunner(path, graph) as runner:
        assert runner.stored.is_new
        new = runner.stored.sha256
    plans = {file.parent.name for file in (copied.path / "engines").glob(f"decoder-fp32-*/{ENGINE_FILE}")}
    assert len(plans) >= 2
    assert old
    assert new


def spoil(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


@pytest.mark.parametrize("damage", [spoil, lambda content: content[:-1], lambda content: b""])
def test_a_tampered_engine_is_refused(
    copied: Bundle, engines, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path, graph = graph_of(copied, "decoder")
    with engines.EngineRunner(path, graph):
        pass
    for engine in (copied.path / "engines").glob(f"*/{ENGINE_FILE}"):
        engine.write_bytes(damage(engine.read_bytes()))
    with pytest.raises(UnsafeFileError, match="altered"):
        engines.EngineRunner(path, graph).__enter__()
    assert main(["verify", str(copied.path), "--engine", "tensorrt", "--precision", "fp32"]) == 77
    assert "altered" in capsys.readouterr().err


def test_an_engine_of_somebody_else_runs_only_when_it_is_trusted(
    copied: Bundle, engines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, graph = graph_of(copied, "decoder")
    with engines.EngineRunner(path, graph) as runner:
        digest = runner.stored.sha256
    for variable in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "somebody else"))
    with pytest.raises(UnsafeFileError, match=f"--trust-engine {digest}"):
        engines.EngineRunner(path, graph).__enter__()
    with engines.EngineRunner(path, graph, engines.EngineOptions(trusted=(digest,))) as trusted:
        assert trusted.stored.sha256 == digest
        assert len(trusted.run(box_inputs(copied, 1, 3, 8))["iou"]) == 3


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


def test_weights_beside_the_graph_are_found(bundle: Bundle, engines, tmp_path: Path) -> None:
    """As they are where a graph has more than 2 GiB of them."""
    path, graph = graph_of(bundle, "encoder")
    onnx.save(
        onnx.load(path),
        tmp_path / "encoder.onnx",
        save_as_external_data=True,
        location="encoder.onnx.data",
        size_threshold=1024,
    )
    files = tuple(digest_file(tmp_path, name) for name in ("encoder.onnx", "encoder.onnx.data"))
    inputs = tile_inputs(bundle, 1)
    with (
        engines.EngineRunner(tmp_path / "encoder.onnx", replace(graph, files=files)) as outside,
        OnnxRunner(path, graph, RunnerOptions()) as inside,
    ):
        assert_close(outside.run(inputs), inside.run(inputs), 2e-3)


def test_what_the_parser_refuses_is_named_in_one_line(bundle: Bundle, engines, tmp_path: Path) -> None:
    path, graph = graph_of(bundle, "encoder")
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type, node.name = "Hardswoosh", "the_culprit"
    onnx.save(model, tmp_path / "encoder.onnx")
    altered = replace(graph, files=(FileDigest("encoder.onnx", "0" * 64, 0),))
    with pytest.raises(BundleError, match=r"encoder\.onnx.*parser.*the_culprit") as caught:
        engines.EngineRunner(tmp_path / "encoder.onnx", altered).__enter__()
    assert "\n" not in str(caught.value)


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
