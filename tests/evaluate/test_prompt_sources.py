"""Prompts from every source: where clicks are set, how they are decoded, and what is judged."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))

from synthetic_session import draw_discs, make_manifest, make_session

from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs
from dendsam_deploy.bundle.manifest import GraphSpec
from dendsam_deploy.evaluate.grid_choice import PREDICTED_IOUS, STABILITIES, best_grid
from dendsam_deploy.evaluate.point_grid import GridOptions
from dendsam_deploy.evaluate.point_prompts import (
    Clicks,
    correcting_click,
    decode_clicks,
    first_clicks,
    innermost_pixel,
    mask_boxes,
)
from dendsam_deploy.evaluate.prompt_sources import SOURCES, Bench, SourceOptions, read_true_slice
from dendsam_deploy.geometry import Frame, tile_grid
from dendsam_deploy.metrics.summary import ObjectScores
from dendsam_deploy.pipeline.decode import Embeddings
from dendsam_deploy.pipeline.prepare import TilePlan
from dendsam_deploy.pipeline.segment import SliceOptions, make_recipe, segment_slice
from dendsam_deploy.runtimes.runner import CallableRunner

TILE = 64
DISCS = [(24, 20, 9), (70, 80, 11), (30, 70, 6)]
SHAPE = (96, 110)


def disc_labels(discs=DISCS):
    labels = np.zeros(SHAPE, np.uint32)
    for number, disc in enumerate(discs, start=1):
        labels[draw_discs(SHAPE, [disc]) > 0] = number
    return labels


def decode_discs(inputs):
    """Discs around the first point, of radius 11 for several and 5, 9, 14 for one; a point beside halves the radius."""
    count, side = len(inputs["points"]), TILE // 4
    y, x = ((np.arange(side) + 0.5) * 4 for _ in range(2))
    logits = np.zeros((count, 4, side, side), np.float32)
    for row, (points, labels) in enumerate(zip(inputs["points"], inputs["labels"], strict=True)):
        distance = np.hypot(y[:, None] - points[0, 1] - 0.5, x[None] - points[0, 0] - 0.5)
        for mask, radius in enumerate((11, 5, 9, 14)):
            logits[row, mask] = radius / (2 if (labels == 0).any() else 1) - distance
    return {"logits": logits, "iou": np.tile(np.array([0.95, 0.5, 0.9, 0.7], np.float32), (count, 1))}


@pytest.fixture
def bench():
    manifest = make_manifest(TILE)
    session = make_session(manifest)
    spec = GraphSpec("points", "fp32", 17, (), graph_inputs("points", TILE), graph_outputs("points", TILE))
    object.__setattr__(session, "points", CallableRunner(spec, decode_discs))
    truth = read_true_slice(4, draw_discs(SHAPE, DISCS), disc_labels(), (), 12)
    return Bench.of_slice(session, make_recipe(SHAPE, manifest, SliceOptions()), truth)


def test_the_innermost_pixel():
    mask = np.zeros((9, 12), bool)
    mask[1:8, 1:8], mask[4, 8:] = True, True
    assert innermost_pixel(mask) == (4, 4)
    assert innermost_pixel(np.ones((3, 5), bool)) == (1, 1)  # the border of the window counts; the first of equals
    ring = np.hypot(*np.mgrid[-8:9, -8:9]) < 8
    ring[6:11, 6:11] = False
    assert ring[innermost_pixel(ring)], "a person clicks on the object, not into its hole"


def test_the_correcting_click_goes_where_the_mask_is_most_wrong():
    wanted, found = np.zeros((2, 20, 30), bool)
    wanted[5:15, 5:15] = True
    found[5:15, 8:15], found[2:4, 20:23] = True, True
    assert correcting_click(wanted, found) == ((6, 6), 1)  # 30 px are missing, 6 px are too many
    found[2:18, 20:26] = True
    (y, x), label = correcting_click(wanted, found)
    assert label == 0
    assert found[y, x]
    assert not wanted[y, x]
    assert correcting_click(wanted, wanted) is None
    assert correcting_click(np.zeros((4, 4), bool), np.zeros((4, 4), bool)) is None


def test_errors_that_touch_at_a_corner_are_one():
    wanted = np.zeros((8, 8), bool)
    wanted[:3, :3], wanted[3:6, 3:6], wanted[0, 4:8], wanted[1, 4:8], wanted[2, 6:8] = True, True, True, True, True
    (y, x), _ = correcting_click(wanted, np.zeros((8, 8), bool))
    assert (y, x) in {(1, 1), (4, 4)}


def test_first_clicks_lie_inside_their_objects_and_go_to_the_tile_that_owns_them():
    labels = disc_labels().astype(np.int32)
    frame = Frame(SHAPE, SHAPE)
    plan = TilePlan(frame, tuple(tile_grid(SHAPE, TILE, 24)), TILE)
    clicks = first_clicks(labels, [1, 2, 3], plan)
    for number, ((x, y),), tile in zip((1, 2, 3), clicks.points_xy.tolist(), clicks.tile_index.tolist(), strict=True):
        assert labels[int(y), int(x)] == number
        own = plan.tiles[tile].own
        assert own.y0 <= y < own.y1
        assert own.x0 <= x < own.x1
        cy, cx, _ = DISCS[number - 1]
        assert np.hypot(y - cy, x - cx) <= 1.5
    assert (clicks.labels == 1).all()


def test_clicks_are_decoded_as_segment_anything_does():
    torch = pytest.importorskip("torch")
    from segment_anything import SamPredictor  # noqa: PLC0415 - after the check for torch

    from dendsam_deploy.models.point_decoder import PointDecoderGraph  # noqa: PLC0415
    from dendsam_deploy.models.sam import build_sam  # noqa: PLC0415

    torch.manual_seed(1)
    sam = build_sam("tiny", 128).eval()
    graph = PointDecoderGraph(sam)

    @torch.no_grad()
    def decode(inputs):
        names = ("embeddings", "points", "labels", "tile_index")
        logits, iou = graph(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in names))
        return {"logits": logits.numpy(), "iou": iou.numpy()}

    spec = GraphSpec("points", "fp32", 0, (), graph_inputs("points", 128), graph_outputs("points", 128))
    tiles = tuple(tile_grid((128, 200), 128, 32))
    plan = TilePlan(Frame((128, 200), (128, 200)), tiles, 128)
    values = torch.randn(2, 256, 8, 8)
    pixels = np.array([[[30, 40], [10, 90]], [[190, 5], [120, 77]], [[70, 70], [71, 70]]])
    labels = np.array([[1, 0], [1, 1], [0, 1]])
    tile_index = np.array([0, 1, 0])
    clicks = Clicks((pixels + 0.5).astype(np.float32), labels, tile_index)
    embeddings, runner = Embeddings(values.numpy(), np.arange(2)), CallableRunner(spec, decode)
    found = decode_clicks(clicks, embeddings, runner, plan)
    first = Clicks(clicks.points_xy[:, :1], labels[:, :1], tile_index)
    single = decode_clicks(first, embeddings, runner, plan)
    predictor = SamPredictor(sam)
    predictor.original_size = predictor.input_size = (128, 128)
    predictor.is_image_set = True
    for row, tile in enumerate(tile_index.tolist()):
        predictor.features = values[tile : tile + 1]
        inside = pixels[row] - [tiles[tile].read.x0, tiles[tile].read.y0]
        for count, masks in ((2, found), (1, single)):
            _, iou, logits = predictor.predict(
                inside[:count].astype(float), labels[row][:count], multimask_output=count == 1
            )
            np.testing.assert_allclose(masks.logits[row], logits[iou.argmax()], atol=1e-3 * logits.std())
            assert masks.predicted_iou[row] == pytest.approx(iou.max(), abs=1e-5)


def test_boxes_of_masks_are_exact_to_a_cell(bench):
    clicks = first_clicks(bench.truth.components, [1, 2, 3], bench.recipe.plan)
    masks = decode_clicks(clicks, bench.embeddings, bench.session.points, bench.recipe.plan)
    for box, ((x, y),) in zip(mask_boxes(masks, bench.recipe.plan, 0.0), clicks.points_xy, strict=True):
        assert np.abs(box - [x - 9, y - 9, x + 9, y + 9]).max() <= 4


def test_boxes_of_the_truth_find_every_object(bench):
    result = SOURCES["truth_box"](bench, SourceOptions())
    for number in (1, 2, 3):
        inside = bench.truth.components == number
        (label,) = np.unique(result.labels[inside & (result.labels > 0)])
        mask = result.labels == label
        assert (mask & inside).sum() / (mask | inside).sum() > 0.75
    assert result.seconds > 0


def test_the_detector_row_is_what_segment_makes(bench):
    result = SOURCES["detector_box"](bench, SourceOptions())
    labels, _ = segment_slice(bench.truth.image, bench.session, None, SliceOptions())
    np.testing.assert_array_equal(result.labels, labels)
    assert len(result.detections) >= 3


def test_one_click_takes_the_mask_of_the_highest_predicted_iou(bench):
    labels = SOURCES["truth_point"](bench, SourceOptions()).labels
    for number in (1, 2, 3):
        inside = bench.truth.components == number
        area = np.count_nonzero(labels == labels[innermost_pixel(inside)])
        assert area == pytest.approx(np.pi * 81, rel=0.15), "radius 9, the second of the three masks"


def test_further_clicks_answer_to_the_last_mask(bench):
    """Object 3 has radius 6, its first mask radius 9: the second click is beside it, which halves the radius."""
    calls = []

    def spy(inputs):
        calls.append({name: value.copy() for name, value in inputs.items() if name != "embeddings"})
        return decode_discs(inputs)

    runner = CallableRunner(bench.session.points.spec, spy)
    object.__setattr__(bench.session, "points", runner)
    SOURCES["truth_points"](bench, SourceOptions(points=2))
    by_length = {}
    for call in calls:
        for labels in call["labels"].tolist():
            by_length.setdefault(len(labels), []).append(labels)
    assert by_length[1] == [[1]] * 3
    assert [1, 0] in by_length[2], "the mask of object 3 was too large"
    assert [1, 1] in by_length[2], "the mask of object 2 was too small"


def test_grid_and_boxes_are_painted_alike(bench):
    result = SOURCES["point_grid"](bench, SourceOptions(grid=GridOptions(8, 0.8, 0.5)))
    assert result.grid.points == 12 * 14  # 8 px apart; tiles share the slice
    assert result.grid.masks == 3 * result.grid.points
    assert result.grid.confident == result.grid.points, "one of three masks says .9"
    assert 0 < len(np.unique(result.labels)) - 1 <= result.grid.distinct
    nothing = SOURCES["point_grid"](bench, SourceOptions(grid=GridOptions(8, 0.95, 0.5)))
    assert not nothing.labels.any()
    assert nothing.grid.highest_iou == pytest.approx(0.9)


def shared_pixels(truth, labels):
    """Return a score in which the size of masks matters: the IoU of all foreground."""
    found, true = labels > 0, truth.components > 0
    iou = (found & true).sum() / (found | true).sum()
    return ObjectScores(**{field.name: float(iou) for field in fields(ObjectScores)})


@pytest.mark.parametrize(("iou", "stability"), [(None, None), (0.6, None), (None, 0.7)])
def test_the_best_thresholds_are_those_that_trying_all_would_find(bench, iou, stability):
    options, best = GridOptions(8, nms_iou=0.5), None
    for predicted in PREDICTED_IOUS if iou is None else (iou,):
        for steady in STABILITIES if stability is None else (stability,):
            result = SOURCES["point_grid"](bench, SourceOptions(grid=GridOptions(8, predicted, steady, nms_iou=0.5)))
            score = shared_pixels(bench.truth, result.labels).s_inst
            if best is None or score >= best[0]:
                best = score, predicted, steady
    found = best_grid([bench, bench], options, (iou, stability), shared_pixels)
    assert best[0] > 0
    assert (found.predicted_iou, found.stability) == best[1:]
    assert (found.points_per_side, found.nms_iou) == (8, 0.5)


def test_what_is_not_judged_is_neither_prompted():
    labels = disc_labels()
    labels[0, :2] = 9  # a speck
    truth = read_true_slice(0, np.zeros(SHAPE, np.uint8), labels, (2,), 12)
    assert len(truth.boxes_xyxy) == 2
    of = {int(labels[truth.components == number][0]) for number in truth.void}
    assert of == {2, 9}
    assert 0 in read_true_slice(0, np.zeros(SHAPE, np.uint8), labels, (0,), 1).void


def test_pieces_of_one_label_are_prompted_apart():
    labels = np.where(disc_labels() > 0, 5, 0).astype(np.uint32)
    truth = read_true_slice(0, np.zeros(SHAPE, np.uint8), labels, (), 1)
    assert len(truth.boxes_xyxy) == len(truth.boxes) == 3


def test_a_slice_without_objects_is_no_problem(bench):
    empty = read_true_slice(0, np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint32), (), 1)
    nothing = Bench.of_slice(bench.session, bench.recipe, empty)
    for name in ("truth_box", "truth_point", "truth_points", "detector_box"):
        assert not SOURCES[name](nothing, SourceOptions()).labels.any()
