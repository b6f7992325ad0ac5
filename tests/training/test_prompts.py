"""Prompts of interactive training: where corrective points lie, on masks that can be read off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dendsam_deploy.training.prompts import NEGATIVE_MARGIN_PX, PromptSet, corrective_points, random_points


def masks(*boxes):
    """Return one mask of 16 x 16 px for each box (y0, x0, y1, x1)."""
    stack = np.zeros((len(boxes), 16, 16), bool)
    for mask, (y0, x0, y1, x1) in zip(stack, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return stack


WHOLE = np.array([[16, 16]])


def points_of(truth, predicted, sizes=WHOLE, draws=40):
    """Return the positive and the negative points of many draws, as (y, x)."""
    found = [corrective_points(truth, predicted, sizes, np.random.default_rng(seed)) for seed in range(draws)]
    assert all(drawn.labels.tolist() == [[1, 0]] * len(truth) for drawn in found)
    return ({tuple(drawn.points_xy[0, k, ::-1].astype(int)) for drawn in found} for k in (0, 1))


class TestCorrections:
    def test_missed_parts_get_positive_points_and_wrong_parts_negative_ones(self):
        positive, negative = points_of(masks((2, 2, 6, 6)), masks((4, 4, 9, 9)))
        assert all(2 <= y < 6 and 2 <= x < 6 and not (y >= 4 and x >= 4) for y, x in positive)
        assert all(4 <= y < 9 and 4 <= x < 9 and not (y < 6 and x < 6) for y, x in negative)
        assert len(positive) > 5
        assert len(negative) > 5

    def test_a_perfect_mask_gets_a_point_inside_and_one_near_its_box(self):
        positive, negative = points_of(masks((6, 6, 9, 9)), masks((6, 6, 9, 9)))
        assert positive == {(y, x) for y in range(6, 9) for x in range(6, 9)}
        low, high = 6 - NEGATIVE_MARGIN_PX, 9 + NEGATIVE_MARGIN_PX
        assert all(low <= y < high and low <= x < high and not (6 <= y < 9 and 6 <= x < 9) for y, x in negative)

    def test_an_object_that_fills_its_box_and_surroundings_gets_any_pixel_beside_it(self):
        truth = masks((0, 0, 16, 16))
        truth[0, 15, 15] = False
        _, negative = points_of(truth, truth)
        assert negative == {(15, 15)}

    def test_there_are_no_points_in_the_padding(self):
        positive, negative = points_of(masks((2, 2, 8, 8)), masks((0, 0, 16, 16)), np.array([[9, 10]]))
        assert all(y < 9 and x < 10 for y, x in positive | negative)

    @given(st.integers(0, 10_000))
    def test_points_lie_where_their_labels_say(self, seed):
        rng = np.random.default_rng(seed)
        truth, predicted = rng.random((3, 12, 12)) < 0.4, rng.random((3, 12, 12)) < rng.random()
        truth[:, 5, 5], truth[:, 0, 0] = True, False
        drawn = corrective_points(truth, predicted, np.tile([[12, 12]], (3, 1)), rng)
        for mask, found, ((x1, y1), (x0, y0)) in zip(truth, predicted, drawn.points_xy.astype(int), strict=True):
            assert mask[y1, x1]
            assert not mask[y0, x0]
            assert not found[y1, x1] or not (mask & ~found).any()
            assert found[y0, x0] or not (found & ~mask).any()


class TestPromptSet:
    def test_corrections_are_added_behind_what_was_prompted(self):
        box = PromptSet(boxes_xyxy=torch.tensor([[1.0, 2, 3, 4]]))
        once = box.corrected(torch.ones(1, 2, 2), torch.tensor([[1, 0]]))
        twice = once.corrected(2 * torch.ones(1, 2, 2), torch.tensor([[1, 0]]))
        assert twice.boxes_xyxy is box.boxes_xyxy
        assert twice.points_xy[0, :, 0].tolist() == [1, 1, 2, 2]
        assert twice.labels.tolist() == [[1, 0, 1, 0]]

    def test_rows_are_picked(self):
        prompts = PromptSet(torch.arange(6.0).reshape(3, 1, 2), torch.ones(3, 1), masks=torch.zeros(3, 1, 4, 4))
        some = prompts.take(torch.tensor([2, 0]))
        assert some.points_xy[:, 0, 0].tolist() == [4, 0]
        assert some.boxes_xyxy is None
        assert some.masks is None


@pytest.mark.parametrize(("fraction", "places"), [(1.0, 1), (0.0, 40)])
def test_first_points_lie_in_the_middle_or_anywhere(fraction, places):
    objects = np.zeros((16, 16), np.int32)
    objects[3:12, 3:12] = 5
    box = np.array([[3, 3, 12, 12]], np.float32)
    generators = [np.random.default_rng(seed) for seed in range(90)]
    drawn = {tuple(random_points(objects, np.array([5]), box, rng, fraction)[0]) for rng in generators}
    assert len(drawn) == 1 if places == 1 else len(drawn) > places
    assert all(objects[int(y), int(x)] == 5 for x, y in drawn)
