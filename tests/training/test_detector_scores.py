"""Scores of boxes against examples worked by hand and against a plain reading of COCO's rules."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dendsam_deploy.instances import Detections
from dendsam_deploy.training.detector_scores import IOU_LEVELS, JudgedBoxes, score_boxes, tile_f1


def tile(truth, found, scores=None) -> JudgedBoxes:
    boxes = np.array(found, np.float32).reshape(-1, 4)
    scores = np.array(scores if scores is not None else np.linspace(0.9, 0.5, len(boxes)), np.float32)
    return JudgedBoxes(np.array(truth, np.float32).reshape(-1, 4), Detections(boxes, scores))


SMALL, MEDIUM, LARGE = (0, 0, 20, 20), (100, 0, 150, 50), (200, 200, 320, 320)


def test_perfect_boxes_score_one_in_every_class():
    overall, classes = score_boxes([tile([SMALL, MEDIUM, LARGE], [SMALL, MEDIUM, LARGE])])
    assert (overall.precision, overall.recall, overall.map50, overall.map50_95) == (1, 1, 1, 1)
    assert [(entry.name, entry.objects, entry.map50, entry.recall) for entry in classes] == [
        ("small", 1, 1, 1),
        ("medium", 1, 1, 1),
        ("large", 1, 1, 1),
    ]


def test_average_precision_of_a_wrong_box_between_two_right_ones():
    """Recall .5 with precision 1, then recall 1 with precision 2/3: 51 levels at 1 and 50 at 2/3."""
    wrong = (400, 400, 450, 450)
    overall, _ = score_boxes([tile([SMALL, MEDIUM], [SMALL, wrong, MEDIUM], [0.9, 0.8, 0.7])])
    assert overall.map50 == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert overall.map50_95 == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_levels_of_overlap_are_told_apart():
    """A box of IoU 0.72 is right at .50 to .70, five of ten levels."""
    overall, _ = score_boxes([tile([(0, 0, 100, 100)], [(0, 0, 72, 100)])])
    assert (overall.map50, overall.map50_95) == (1, pytest.approx(0.5))


def test_a_second_box_on_one_object_is_wrong():
    overall, _ = score_boxes([tile([MEDIUM], [MEDIUM, MEDIUM], [0.9, 0.8])])
    assert (overall.recall, overall.map50) == (1, 1)
    assert tile_f1(tile([MEDIUM], [MEDIUM, MEDIUM], [0.9, 0.8]), 0.5) == pytest.approx(2 / 3)


def test_objects_of_other_sizes_neither_help_nor_harm():
    """Of three detections one is right for a small, one for a medium object; the third is wrong and of medium size."""
    stray = (300, 0, 350, 50)
    _, (small, medium, large) = score_boxes([tile([SMALL, MEDIUM], [MEDIUM, stray, SMALL], [0.9, 0.8, 0.7])])
    assert (small.objects, small.recall, small.precision, small.map50) == (1, 1, 1, 1)
    assert (medium.objects, medium.recall, medium.precision, medium.map50) == (1, 1, 0.5, 1)
    assert large.objects == 0
    assert all(math.isnan(value) for value in (large.recall, large.precision, large.map50, large.map50_95))


def test_tiles_without_anything():
    nothing = tile([], [])
    overall, classes = score_boxes([nothing, nothing])
    assert math.isnan(overall.map50)
    assert math.isnan(overall.precision)
    assert overall.score_threshold == 0.25
    assert all(entry.objects == 0 for entry in classes)
    assert tile_f1(nothing, 0.5) == 1
    assert tile_f1(tile([MEDIUM], []), 0.5) == 0
    missed, _ = score_boxes([tile([MEDIUM], []), tile([], [MEDIUM])])
    assert (missed.recall, missed.map50) == (0, 0)


def test_the_threshold_separates_right_from_wrong():
    rng = np.random.default_rng(0)
    grid = [(60 * x, 60 * y, 60 * x + 40, 60 * y + 40) for y in range(6) for x in range(6)]
    strays = [(x0 + 400, y0, x1 + 400, y1) for x0, y0, x1, y1 in grid]
    scores = np.concatenate([rng.uniform(0.5, 0.9, 36), rng.uniform(0.01, 0.35, 36)])
    overall, _ = score_boxes([tile(grid, grid + strays, scores)])
    assert 0.35 < overall.score_threshold < 0.5
    assert (overall.precision, overall.recall) == (1, 1)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def plain_average_precision(tiles, least, most, level):
    """Read COCO's rules off line by line, with loops."""
    entries, objects = [], 0
    for truth, found in tiles:
        sizes = [math.sqrt((b[2] - b[0]) * (b[3] - b[1])) for b in truth]
        counts = [least <= size < most for size in sizes]
        objects += sum(counts)
        taken = set()
        for row in sorted(range(len(found.scores)), key=lambda row: -found.scores[row]):
            box = found.boxes_xyxy[row]
            for kind in (True, False):
                fitting = [(iou(box, b), k) for k, b in enumerate(truth) if counts[k] == kind and k not in taken]
                fitting = [entry for entry in fitting if entry[0] >= level]
                if fitting:
                    taken.add(max(fitting)[1])
                    if kind:
                        entries.append((found.scores[row], 1))
                    break
            else:
                size = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
                if least <= size < most:
                    entries.append((found.scores[row], 0))
    if not objects:
        return math.nan
    entries.sort(key=lambda entry: -entry[0])
    points, right = [], 0
    for count, (_, hit) in enumerate(entries, start=1):
        right += hit
        points.append((right / objects, right / count))
    levels = [max([p for r, p in points if r >= wanted / 100 - 1e-12], default=0.0) for wanted in range(101)]
    return sum(levels) / 101


@pytest.mark.parametrize("seed", range(4))
def test_random_boxes_agree_with_the_plain_reading(seed):
    rng = np.random.default_rng(seed)
    tiles = []
    for _ in range(3):
        corner, side = rng.uniform(0, 400, (12, 2)), rng.uniform(10, 130, (12, 2))
        truth = np.concatenate([corner, corner + side], axis=1)
        found = np.concatenate([truth[:9] + rng.normal(0, 6, (9, 4)), truth[3:7] + rng.normal(0, 14, (4, 4))])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 2)
        tiles.append(tile(truth, found, rng.permutation(np.linspace(0.1, 0.9, 13))))
    overall, classes = score_boxes(tiles)
    ranges = [(0, math.inf, overall), *((entry.least_px, entry.most_px, entry) for entry in classes)]
    for least, most, scores in ranges:
        values = [plain_average_precision(tiles, least, most, level) for level in IOU_LEVELS]
        assert scores.map50 == pytest.approx(values[0], nan_ok=True)
        assert scores.map50_95 == pytest.approx(np.mean(values), nan_ok=True)


@pytest.mark.parametrize("seed", range(2))
def test_scores_are_those_of_the_coco_tools(seed):
    tools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval  # noqa: PLC0415 - behind the check above

    rng = np.random.default_rng([7, seed])
    tiles = []
    for _ in range(4):
        corner, side = rng.uniform(0, 400, (40, 2)), rng.uniform(8, 140, (40, 2))
        truth = np.concatenate([corner, corner + side], axis=1)
        found = np.concatenate([truth[:34] + rng.normal(0, 5, (34, 4)), truth[10:20] + rng.normal(0, 15, (10, 4))])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 2)
        tiles.append(tile(truth, found, rng.permutation(np.linspace(0.05, 0.95, 44))))
    truth, found = tools.COCO(), []
    truth.dataset = {"images": [], "annotations": [], "categories": [{"id": 1}], "info": {}}
    for number, (boxes, detections) in enumerate(tiles):
        truth.dataset["images"].append({"id": number})
        for x0, y0, x1, y1 in boxes.tolist():
            sides = x1 - x0, y1 - y0
            truth.dataset["annotations"].append(
                {
                    "id": len(truth.dataset["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [x0, y0, *sides],
                    "area": sides[0] * sides[1],
                    "iscrowd": 0,
                }
            )
        for (x0, y0, x1, y1), score in zip(detections.boxes_xyxy.tolist(), detections.scores.tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            found.append({"image_id": number, "category_id": 1, "bbox": box, "score": score})
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes(found), "bbox")
    judge.params.maxDets = [1, 10, 1000]
    judge.evaluate()
    judge.accumulate()
    precision = judge.eval["precision"][:, :, 0, :, -1]  # levels of IoU x of recall x ranges of area
    overall, classes = score_boxes(tiles)
    for row, scores in enumerate((overall, *classes)):
        assert scores.map50 == pytest.approx(precision[0, :, row].mean(), abs=1e-9)
        assert scores.map50_95 == pytest.approx(precision[..., row].mean(), abs=1e-9)
