"""Cutting and padding of work for compiled engines, judged by the real graphs on another engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs
from dendsam_deploy.bundle.manifest import GraphSpec, TensorSpec
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes.gpu_engine_plan import (
    BOX_COUNTS,
    MOST_BOXES,
    MOST_TILES,
    Bounds,
    RecordedShapes,
    choose_profile,
    count_fused_attention,
    empty_outputs,
    execution_shapes,
    gpu_index,
    make_profiles,
    padded_count,
    split_calls,
)
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.runner import check_inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Role
    from tests.conftest import Exported

SIZE = 64
CELLS = 4


def spec(role: Role, size: int = SIZE) -> GraphSpec:
    return GraphSpec(role, "fp32", 20, (), graph_inputs(role, size), graph_outputs(role, size))


def tiles_of(count: int, seed: int = 0, size: int = SIZE) -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(seed)
    tiles = random.integers(0, 256, (count, size, size), np.uint8)
    return {"tiles": tiles, "sizes": np.full((count, 2), size, np.int64)}


def boxes_of(tiles: int, boxes: int, seed: int = 0, cells: int = CELLS, region: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    corners = np.sort(random.uniform(0, cells * 16, (boxes, 2, 2)).astype(np.float32), axis=1)
    return {
        "embeddings": random.normal(size=(tiles, 256, cells, cells)).astype(np.float32),
        "boxes": corners.reshape(boxes, 4),
        "tile_index": random.integers(0, tiles, boxes) if tiles else np.zeros(0, np.int64),
        "region": np.array([region], np.int64),
    }


@settings(max_examples=100, deadline=None)
@given(tiles=st.integers(1, 30), boxes=st.integers(0, 200), seed=st.integers(0, 99), region=st.integers(1, CELLS))
def test_every_box_is_executed_once_with_its_own_tile(tiles: int, boxes: int, seed: int, region: int) -> None:
    inputs = boxes_of(tiles, boxes, seed, region=region)
    decoder = spec("decoder")
    seen = []
    for call in split_calls(inputs, decoder):
        shapes = execution_shapes(call, decoder)
        number = choose_profile(make_profiles(decoder), shapes, {"region": (region,)}, "decoder.onnx")
        assert number == 0
        part = cast("dict[str, np.ndarray]", call.inputs)
        assert 1 <= len(call.rows) <= shapes["boxes"][0] == shapes["tile_index"][0] <= MOST_BOXES
        assert len(part["embeddings"]) <= MOST_TILES
        np.testing.assert_array_equal(part["boxes"], inputs["boxes"][call.rows])
        np.testing.assert_array_equal(
            part["embeddings"][part["tile_index"]], inputs["embeddings"][inputs["tile_index"][call.rows]]
        )
        seen += call.rows.tolist()
    assert sorted(seen) == list(range(boxes))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 40), role=st.sampled_from(["encoder", "detector"]))
def test_every_tile_is_executed_once_and_fits_a_profile(count: int, role: Role) -> None:
    graph = spec(role)
    inputs = tiles_of(count)
    rows = []
    for call in split_calls(inputs, graph):
        shapes = execution_shapes(call, graph)
        number = choose_profile(make_profiles(graph), shapes, {}, "graph.onnx")
        assert number == (0 if len(call.rows) == 1 else 1)
        np.testing.assert_array_equal(cast("np.ndarray", call.inputs["tiles"]), inputs["tiles"][call.rows])
        rows += call.rows.tolist()
    assert rows == list(range(count))


def run_padded(runner: OnnxRunner, call_inputs: dict, shapes: dict, rows: int) -> dict[str, np.ndarray]:
    padded = {}
    for name, array in call_inputs.items():
        padded[name] = np.zeros(shapes[name], array.dtype)
        padded[name][: len(array)] = array
    return {name: values[:rows] for name, values in runner.run(padded).items()}


@pytest.mark.parametrize(("tiles", "boxes", "region"), [(1, 1, 2), (1, 64, 2), (3, 65, 4), (19, 150, 3), (9, 13, 8)])
def test_cut_and_padded_work_gives_what_one_call_gives(exported: Exported, tiles: int, boxes: int, region: int) -> None:
    bundle = Bundle.open(exported.bundle)
    graph = bundle.manifest.graph("decoder", "fp32")
    assert graph is not None
    inputs = boxes_of(tiles, boxes, cells=8, region=region)
    with OnnxRunner(bundle.graph_path("decoder", "fp32"), graph, RunnerOptions(threads=1)) as runner:
        expected = runner.run(inputs)
        whole = {name: np.full_like(values, -1) for name, values in expected.items()}
        for call in split_calls(inputs, graph):
            shapes = execution_shapes(call, graph)
            for name, values in run_padded(runner, dict(call.inputs), shapes, len(call.rows)).items():
                whole[name][call.rows] = values
    for name, values in expected.items():
        np.testing.assert_allclose(whole[name], values, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("role", ["encoder", "decoder", "detector"])
def test_nothing_in_gives_what_the_graph_gives_for_nothing(exported: Exported, role: Role) -> None:
    bundle = Bundle.open(exported.bundle)
    graph = bundle.manifest.graph(role, "fp32")
    assert graph is not None
    inputs = boxes_of(1, 0, cells=8, region=3) if role == "decoder" else tiles_of(0, size=128)
    if role == "detector":
        del inputs["sizes"]
    with OnnxRunner(bundle.graph_path(role, "fp32"), graph, RunnerOptions(threads=1)) as runner:
        expected = runner.run(inputs) if role == "decoder" else None
        one = (
            runner.run(tiles_of(1, size=128) if role == "encoder" else {"tiles": tiles_of(1, size=128)["tiles"]})
            if (expected is None)
            else expected
        )
    stated = {name: (-1, *values.shape[1:]) for name, values in one.items()}
    empty = empty_outputs(inputs, graph, stated)
    assert {name: (values.shape, values.dtype) for name, values in empty.items()} == {
        name: ((0, *values.shape[1:]), values.dtype) for name, values in one.items()
    }


def test_what_nobody_knows_of_an_empty_output_has_no_length() -> None:
    empty = empty_outputs({"tiles": np.zeros((0, SIZE, SIZE), np.uint8)}, spec("detector"), {})
    assert {name: values.shape for name, values in empty.items()} == {"boxes": (0, 0, 4), "scores": (0, 0)}


@given(count=st.integers(1, MOST_BOXES))
def test_padding_is_little_and_to_few_numbers(count: int) -> None:
    padded = padded_count(count)
    assert padded in BOX_COUNTS
    assert count <= padded < 1.5 * count or count == padded


def test_profiles_of_tiles_are_one_and_several() -> None:
    for role in ("encoder", "detector"):
        one, several = make_profiles(spec(role))
        assert one.shapes["tiles"] == Bounds(*[(1, SIZE, SIZE)] * 3)
        assert several.shapes["tiles"] == Bounds((2, SIZE, SIZE), (MOST_TILES, SIZE, SIZE), (MOST_TILES, SIZE, SIZE))
        assert not one.values


@pytest.mark.parametrize("cells", [1, 8, 16, 64])
def test_the_profile_of_the_decoder_bounds_the_value_of_its_region(cells: int) -> None:
    (profile,) = make_profiles(spec("decoder", cells * 16))
    assert profile.values == {"region": Bounds((1,), (min(16, cells),), (cells,))}
    assert profile.shapes["region"] == Bounds((1,), (1,), (1,))
    assert profile.shapes["embeddings"].most == (MOST_TILES, 256, cells, cells)
    for bounds in (*profile.shapes.values(), *profile.values.values()):
        assert all(a <= b <= c for a, b, c in zip(bounds.least, bounds.usual, bounds.most, strict=True))
    json.dumps(profile.to_document())


def test_a_graph_without_free_axes_has_one_profile() -> None:
    probe = GraphSpec(
        "encoder", "fp32", 17, (), (TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),)
    )
    (profile,) = make_profiles(probe)
    assert profile.shapes == {"x": Bounds((1,), (1,), (1,))}
    assert [call.rows.tolist() for call in split_calls({"x": np.ones(1, np.float32)}, probe)] == [[0]]


def test_inputs_beyond_every_profile_are_refused() -> None:
    decoder = spec("decoder")
    shapes = {name: array.shape for name, array in boxes_of(1, 4).items()}
    with pytest.raises(InvalidArgumentError, match=r"decoder\.onnx.*region \[5\]") as caught:
        choose_profile(make_profiles(decoder), shapes, {"region": (CELLS + 1,)}, "decoder.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidArgumentError, match=r"boxes \[65, 4\]"):
        choose_profile(make_profiles(decoder), shapes | {"boxes": (65, 4)}, {"region": (1,)}, "decoder.onnx")


@pytest.mark.parametrize("index", [[-1, 0], [0, 3]])
def test_a_box_of_a_tile_that_is_not_there_is_refused(index: list[int]) -> None:
    inputs = boxes_of(3, 2) | {"tile_index": np.array(index)}
    with pytest.raises(InvalidArgumentError, match="expected numbers of the 3 embeddings"):
        list(split_calls(inputs, spec("decoder")))


def test_right_inputs_pass() -> None:
    check_inputs(boxes_of(2, 5), spec("decoder"), "decoder.onnx")
    check_inputs(boxes_of(2, 0), spec("decoder"), "decoder.onnx")
    check_inputs(tiles_of(3), spec("encoder"), "encoder.onnx")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tiles": None}, "'tiles' is missing"),
        (
            {"tiles": np.zeros((3, SIZE, SIZE), np.float32)},
            r"'tiles' is float32\[3, 64, 64\], expected contiguous uint8",
        ),
        ({"tiles": np.zeros((3, SIZE, SIZE + 1), np.uint8)}, "'tiles'"),
        ({"tiles": np.zeros((3, SIZE), np.uint8)}, "'tiles'"),
        ({"tiles": np.zeros((3, SIZE, 2 * SIZE), np.uint8)[:, :, ::2]}, "'tiles'"),
        ({"sizes": np.zeros((2, 2), np.int64)}, "'sizes'.*tiles = 3"),
        ({"sizes": np.zeros((3, 2), np.int32)}, "'sizes'"),
    ],
)
def test_wrong_inputs_are_refused(change: dict, complaint: str) -> None:
    inputs = {name: array for name, array in (tiles_of(3) | change).items() if array is not None}
    with pytest.raises(InvalidArgumentError, match=complaint):
        check_inputs(inputs, spec("encoder"), "encoder.onnx")


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:12", 12)])
def test_names_of_gpus(device: str, index: int) -> None:
    assert gpu_index(device) == index


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:", "cuda:-1", "cuda:0 ", "CUDA", ""])
def test_what_is_no_gpu_is_refused(device: str) -> None:
    with pytest.raises(MissingCapabilityError if device == "cpu" else InvalidArgumentError, match="choose"):
        gpu_index(device)


def test_kernels_of_fused_attention_are_counted() -> None:
    """Names as engines of real networks have them, reported with NVIDIA/TensorRT issues 3243, 3620, 3665 and 4537."""
    fused = [
        "_gemm_mha_v2_myl0_15",
        "__mye8037_gemm_mha_v2",
        "fused_mha_v2_3",
        "fmha_v2_flash_attention_fp16_64_32_S_64",
    ]
    others = ["__myl_FcAdd_myl0_3", "/blocks.0/attn/MatMul", "alphabet_MHAX", "sm80_xmma_gemm_f16f16", "schema_mham"]
    layers = [{"Name": name, "LayerType": "kgen", "TacticName": ""} for name in (*fused, *others)]
    layers.append({"Name": "__mye1", "TacticName": "_gemm_mha_v2_0x1234"})
    layers.append({"Name": "_gemm_mha_v2_myl1_15 [profile 1]", "TacticName": "_gemm_mha_v2"})
    layers.append({"Name": "_gemm_mha_v2_myl0_16 [profile 0]", "TacticName": ""})
    assert count_fused_attention(json.dumps({"Layers": layers, "Bindings": []})) == len(fused) + 2
    assert count_fused_attention(json.dumps({"Layers": [*fused, *others]})) == len(fused)  # with less verbosity
    assert count_fused_attention('{"Layers": []}') == 0


@pytest.mark.parametrize("text", ["", "Layers: none", "{"])
def test_what_is_no_inspection_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text is the parser's
        count_fused_attention(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["use", "use", "use", "forget", "refuse"]), st.integers(0, 6)), max_size=60))
def test_a_recording_is_used_only_while_it_is_valid(steps: list[tuple[str, int]]) -> None:
    """Against a plain model of what may be replayed."""
    recorded: RecordedShapes[str] = RecordedShapes(capacity=3)
    valid: list[int] = []
    seen: set[int] = set()
    refused: set[int] = set()
    for step, key in steps:
        if step == "forget":
            recorded.clear()
            valid, seen = [], set()
        elif step == "refuse":
            if key not in valid:
                recorded.refuse(key)
                refused.add(key)
        elif (work := recorded.find(key)) is not None:
            assert work == f"work {key}"
            assert key in valid
            valid.append(valid.pop(valid.index(key)))
        else:
            assert key not in valid
            is_due = recorded.is_due(key)
            assert is_due == (key in seen and key not in refused)
            seen.add(key)
            if is_due:
                recorded.keep(key, f"work {key}")
                valid.append(key)
                if len(valid) > 3:
                    seen.discard(valid.pop(0))
        assert len(recorded) == len(valid) <= 3
