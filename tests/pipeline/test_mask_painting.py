"""Painting against a brute-force competition over full-size stacks, and the rules for losers, islands and holes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from synthetic_session import ellipse_logits

from dendsam_deploy.geometry import Frame, Window, tile_grid
from dendsam_deploy.instances import Detections, Instances, Masks
from dendsam_deploy.pipeline.claims import Claim, measure_overlaps, specificity, suppress_same_masks
from dendsam_deploy.pipeline.paint import PaintOptions, paint_masks
from dendsam_deploy.pipeline.prepare import TilePlan

SIZE = 128
PLAN = TilePlan(Frame((SIZE, SIZE), (SIZE, SIZE)), tuple(tile_grid((SIZE, SIZE), SIZE, 0)), SIZE)
OPEN = PaintOptions(
    mask_logit=0.0, min_area_px=0.0, same_mask_iou=1.0, least_kept_fraction=0.0, least_island_fraction=0.0
)
USUAL = PaintOptions(mask_logit=0.0, min_area_px=20.0)

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def masks_of(shapes: list[Shape], quality: list[float] | None = None) -> Masks:
    """Whole-grid masks whose logits are functions of (y, x)."""
    centres = (np.arange(SIZE // 4) + 0.5) * 4
    logits = tuple(np.asarray(shape(centres[:, None], centres[None]), np.float32) for shape in shapes)
    zeros = np.zeros(len(shapes), np.int64)
    iou = np.array(quality or [0.9] * len(shapes), np.float32)
    return Masks(logits, np.zeros((len(shapes), 2), np.int64), zeros, iou, np.arange(len(shapes)))


def ellipse(box: tuple[float, ...]) -> Shape:
    return lambda y, x: ellipse_logits(np.array(box, np.float32), y, x)


def paint_boxes(
    boxes: list[tuple[float, ...]],
    scores: list[float],
    options: PaintOptions = USUAL,
    shapes: list[Shape] | None = None,
    quality: list[float] | None = None,
):
    detections = Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32))
    return paint_masks(detections, masks_of(shapes or [ellipse(box) for box in boxes], quality), PLAN, options)


def upsampled(grid: np.ndarray) -> np.ndarray:
    """Bilinear interpolation of a whole grid by numpy's own one-dimensional interpolation."""
    centres = np.arange(SIZE // 4) * 4 + 2.0
    pixels = np.arange(SIZE) + 0.5
    rows = np.array([np.interp(pixels, centres, row) for row in grid])
    return np.array([np.interp(pixels, centres, column) for column in rows.T]).T


@dataclass
class Stack:
    """All masks at full size, in canonical order, with their values by the formula of `paint`."""

    inside: np.ndarray
    values: np.ndarray
    strengths: np.ndarray
    inputs: np.ndarray

    @classmethod
    def of(cls, detections: Detections, masks: Masks, options: PaintOptions) -> "Stack":
        confidence = detections.scores * masks.predicted_iou
        order = sorted(range(len(masks)), key=lambda i: -confidence[i])
        stack = np.array([upsampled(masks.logits[i]) for i in order]) - options.mask_logit
        large = [(layer > 0).sum() >= max(options.min_area_px, 1) for layer in stack]
        stack, order = stack[large], np.array(order)[large]
        inside = stack > 0
        kept: list[int] = []
        for i, mask in enumerate(inside):
            ious = [(mask & inside[k]).sum() / (mask | inside[k]).sum() for k in kept]
            if max(ious, default=0) <= options.same_mask_iou:
                kept.append(i)
        stack, inside, order = stack[kept], inside[kept], order[kept]
        values = np.full(stack.shape, -np.inf, np.float32)
        strengths = np.zeros(len(stack))
        for i, mask in enumerate(inside):
            larger = [other for other in inside if other.sum() > mask.sum()]
            bonus = max([(mask & o).sum() / mask.sum() * np.log(o.sum() / mask.sum()) for o in larger], default=0)
            odds = np.clip(np.float64(confidence[order[i]]), 0.01, 0.99)
            strengths[i] = np.log(odds / (1 - odds)) + options.specificity_weight * bonus
            evidence = 1 + np.floor(np.minimum(stack[i] / np.median(stack[i][mask]), 1) * 254)
            value = (strengths[i] + options.evidence_weight * evidence / 255).astype(np.float32)
            values[i][mask] = value[mask]
        return cls(inside, values, strengths, order)

    def winners(self) -> np.ndarray:
        """The highest value at each pixel, the earlier one of equals; -1 where nobody bids."""
        if not len(self.values):
            return np.full((SIZE, SIZE), -1)
        return np.where(np.isfinite(self.values).any(axis=0), self.values.argmax(axis=0), -1)

    def settle(self, options: PaintOptions) -> np.ndarray:
        """Hold the whole competition again after every loser and every island: the rules without any shortcut."""
        alive = np.ones(len(self.values), bool)
        while True:
            winners = self.winners()
            held = [(winners == i).sum() for i in range(len(alive))]
            least = [max(options.least_kept_fraction * mask.sum(), options.min_area_px, 1) for mask in self.inside]
            losers = [i for i in range(len(alive)) if alive[i] and held[i] < least[i]]
            weaker = {
                (i, j): (self.strengths[j], -j) < (self.strengths[i], -i) and (self.inside[i] & self.inside[j]).any()
                for i in losers
                for j in losers
            }
            leaving = [i for i in losers if not any(weaker[i, j] for j in losers)]
            for i in leaving:
                alive[i] = False
                self.values[i] = -np.inf
            if leaving:
                continue
            islands = np.zeros_like(self.inside)
            for i in np.flatnonzero(alive):
                pieces, count = ndimage.label(winners == i, np.ones((3, 3)))
                sizes = [(pieces == piece).sum() for piece in range(1, count + 1)]
                for piece, size in enumerate(sizes, start=1):
                    islands[i] |= (pieces == piece) & (size < options.least_island_fraction * max(sizes))
            if not islands.any():
                return winners
            self.values[islands] = -np.inf


@st.composite
def crowds(draw: st.DrawFn, largest: int = 6) -> tuple[Detections, Masks]:
    """Boxes with rough masks. Logits and scores are dyadic, so that interpolation at zoom 1 is exact in float32."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    count = draw(st.integers(1, largest))
    corners = rng.integers(0, SIZE - 24, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(8, 60, (count, 2))], axis=1).clip(0, SIZE)
    centres = (np.arange(SIZE // 4) + 0.5) * 4
    logits = [
        np.round((ellipse_logits(box, centres[:, None], centres[None]) + rng.normal(size=(32, 32))).clip(-16, 16) * 4)
        / 4
        for box in boxes.astype(np.float32)
    ]
    scores = (rng.permutation(64)[:count] + 20) / 128
    masks = Masks(
        tuple(grid.astype(np.float32) for grid in logits),
        np.zeros((count, 2), np.int64),
        np.zeros(count, np.int64),
        (rng.integers(32, 64, count) / 64).astype(np.float32),
        np.arange(count),
    )
    return Detections(boxes.astype(np.float32), scores.astype(np.float32)), masks


@settings(deadline=None, max_examples=40)
@given(crowds())
def test_every_pixel_goes_to_the_highest_value_of_all(crowd: tuple[Detections, Masks]):
    detections, masks = crowd
    painted = paint_masks(detections, masks, PLAN, OPEN)
    stack = Stack.of(detections, masks, OPEN)
    np.testing.assert_array_equal(
        input_of_each_pixel(detections, painted), np.append(stack.inputs, -1)[stack.winners()]
    )


@settings(deadline=None, max_examples=60)
@given(crowds(largest=9))
def test_asking_only_neighbours_again_equals_holding_the_whole_competition_again(crowd: tuple[Detections, Masks]):
    detections, masks = crowd
    strict = replace(USUAL, least_kept_fraction=0.45, least_island_fraction=0.3, min_area_px=40.0)
    stack = Stack.of(detections, masks, strict)
    winners = stack.settle(strict)
    mine = input_of_each_pixel(detections, paint_masks(detections, masks, PLAN, strict))
    filled = (winners < 0) & (mine >= 0)  # holes
    np.testing.assert_array_equal(np.where(filled, -1, mine), np.append(stack.inputs, -1)[winners])


def input_of_each_pixel(detections: Detections, painted: tuple[np.ndarray, Instances]) -> np.ndarray:
    """Labels are numbered by confidence; the boxes tell which input each one is."""
    labels, instances = painted
    rows = [np.flatnonzero((detections.boxes_xyxy == box).all(axis=1))[0] for box in instances.boxes_xyxy]
    return np.array([-1, *rows])[labels]


@settings(deadline=None, max_examples=40)
@given(crowds(largest=9), st.randoms(use_true_random=False))
def test_the_result_is_a_partition_and_does_not_depend_on_the_order_of_the_masks(
    crowd: tuple[Detections, Masks], random
):
    detections, masks = crowd
    labels, instances = paint_masks(detections, masks, PLAN, USUAL)

    assert labels.shape == (SIZE, SIZE)
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(instances.ids, np.arange(1, len(instances) + 1))
    np.testing.assert_array_equal(np.bincount(labels.ravel(), minlength=len(instances) + 1)[1:], instances.areas_px)
    assert (instances.areas_px >= USUAL.min_area_px).all()
    repainted = np.zeros_like(labels)
    for number, runs in zip(instances.ids, instances.run_lengths, strict=True):
        view = repainted[runs.window.slices]
        assert not view[runs.to_mask()].any()
        view[runs.to_mask()] = number
    np.testing.assert_array_equal(repainted, labels)

    order = list(range(len(masks)))
    random.shuffle(order)
    shuffled = Masks(
        tuple(masks.logits[i] for i in order),
        masks.origins_yx,
        masks.tile_index,
        masks.predicted_iou[order],
        masks.box_index,
    )
    again, _ = paint_masks(detections.take(np.array(order)), shuffled, PLAN, USUAL)
    np.testing.assert_array_equal(again, labels)


@settings(deadline=None, max_examples=30)
@given(crowds(largest=9))
def test_survivors_have_no_small_islands_and_only_pixels_of_their_own_masks(crowd: tuple[Detections, Masks]):
    detections, masks = crowd
    labels, instances = paint_masks(detections, masks, PLAN, USUAL)
    for number, box in zip(instances.ids, instances.boxes_xyxy, strict=True):
        mask = upsampled(masks.logits[np.nonzero((detections.boxes_xyxy == box).all(axis=1))[0][0]]) > 0
        pieces, _ = ndimage.label(labels == number, np.ones((3, 3)))
        sizes = np.bincount(pieces.ravel())[1:]
        assert sizes.min() >= USUAL.least_island_fraction * sizes.max()
        strangers = (labels == number) & ~mask
        holes, _ = ndimage.label(strangers)
        assert (np.bincount(holes.ravel())[1:] < USUAL.min_area_px).all(), "only filled holes may lie outside a mask"


def test_no_masks_paint_nothing():
    labels, instances = paint_boxes([], [])
    assert not labels.any()
    assert len(instances) == 0


def test_a_large_wrong_mask_does_not_swallow_a_small_dendrite():
    """The small one is even a little less sure of itself."""
    labels, instances = paint_boxes([(4, 4, 124, 124), (50, 50, 74, 74)], [0.9, 0.75])
    assert len(instances) == 2
    own = upsampled(masks_of([ellipse((50, 50, 74, 74))]).logits[0]) > 0
    assert (labels[own] == 2).mean() > 0.95


def test_a_doubtful_fragment_does_not_punch_a_hole():
    boxes = [(14, 14, 114, 114), (54, 54, 70, 70)]
    labels, instances = paint_boxes(boxes, [0.9, 0.3], quality=[0.9, 0.5])
    assert len(instances) == 1
    assert labels[62, 62] == 1


def test_a_mask_over_two_dendrites_goes_when_both_have_their_own():
    boxes = [(20, 40, 64, 88), (66, 40, 110, 88), (18, 38, 112, 90)]
    _, instances = paint_boxes(boxes, [0.9, 0.9, 0.6])
    np.testing.assert_array_equal(instances.boxes_xyxy, np.array(boxes[:2], np.float32))


def test_equal_neighbours_share_their_overlap_in_the_middle():
    labels, _ = paint_boxes([(10, 40, 70, 90), (60, 40, 120, 90)], [0.8, 0.8])
    left, right = labels[65, 64], labels[65, 66]
    assert {int(left), int(right)} == {1, 2}
    border = np.nonzero(np.diff(labels[60:70, 55:75].astype(int), axis=1))[1] + 55
    np.testing.assert_allclose(border, 64, atol=1)


def test_of_two_nearly_identical_masks_the_better_one_stays():
    boxes = [(30, 30, 90, 90), (31, 30, 91, 90)]
    _, instances = paint_boxes(boxes, [0.6, 0.8])
    np.testing.assert_array_equal(instances.boxes_xyxy, np.array(boxes[1:], np.float32))


def test_an_island_is_cut_off_and_falls_to_whom_it_lies_in():
    island = ellipse((90, 90, 106, 106))
    body = ellipse((10, 10, 60, 60))
    boxes = [(10, 10, 60, 60), (80, 80, 120, 120)]
    shapes: list[Shape] = [lambda y, x: np.maximum(body(y, x), island(y, x)), ellipse(boxes[1])]
    labels, instances = paint_boxes(boxes, [0.95, 0.5], shapes=shapes)
    assert len(instances) == 2
    assert labels[98, 98] == labels[98, 115] == 2


def test_what_a_loser_leaves_is_taken_by_the_next():
    """The small one wins its pixels but is below the least area: no hole may stay in the large one."""
    boxes = [(20, 20, 110, 110), (60, 60, 68, 68)]
    options = PaintOptions(mask_logit=0.0, min_area_px=60.0)
    labels, instances = paint_boxes(boxes, [0.8, 0.95], options)
    assert len(instances) == 1
    assert labels[64, 64] == 1


def rectangle(y0: int, x0: int, height: int, width: int) -> Claim:
    return Claim(Window(y0, x0, height, width), np.full((height, width), 255, np.uint8))


def test_overlaps_count_shared_pixels():
    overlaps = measure_overlaps([rectangle(0, 0, 10, 10), rectangle(20, 20, 5, 5), rectangle(5, 8, 10, 10)])
    assert (overlaps.first.tolist(), overlaps.second.tolist(), overlaps.areas_px.tolist()) == ([0], [2], [10])
    assert overlaps.among(np.array([True, False, True])).second.tolist() == [1]


def test_specificity_is_worth_the_nested_part_times_the_log_of_the_ratio():
    claims = [rectangle(0, 0, 20, 20), rectangle(5, 5, 10, 10), rectangle(0, 18, 4, 5)]
    values = specificity(np.array([claim.area_px for claim in claims]), measure_overlaps(claims))
    np.testing.assert_allclose(values, [0, np.log(4), 8 / 20 * np.log(20)])


def test_suppression_of_same_masks_spares_the_neighbour_of_a_suppressed_one():
    """2 equals 1 and 3 equals 2, but 3 is far enough from 1: 2 goes, 3 stays."""
    claims = [rectangle(0, 0, 10, 20), rectangle(0, 2, 10, 20), rectangle(0, 4, 10, 20)]
    areas = np.array([claim.area_px for claim in claims])
    assert suppress_same_masks(areas, measure_overlaps(claims), 0.7).tolist() == [True, False, True]


@pytest.mark.parametrize("zoom", [0.5, 2.0])
def test_areas_are_slice_pixels_whatever_the_zoom(zoom: float):
    side = int(SIZE / zoom)
    plan = TilePlan(Frame((side, side), (SIZE, SIZE)), PLAN.tiles, SIZE)
    box = np.array([[20, 20, 100, 100]], np.float32)
    masks = masks_of([ellipse(tuple(box[0]))])
    labels, instances = paint_masks(Detections(box / zoom, np.ones(1, np.float32)), masks, plan, USUAL)
    assert labels.shape == (side, side)
    assert instances.areas_px[0] == pytest.approx(np.pi * 40**2 / zoom**2, rel=0.05)
