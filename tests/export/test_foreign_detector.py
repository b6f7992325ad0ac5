"""Detectors made elsewhere, wrapped into the bundle's contract: every layout and input, bad and hostile files."""

import os

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from dendsam_deploy.errors import CheckpointError, InvalidArgumentError, UnsafeFileError
from dendsam_deploy.export.detector_layouts import OutputTensor, recognise_layout
from dendsam_deploy.export.foreign_detector import ForeignDetectorOptions, wrap_detector
from dendsam_deploy.export.parser_support import unsupported_nodes

TILE, INPUT = 96, 64
ANCHORS = 84  # of a 64 px input: 8 x 8 + 4 x 4 + 2 x 2
rng = np.random.default_rng(5)
CENTRES = rng.uniform(5, 60, (ANCHORS, 2))
SIZES = rng.uniform(4, 30, (ANCHORS, 2))
CORNERS = np.concatenate([CENTRES - SIZES / 2, CENTRES + SIZES / 2], axis=1).astype(np.float32)
SCORES = rng.permutation(np.linspace(0.05, 0.9, ANCHORS)).astype(np.float32)
TILES = np.stack([np.full((TILE, TILE), grey, np.uint8) for grey in (255, 51, 153)])


def dense_rows(classes, objectness=False):
    """Rows (xc, yc, w, h, [objectness,] class scores) whose best class has the known score."""
    parts = [CENTRES, SIZES]
    if objectness:
        parts.append(np.full((ANCHORS, 1), 0.5))
    best = np.zeros((ANCHORS, classes))
    best[np.arange(ANCHORS), np.arange(ANCHORS) % classes] = SCORES
    return np.concatenate([*parts, best], axis=1).astype(np.float32)


def selected_rows(count):
    return np.concatenate([CORNERS, SCORES[:, None], np.zeros((ANCHORS, 1), np.float32)], axis=1)[:count]


def network(body, tables, outputs, *, batch="b", opset=20, image="float", channels=3, size=INPUT, metadata=()):
    """A 'network' that multiplies the scores of fixed tables by the image's mean: enough to see that pixels arrive."""
    dims = ", ".join(str(n) for n in (batch, channels, size, size))
    text = f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        net ({image}[{dims}] images) => ({", ".join(outputs)}) {{
            light = ReduceMean <axes = [1, 2, 3], keepdims = 0> (images)
            {body}
        }}"""
    if opset >= 18:
        text = text.replace(
            "ReduceMean <axes = [1, 2, 3], keepdims = 0> (images)", "ReduceMean <keepdims = 0> (images, image_axes)"
        )
        tables = tables | {"image_axes": np.array([1, 2, 3])}
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in tables.items())
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return model


def dense_network(classes, *, channels_first=True, objectness=False, batch="b", image="float", **rest):
    """Multiply the score columns of a dense table by the light of each image."""
    rows = dense_rows(classes, objectness)
    weights = np.ones(rows.shape[1], np.float32)
    weights[5 if objectness else 4 :] = 0
    kind = np.float16 if image == "float16" else np.float32
    tables = {
        "fixed": (rows * weights)[None].astype(kind),
        "lit": (rows * (1 - weights))[None].astype(kind),
        "column": np.array([-1, 1, 1]),
    }
    shape = (
        [str(batch), str(rows.shape[1]), str(ANCHORS)]
        if channels_first
        else [str(batch), str(ANCHORS), str(rows.shape[1])]
    )
    body = """
        each = Reshape (light, column)
        scored = Mul (lit, each)
        table = Add (fixed, scored)
        """
    body += "output0 = Transpose <perm = [0, 2, 1]> (table)" if channels_first else "output0 = Identity (table)"
    return network(body, tables, [f"{image}[{', '.join(shape)}] output0"], batch=batch, image=image, **rest)


def selected_network(shape, *, batch="b", rows=20):
    body = """
        each = Reshape (light, column)
        scored = Mul (lit, each)
        table = Add (fixed, scored)
        """
    table = selected_rows(rows)
    score = np.eye(1, 6, 4, dtype=np.float32)
    tables = {"fixed": (table * (1 - score))[None], "lit": (table * score)[None], "column": np.array([-1, 1, 1])}
    if len(shape) == 2:
        body += "output = Squeeze (table, first)"
        tables["first"] = np.array([0])
    else:
        body += "output = Identity (table)"
    return network(body, tables, [f"float[{', '.join(map(str, shape))}] output"], batch=batch)


def counted_network(batch="b", valid=7, rows=20):
    body = """
        each = Reshape (light, column)
        det_scores = Mul (scores, each)
        by_image = Reshape (light, wide)
        none = Mul (by_image, zeros)
        det_boxes = Add (none, boxes)
        whole = Mul (each, zero)
        counted = Add (whole, valid)
        num_dets = Cast <to = 6> (counted)
        det_classes = Cast <to = 6> (det_scores)
        """
    tables = {
        "scores": SCORES[None, :rows],
        "boxes": CORNERS[None, :rows],
        "column": np.array([-1, 1]),
        "wide": np.array([-1, 1, 1]),
        "zeros": np.zeros((1, rows, 4), np.float32),
        "zero": np.zeros((1, 1), np.float32),
        "valid": np.full((1, 1), valid, np.float32),
    }
    outputs = [
        f"int32[{batch}, 1] num_dets",
        f"float[{batch}, {rows}, 4] det_boxes",
        f"float[{batch}, {rows}] det_scores",
        f"int32[{batch}, {rows}] det_classes",
    ]
    return network(body, tables, outputs, batch=batch)


def expected(count, rows=ANCHORS, factor=1.0, light=(1.0, 0.2, 0.6)):
    """Boxes in tile px and scores of the best rows for the three tiles."""
    order = np.argsort(-SCORES[:rows], kind="stable")[:count]
    boxes = np.clip(CORNERS[order] * (TILE / INPUT), 0, TILE)
    return np.stack([boxes] * 3), np.stack([SCORES[order] * factor * each for each in light])


def wrapped(model, tmp_path, **options):
    onnx.save(model, tmp_path / "model.onnx")
    found = wrap_detector(
        tmp_path / "model.onnx",
        tmp_path / "detector.onnx",
        ForeignDetectorOptions(**({"tile_size_px": TILE} | options)),
    )
    return found, run(tmp_path / "detector.onnx", TILES)


def run(path, tiles):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["boxes", "scores"], {"tiles": tiles})


NAMED = (("names", "{0: 'dendrite', 1: 'soma', 2: 'axon'}"),)
LAYOUTS = {
    "yolov8": (lambda batch: dense_network(3, batch=batch, metadata=NAMED), 1.0, ANCHORS),
    "yolov8 without names": (lambda batch: dense_network(1, batch=batch), 1.0, ANCHORS),
    "yolov5": (
        lambda batch: dense_network(3, channels_first=False, objectness=True, batch=batch, metadata=NAMED),
        0.5,
        ANCHORS,
    ),
    "yolov6, one class": (
        lambda batch: dense_network(1, channels_first=False, objectness=True, batch=batch),
        0.5,
        ANCHORS,
    ),
    "rows without objectness": (
        lambda batch: dense_network(3, channels_first=False, batch=batch, metadata=NAMED),
        1.0,
        ANCHORS,
    ),
    "end to end": (lambda batch: selected_network((batch, 20, 6), batch=batch), 1.0, 20),
}


@pytest.mark.parametrize("batch", ["b", 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_boxes(name, batch, tmp_path):
    make, factor, rows = LAYOUTS[name]
    found, (boxes, scores) = wrapped(make(batch), tmp_path)
    assert found.one_by_one == (batch == 1)
    want_boxes, want_scores = expected(found.candidates, rows, factor)
    np.testing.assert_allclose(scores, want_scores, atol=1e-5)
    np.testing.assert_allclose(boxes, want_boxes, atol=1e-4)
    # TensorRT knows uint8 at the door alone: tiles become numbers before they are moved, also in front of a loop.
    assert [line for line in unsupported_nodes(tmp_path / "detector.onnx") if "uint8" in line] == []


def test_a_graph_with_suppression_inside_that_takes_one_image(tmp_path):
    found, (boxes, scores) = wrapped(selected_network(("n", 6), batch=1), tmp_path)
    want_boxes, want_scores = expected(20, 20)
    assert boxes.shape == (3, found.candidates, 4)
    np.testing.assert_allclose(scores[:, :20], want_scores, atol=1e-5)
    np.testing.assert_allclose(boxes[:, :20], want_boxes, atol=1e-4)
    assert not scores[:, 20:].any()


@pytest.mark.parametrize("batch", ["b", 1])
def test_rows_beyond_the_count_score_nothing(batch, tmp_path):
    _, (boxes, scores) = wrapped(counted_network(batch), tmp_path)
    want_boxes, want_scores = expected(7, 7)
    np.testing.assert_allclose(scores[:, :7], want_scores, atol=1e-5)
    np.testing.assert_allclose(boxes[:, :7], want_boxes, atol=1e-4)
    assert not scores[:, 7:].any()


def test_half_precision_and_one_channel_and_old_operators(tmp_path):
    for model in (
        dense_network(3, image="float16", metadata=NAMED),
        dense_network(3, channels=1, metadata=NAMED),
        dense_network(3, opset=13, metadata=NAMED),
    ):
        _, (boxes, scores) = wrapped(model, tmp_path)
        want_boxes, want_scores = expected(boxes.shape[1])
        np.testing.assert_allclose(scores, want_scores, atol=2e-3)
        # Half precision knows coordinates near 64 px to 1/32 px, and can exchange neighbours of nearly the same score.
        assert np.quantile(np.abs(boxes - want_boxes), 0.9) < 0.05


def test_full_scale_is_a_choice(tmp_path):
    _, (_, scores) = wrapped(dense_network(3, metadata=NAMED), tmp_path, full_scale=0.5)
    np.testing.assert_allclose(scores[0], expected(scores.shape[1])[1][0] * 0.5, atol=1e-5)


def test_an_open_input_size_follows_the_record_then_the_option(tmp_path):
    model = dense_network(3, size="any", metadata=(*NAMED, ("imgsz", "[64, 64]")))
    found, (boxes, _) = wrapped(model, tmp_path)
    assert found.input_hw == (64, 64)
    np.testing.assert_allclose(boxes, expected(boxes.shape[1])[0], atol=1e-4)
    with pytest.raises(CheckpointError, match="fit no known layout"):  # a 128 px input has 336 anchors, not 84
        wrapped(model, tmp_path, input_size_px=128)
    with pytest.raises(InvalidArgumentError, match="fixed to 64 x 64 px, not 128"):
        wrapped(dense_network(3, metadata=NAMED), tmp_path, input_size_px=128)


def test_at_most_the_wanted_candidates(tmp_path):
    found, (boxes, scores) = wrapped(dense_network(3, metadata=NAMED), tmp_path, max_candidates=5)
    assert (found.candidates, boxes.shape, scores.shape) == (5, (3, 5, 4), (3, 5))
    np.testing.assert_allclose(scores, expected(5)[1], atol=1e-5)


def test_real_quantised_yolov8_finds_the_truck(shared_data, tmp_path):
    image = Image.open(shared_data / "images" / "truck.jpg").convert("L")
    for side in (640, 1024):
        found = wrap_detector(
            shared_data / "yolo" / "yolov8n_int8.onnx", tmp_path / f"{side}.onnx", ForeignDetectorOptions(side)
        )
        assert found.class_names[7] == "truck"
        height = round(side * image.height / image.width)
        tile = np.full((side, side), 114, np.uint8)
        top = (side - height) // 2
        tile[top : top + height] = np.array(image.resize((side, height), Image.Resampling.BILINEAR))
        boxes, scores = run(tmp_path / f"{side}.onnx", np.stack([np.zeros_like(tile), tile]))
        assert scores[0, 0] < 0.3
        assert scores[1, 0] == pytest.approx(0.92, abs=0.03)
        centre, size = np.array([325.9, 307.1]), np.array([574.8, 206.4])
        want = np.concatenate([centre - size / 2, centre + size / 2]) * side / 640
        assert np.abs(boxes[1, 0] - want).max() < 15 * side / 640


@pytest.mark.parametrize(
    ("shape", "classes", "problem"),
    [
        ((None, 84, 300), 80, "fit no known layout"),  # the anchors of no grid
        ((None, 300, 6), 3, None),
        ((None, 8400, 6), None, None),
        ((None, 8400, 6), 1, None),
        ((None, None, 6), 1, "fit 2 layouts"),
        ((None, 5000, 6), None, "fit no known layout"),
        ((None, 2, 3, 4), None, "fit no known layout"),
        ((1, 1000), None, "fit no known layout"),  # a classifier
    ],
)
def test_recognition_is_certain_or_refused(shape, classes, problem):
    outputs = (OutputTensor("out", shape),)
    if problem is None:
        recognise_layout(outputs, classes, (640, 640), "x.onnx")
        return
    with pytest.raises(CheckpointError, match=problem) as caught:
        recognise_layout(outputs, classes, (640, 640), "x.onnx")
    assert "out [" in str(caught.value)


def test_a_single_class_yolov5_is_not_taken_for_an_end_to_end_head():
    dense = recognise_layout((OutputTensor("out", (1, 25200, 6)),), None, (640, 640), "x")
    ended = recognise_layout((OutputTensor("out", (1, 300, 6)),), None, (640, 640), "x")
    assert (dense.kind, dense.has_objectness, ended.kind) == ("dense", True, "selected")


def bad_files(folder):
    """Files that are no detector, and what the message must say."""
    good = dense_network(3, metadata=NAMED)
    data = good.SerializeToString()
    custom = onnx.ModelProto()
    custom.CopyFrom(good)
    custom.graph.node[-1].domain = "com.microsoft"
    custom.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    two = onnx.ModelProto()
    two.CopyFrom(good)
    two.graph.input.append(helper.make_tensor_value_info("sizes", TensorProto.FLOAT, [1, 2]))
    contents = {
        "empty.onnx": (b"", "not an ONNX file"),
        "text.onnx": (b"hello, this is text\n" * 20, "not an ONNX file"),
        "cut.onnx": (data[: len(data) // 2], "not a"),
        "custom.onnx": (custom.SerializeToString(), "com.microsoft"),
        "two.onnx": (two.SerializeToString(), "expected one image"),
        "classes.onnx": (
            dense_network(3, metadata=(("names", "{0: 'a'}"),)).SerializeToString(),
            "fit no known layout",
        ),
        "eight.onnx": (dense_network(3, batch=8, metadata=NAMED).SerializeToString(), "fixed to 8"),
        "channels.onnx": (dense_network(3, channels=2, metadata=NAMED).SerializeToString(), "2 channels"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: message for name, (_, message) in contents.items()} | {"absent.onnx": "no such file"}


def test_files_that_are_no_detector_get_one_line(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(CheckpointError) as caught:
            wrap_detector(tmp_path / name, tmp_path / "out" / "x.onnx", ForeignDetectorOptions(TILE))
        assert message in str(caught.value)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def with_external_weights(folder, location):
    """A detector whose table lies in another file."""
    model = dense_network(3, metadata=NAMED)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "lit")
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path, raw


def test_weights_beside_the_graph_are_read(tmp_path):
    path, raw = with_external_weights(tmp_path, "weights.bin")
    with pytest.raises(CheckpointError, match=r"'weights\.bin' are missing"):
        wrap_detector(path, tmp_path / "out.onnx", ForeignDetectorOptions(TILE))
    (tmp_path / "weights.bin").write_bytes(raw)
    wrap_detector(path, tmp_path / "out.onnx", ForeignDetectorOptions(TILE))
    path.unlink()
    (tmp_path / "weights.bin").unlink()
    np.testing.assert_allclose(run(tmp_path / "out.onnx", TILES)[1], expected(72)[1], atol=1e-5)


@pytest.mark.parametrize("way", ["parent", "absolute", "symbolic link", "hard link"])
def test_weights_outside_the_folder_are_refused(way, tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret.bin"
    folder.mkdir()
    location = {"parent": "../secret.bin", "absolute": str(secret)}.get(way, "weights.bin")
    path, raw = with_external_weights(folder, location)
    secret.write_bytes(raw)
    if way == "symbolic link":
        (folder / "weights.bin").symlink_to(secret)
    elif way == "hard link":
        os.link(secret, folder / "weights.bin")
    with pytest.raises(UnsafeFileError, match="refused"):
        wrap_detector(path, tmp_path / "out.onnx", ForeignDetectorOptions(TILE))
    assert not (tmp_path / "out.onnx").exists()
