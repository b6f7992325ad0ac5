"""Counted operations, against torch's own counter on the original modules, and against arithmetic by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import onnx
import onnx.parser
import pytest

from dendsam_deploy.errors import InputFileError
from dendsam_deploy.evaluate.operations import (
    graph_flop,
    node_flop,
    reference_encoder_flop,
    useful_encoder_flop,
)
from dendsam_deploy.models.architectures import ENCODER_SHAPES, EncoderShape
from dendsam_deploy.runtimes.portable_trace import NodeRun, trace_nodes


def counted_by_torch(shape: EncoderShape, image_size: int) -> int:
    """Let torch count while segment_anything's encoder runs; without memory or arithmetic, on the meta device."""
    torch = pytest.importorskip("torch")
    from segment_anything.modeling import ImageEncoderViT  # noqa: PLC0415 - behind the check above
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder = ImageEncoderViT(
            img_size=image_size,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            out_chans=256,
            use_rel_pos=True,
            window_size=shape.window,
            global_attn_indexes=shape.global_blocks,
        )
        encoder(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops()


@pytest.mark.parametrize(("model", "image_size"), [("vit_b", 320), ("vit_l", 224), ("vit_h", 128), ("tiny", 512)])
def test_the_reference_count_is_that_of_torch(model, image_size) -> None:
    shape = ENCODER_SHAPES[model]
    assert reference_encoder_flop(shape, image_size) == counted_by_torch(shape, image_size)


def test_the_reference_count_is_the_one_that_is_quoted() -> None:
    assert reference_encoder_flop(ENCODER_SHAPES["vit_b"], 1024) == pytest.approx(972e9, rel=0.005)
    assert reference_encoder_flop(ENCODER_SHAPES["vit_h"], 1024) == pytest.approx(5961e9, rel=0.005)


def test_useful_leaves_out_padding_and_equal_channels_only() -> None:
    shape = ENCODER_SHAPES["vit_b"]
    # 14 tokens fill one window: nothing is padded, and two of three channels are what is saved.
    channels = 2 * 14**2 * shape.width * 2 * 256
    assert reference_encoder_flop(shape, 224) - useful_encoder_flop(shape, 224) == channels
    assert useful_encoder_flop(shape, 1024) < reference_encoder_flop(shape, 1024)


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs", "flop"),
    [
        ("MatMul", [(3, 4), (4, 5)], [(3, 5)], 2 * 3 * 4 * 5),
        ("MatMul", [(7, 2, 3, 4), (4, 5)], [(7, 2, 3, 5)], 2 * 14 * 3 * 4 * 5),
        ("MatMul", [(0, 3, 4), (0, 4, 5)], [(0, 3, 5)], 0),
        ("Gemm", [(3, 4), (4, 5), (5,)], [(3, 5)], 2 * 3 * 4 * 5),
        ("Gemm", [(4, 3), (4, 5)], [(3, 5)], 2 * 3 * 4 * 5),
        ("Conv", [(1, 6, 9, 9), (8, 3, 3, 3)], [(1, 8, 7, 7)], 2 * 8 * 49 * 27),
        ("ConvTranspose", [(1, 6, 9, 9), (6, 8, 2, 2)], [(1, 8, 18, 18)], 2 * 6 * 81 * 32),
        ("QLinearConv", [(1, 6, 9, 9), (), (), (8, 6, 1, 1)], [(1, 8, 9, 9)], 2 * 8 * 81 * 6),
        ("Softmax", [(3, 4)], [(3, 4)], 0),
        ("Einsum", [(3, 4), (4, 5)], [(3, 5)], None),
    ],
)
def test_operations_of_one_operator(operator, inputs, outputs, flop) -> None:
    assert node_flop(NodeRun(operator, tuple(inputs), tuple(outputs))) == flop


def save(path, text, **weights):
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.save(model, path)
    return path


def test_a_graph_is_counted_with_the_weights_that_its_kernels_rearrange(tmp_path) -> None:
    rng = np.random.default_rng(0)
    path = save(
        tmp_path / "g.onnx",
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[b, 6, 9, 9] x) => (float[b, 8, m, m] z) {
            y = Conv <group = 2> (x, w)
            z = MatMul (y, v)
        }""",
        w=rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        v=rng.standard_normal((7, 7)).astype(np.float32),
    )
    x = np.zeros((2, 6, 9, 9), np.float32)
    assert graph_flop(path, {"x": x}) == 2 * 2 * (8 * 49 * 27 + 8 * 49 * 7)
    assert [node.operator for node in trace_nodes(path, {"x": x})] == ["Conv", "MatMul"]


def test_a_loop_counts_as_often_as_it_runs(tmp_path) -> None:
    path = save(
        tmp_path / "loop.onnx",
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (int64 trips, float[4, 4] x) => (float[4, 4] y) {
            go = Constant <value: tensor = bool {1}> ()
            y = Loop (trips, go, x) <body = step (int64 i, bool c, float[4, 4] a) => (bool d, float[4, 4] p) {
                d = Identity (c)
                p = MatMul (a, a)
            }>
        }""",
    )
    x = np.eye(4, dtype=np.float32)
    assert graph_flop(path, {"trips": np.array(5), "x": x}) == 5 * 2 * 64


def test_what_hides_its_products_is_not_guessed(tmp_path) -> None:
    path = save(
        tmp_path / "e.onnx",
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[3, 4] x) => (float[3, 3] y) { y = Einsum <equation = "ij,kj->ik"> (x, x) }""",
    )
    assert graph_flop(path, {"x": np.zeros((3, 4), np.float32)}) is None


def test_what_is_no_graph_is_named(tmp_path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no")
    with pytest.raises(InputFileError, match=r"no\.onnx: ONNX Runtime cannot trace"):
        graph_flop(tmp_path / "no.onnx", {})


def test_an_exported_detector_needs_what_its_network_needs(exported) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 - behind the check above

    from dendsam_deploy.bundle.bundle import Bundle  # noqa: PLC0415
    from dendsam_deploy.models.detector import load_detector  # noqa: PLC0415

    bundle = Bundle.open(exported.bundle)
    size = bundle.manifest.preprocessing.tile_size_px
    network = load_detector(exported.detector).network
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    found = graph_flop(bundle.graph_path("detector", "fp32"), {"tiles": np.zeros((1, size, size), np.uint8)})
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert not math.isclose(found, 0)
