"""Exported graphs against segment-anything itself, and the checks that keep wrong graphs out."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402 - after the check for torch

import dendsam_deploy  # noqa: E402
from dendsam_deploy.bundle.bundle import Bundle  # noqa: E402
from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs  # noqa: E402
from dendsam_deploy.errors import BundleError, StorageError  # noqa: E402
from dendsam_deploy.export.graphs import GraphExport, check_graph, onnx_from_torch  # noqa: E402
from dendsam_deploy.models.box_decoder import BoxDecoderGraph  # noqa: E402
from dendsam_deploy.models.image_encoder import ImageEncoderGraph  # noqa: E402
from dendsam_deploy.models.reference import decode_boxes, encode_tiles  # noqa: E402
from dendsam_deploy.models.sam import build_sam  # noqa: E402
from dendsam_deploy.models.weights import load_sam  # noqa: E402
from dendsam_deploy.weights import PACKAGED_SAM  # noqa: E402

SIZE = 128


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(graph: onnxruntime.InferenceSession, **inputs: np.ndarray) -> list[np.ndarray]:
    return graph.run(None, inputs)


@pytest.fixture(scope="module")
def sam(exported):
    return load_sam(exported.sam).sam


@pytest.fixture(scope="module")
def encoder(exported):
    return open_graph(Bundle.open(exported.bundle).graph_path("encoder", "fp32"))


@pytest.fixture(scope="module")
def decoder(exported):
    return open_graph(Bundle.open(exported.bundle).graph_path("decoder", "fp32"))


def random_tiles(rng: np.random.Generator, sizes: np.ndarray, side: int) -> np.ndarray:
    """Smooth images; beyond the valid size lies rubbish that must not matter."""
    rows, columns = np.mgrid[0:side, 0:side]
    waves = [np.sin(rows / a) * np.cos(columns / b) for a, b in rng.uniform(3, 30, (len(sizes), 2))]
    return (127 + 120 * np.stack(waves)).astype(np.uint8)


def random_boxes(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    corners = np.sort(rng.uniform(0, side, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4).astype(np.float32)


@pytest.mark.parametrize("sizes", [[(128, 128)], [(128, 50), (3, 128), (77, 77)]])
def test_the_encoder_equals_segment_anything(sam, encoder, sizes):
    sizes = np.array(sizes)
    tiles = random_tiles(np.random.default_rng(1), sizes, SIZE)
    (embeddings,) = run(encoder, tiles=tiles, sizes=sizes)
    expected = encode_tiles(sam, torch.from_numpy(tiles), torch.from_numpy(sizes)).numpy()
    assert embeddings.shape == (len(sizes), 256, 8, 8)
    assert np.abs(embeddings - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("region", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 3, 17, 64])
def test_the_decoder_equals_segment_anything(sam, decoder, count, region):
    rng = np.random.default_rng(count)
    embeddings = rng.normal(size=(3, 256, 8, 8)).astype(np.float32)
    boxes, tile_index = random_boxes(rng, count, SIZE), rng.integers(0, 3, count)
    inputs = {"embeddings": embeddings, "boxes": boxes, "tile_index": tile_index}
    logits, origin, iou = run(decoder, **inputs, region=np.array([region]))
    expected, expected_iou = (t.numpy() for t in decode_boxes(sam, *(torch.from_numpy(a) for a in inputs.values())))
    assert logits.shape == (count, 4 * region, 4 * region)
    assert (origin % 4 == 0).all()
    cut = np.stack([expected[i, y : y + 4 * region, x : x + 4 * region] for i, (y, x) in enumerate(origin)])
    assert np.abs(logits - cut).max() <= 1e-3 * expected.std()
    assert np.abs(iou - expected_iou).max() <= 1e-4


def test_the_region_holds_the_centre_of_its_box(decoder):
    boxes = random_boxes(np.random.default_rng(5), 64, SIZE)
    inputs = {"embeddings": np.zeros((1, 256, 8, 8), np.float32), "tile_index": np.zeros(64, np.int64)}
    _, origin, _ = run(decoder, **inputs, boxes=boxes, region=np.array([3]))
    centre_yx = (boxes[:, [1, 0]] + boxes[:, [3, 2]]) / 2
    first_px, last_px = 4 * origin, 4 * origin + 3 * 16
    assert (first_px >= 0).all()
    assert (last_px <= SIZE).all()
    # At most half an embedding cell off centre, unless the border of the tile is in the way.
    off_centre = np.abs((first_px + last_px) / 2 - centre_yx)
    assert (off_centre[(first_px > 0) & (last_px < SIZE)] <= 8 + 1e-3).all()
    assert ((centre_yx >= first_px) & (centre_yx <= last_px)).all()


def test_no_boxes_are_legal(decoder):
    logits, origin, iou = run(
        decoder,
        embeddings=np.zeros((2, 256, 8, 8), np.float32),
        boxes=np.zeros((0, 4), np.float32),
        tile_index=np.zeros(0, np.int64),
        region=np.array([4]),
    )
    assert (logits.shape, origin.shape, iou.shape) == ((0, 16, 16), (0, 2), (0,))


@pytest.mark.parametrize("role", ["encoder", "decoder", "detector"])
def test_the_files_keep_the_contract(exported, role):
    path = Bundle.open(exported.bundle).graph_path(role, "fp32")
    model = onnx.load(path)
    assert (model.ir_version, [(entry.domain, entry.version) for entry in model.opset_import]) == (10, [("", 20)])
    for values, specs in (
        (model.graph.input, graph_inputs(role, SIZE)),
        (model.graph.output, graph_outputs(role, SIZE)),
    ):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            assert tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim) == spec.shape
    # Neither source lines nor the paths of this machine.
    assert str(Path(dendsam_deploy.__file__).parent).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


def assert_equals_segment_anything(sam, folder: Path, calls: list[tuple[int, int]]) -> None:
    """Export a SAM and compare it with itself on one padded tile, for several pairs (boxes, region)."""
    rng = np.random.default_rng(2)
    side = sam.image_encoder.img_size
    sizes = np.array([(side, side * 7 // 8)])
    tiles = random_tiles(rng, sizes, side)
    onnx_from_torch(ImageEncoderGraph(sam), GraphExport("encoder", side), folder / "encoder.onnx")
    (embeddings,) = run(open_graph(folder / "encoder.onnx"), tiles=tiles, sizes=sizes)
    expected = encode_tiles(sam, torch.from_numpy(tiles), torch.from_numpy(sizes)).numpy()
    assert np.abs(embeddings - expected).max() <= 1e-4 * np.abs(expected).max()

    onnx_from_torch(BoxDecoderGraph(sam), GraphExport("decoder", side), folder / "decoder.onnx")
    decoder = open_graph(folder / "decoder.onnx")
    for count, region in calls:
        boxes, tile_index = random_boxes(rng, count, side), np.zeros(count, np.int64)
        inputs = {"embeddings": expected, "boxes": boxes, "tile_index": tile_index}
        logits, origin, iou = run(decoder, **inputs, region=np.array([region]))
        whole, whole_iou = (t.numpy() for t in decode_boxes(sam, *(torch.from_numpy(a) for a in inputs.values())))
        cut = np.stack([whole[i, y : y + 4 * region, x : x + 4 * region] for i, (y, x) in enumerate(origin)])
        assert np.abs(logits - cut).max() <= 1e-3 * whole.std()
        assert np.abs(iou - whole_iou).max() <= 1e-4


@pytest.mark.slow
def test_vit_b_equals_segment_anything(tmp_path: Path):
    torch.manual_seed(2)
    assert_equals_segment_anything(build_sam("vit_b"), tmp_path, [(1, 64), (3, 64), (17, 16), (64, 8)])


@pytest.mark.slow
def test_trained_weights_equal_segment_anything(tmp_path: Path):
    sam = load_sam(PACKAGED_SAM).sam
    cells = sam.image_encoder.img_size // 16
    assert_equals_segment_anything(sam, tmp_path, [(1, cells), (3, cells), (17, 8), (64, 8)])


class ToyEncoder(nn.Module):
    """Keeps the encoder's contract and has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4096.0).reshape(1, 256, 4, 4))

    def forward(self, tiles, sizes):
        scale = tiles.float().mean(dim=(1, 2)) * sizes.sum(dim=1)
        return scale[:, None, None, None] * self.weight


TOY = GraphExport("encoder", 64)


def test_large_weights_go_to_a_second_file(tmp_path: Path):
    spec = onnx_from_torch(ToyEncoder(), GraphExport("encoder", 64, external_above_bytes=1000), tmp_path / "toy.onnx")
    assert [file.file for file in spec.files] == ["toy.onnx", "toy.onnx.data"]
    assert spec.files[1].size == 4096 * 4
    assert spec.files[0].size < 4096
    inline = onnx_from_torch(ToyEncoder(), TOY, tmp_path / "inline.onnx")
    assert len(inline.files) == 1
    inputs = {"tiles": np.full((1, 64, 64), 3, np.uint8), "sizes": np.array([[64, 64]])}
    outputs = [run(open_graph(tmp_path / name), **inputs)[0] for name in ("toy.onnx", "inline.onnx")]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_allclose(outputs[0].ravel(), 384 * np.arange(4096.0))


def test_the_same_weights_give_the_same_bytes(tmp_path: Path):
    first = onnx_from_torch(ToyEncoder(), TOY, tmp_path / "graph.onnx")
    assert onnx_from_torch(ToyEncoder(), TOY, tmp_path / "graph.onnx").files == first.files


def test_a_refused_write_is_one_clear_line(tmp_path: Path):
    with pytest.raises(StorageError, match="cannot be written"):
        onnx_from_torch(ToyEncoder(), TOY, tmp_path / "absent" / "graph.onnx")


class Undecided(ToyEncoder):
    """Its operations depend on the values of its input, which a graph cannot express."""

    def forward(self, tiles, sizes):
        return super().forward(tiles, sizes) if tiles.float().mean() > 3 else self.weight


def test_a_module_that_is_no_graph_is_named(tmp_path: Path):
    with pytest.raises(BundleError, match=r"the encoder \(Undecided\) cannot be written as ONNX"):
        onnx_from_torch(Undecided(), TOY, tmp_path / "graph.onnx")


def test_a_batch_that_is_baked_in_is_refused(tmp_path: Path):
    onnx_from_torch(ToyEncoder(), TOY, tmp_path / "graph.onnx")
    model = onnx.load(tmp_path / "graph.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "graph.onnx")
    with pytest.raises(BundleError, match=r"tiles uint8\[2, 64, 64\].*expected tiles uint8\['tiles', 64, 64\]"):
        check_graph(tmp_path / "graph.onnx", TOY)


def encoder_model(nodes: list[onnx.NodeProto], domain: str = "") -> onnx.ModelProto:
    """A graph with the encoder's signature around some nodes that make `embeddings`."""
    uint8, int64, float32 = onnx.TensorProto.UINT8, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info("tiles", uint8, ["b", 64, 64]),
        helper.make_tensor_value_info("sizes", int64, ["b", 2]),
    ]
    outputs = [helper.make_tensor_value_info("embeddings", float32, ["b", 256, 4, 4])]
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=opsets, ir_version=10)


def test_operators_of_one_engine_are_refused_wherever_they_hide(tmp_path: Path):
    foreign = helper.make_node("BiasGelu", ["tiles"], ["embeddings"], domain="com.microsoft")
    onnx.save(encoder_model([foreign], "com.microsoft"), tmp_path / "graph.onnx")
    with pytest.raises(BundleError, match=r"not ONNX's own \(com\.microsoft\.BiasGelu\)"):
        check_graph(tmp_path / "graph.onnx", TOY)
    branch = helper.make_graph([foreign], "branch", [], [helper.make_empty_tensor_value_info("embeddings")])
    condition = helper.make_node(
        "Constant", [], ["c"], value=helper.make_tensor("v", onnx.TensorProto.BOOL, [], [True])
    )
    choice = helper.make_node("If", ["c"], ["embeddings"], then_branch=branch, else_branch=branch)
    onnx.save(encoder_model([condition, choice], "com.microsoft"), tmp_path / "graph.onnx")
    with pytest.raises(BundleError, match=r"com\.microsoft\.BiasGelu"):
        check_graph(tmp_path / "graph.onnx", TOY)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x08\x0a"])
def test_what_is_no_graph_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"graph\.onnx: not a valid ONNX graph"):
        check_graph(tmp_path / "graph.onnx", TOY)


def test_another_role_is_refused(exported):
    path = Bundle.open(exported.bundle).graph_path("detector", "fp32")
    with pytest.raises(BundleError, match="has the tensors tiles uint8"):
        check_graph(path, GraphExport("encoder", SIZE))
