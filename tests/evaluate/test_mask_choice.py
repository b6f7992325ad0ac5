"""Thresholds for a wanted precision, against a search that tries everything one by one."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import numpy as np
import pytest
from scipy import stats

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.evaluate.mask_choice import JudgedMasks, MaskCriteria, Share, choose_criteria, most_kept


def judged(count: int, seed: int, slices: int = 6, steps: int = 5) -> JudgedMasks:
    """Masks whose values tell something about whether they are right; few distinct values, so ties abound."""
    rng = np.random.default_rng(seed)
    right = rng.random(count) < 0.6
    qualities = np.clip(rng.normal(0.55 + 0.2 * right[:, None], 0.2, (count, 4)), 0, 1)
    qualities = np.round(qualities * steps) / steps
    qualities[rng.random(count) < 0.1, 3] = np.nan
    return JudgedMasks(np.sort(rng.integers(0, slices, count)), qualities, right)


def kept_by(thresholds: tuple[float, ...], masks: JudgedMasks) -> np.ndarray:
    keeps = [
        all(np.isnan(value) or value >= least for value, least in zip(row, thresholds, strict=True))
        for row in masks.qualities
    ]
    return np.array(keeps, bool)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("wanted", [0.7, 0.85, 1.0])
def test_no_combination_keeps_more_at_that_precision(seed, wanted) -> None:
    masks = judged(40, seed)
    best = 0
    for thresholds in itertools.product(np.arange(6) / 5, repeat=4):
        kept = kept_by(thresholds, masks)
        if kept.sum() > best and masks.right[kept].mean() >= wanted and kept.sum() >= 5:
            best = int(kept.sum())
    criteria = most_kept(masks, wanted, {}, least_kept=5)
    assert (0 if criteria is None else int(criteria.keeps(masks.qualities).sum())) == best
    if criteria is not None:
        share = masks.share(criteria)
        assert share.kept == best
        assert share.precision >= wanted


def test_thresholds_that_are_given_stay() -> None:
    criteria = most_kept(judged(400, 1), 0.8, {"stability": 0.65, "score": 0.0})
    assert criteria is not None
    assert (criteria.stability, criteria.score) == (0.65, 0.0)


def test_precision_holds_on_slices_left_out() -> None:
    masks = judged(600, 2, steps=1000)
    choice = choose_criteria(masks, 0.85)
    assert choice.reached
    assert choice.left_out is not None
    assert choice.left_out.precision >= 0.85
    assert choice.chosen_on == masks.share(choice.criteria)
    assert choice.everything == Share(int(masks.right.sum()), 600)
    fresh = judged(4000, 3, steps=1000)
    assert fresh.share(choice.criteria).precision > 0.82
    assert fresh.share(choice.criteria).kept > 400


def test_values_that_tell_nothing_do_not_reach_it() -> None:
    rng = np.random.default_rng(0)
    masks = JudgedMasks(np.arange(300) // 50, rng.random((300, 4)), rng.random(300) < 0.5)
    # On the very masks a lucky corner can be found; on slices left out it is as bad as any.
    assert most_kept(masks, 0.75, {}) is not None
    choice = choose_criteria(masks, 0.75)
    assert not choice.reached
    assert choice.left_out is not None
    assert choice.left_out.precision < 0.75


def test_wrong_masks_cannot_be_chosen() -> None:
    masks = JudgedMasks(np.arange(40) // 10, np.random.default_rng(0).random((40, 4)), np.zeros(40, bool))
    choice = choose_criteria(masks, 0.5)
    assert (choice.reached, choice.left_out, choice.chosen_on.right) == (False, None, 0)
    nothing = JudgedMasks(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0, bool))
    assert not choose_criteria(nothing, 0.5).reached


def test_right_masks_are_all_kept() -> None:
    masks = JudgedMasks(np.arange(40) // 10, np.random.default_rng(0).random((40, 4)), np.ones(40, bool))
    choice = choose_criteria(masks, 1.0)
    assert choice.reached
    assert choice.chosen_on == Share(40, 40)


def test_one_slice_cannot_be_left_out() -> None:
    masks = judged(200, 5, slices=1)
    choice = choose_criteria(masks, 0.8)
    assert (choice.reached, choice.left_out) == (True, None)


def test_a_few_lucky_masks_are_no_choice() -> None:
    qualities = np.full((60, 4), 0.5)
    qualities[:4] = 0.9
    masks = JudgedMasks(np.arange(60) // 12, qualities, np.arange(60) < 4)
    assert not choose_criteria(masks, 0.9).reached


@pytest.mark.parametrize(("right", "kept"), [(0, 7), (7, 7), (45, 50), (1, 3), (0, 0)])
def test_interval_is_that_of_clopper_and_pearson(right, kept) -> None:
    share = Share(right, kept)
    if kept:
        expected = stats.binomtest(right, kept).proportion_ci(0.95, method="exact")
        assert share.interval == pytest.approx((expected.low, expected.high), abs=1e-9)
    else:
        assert share.interval == (0.0, 1.0)


def test_margins_and_reasons() -> None:
    criteria = MaskCriteria(0.5, 0.8, 0.8, 0.4)
    qualities = np.array(
        [[0.9, 0.9, 0.9, np.nan], [0.5, 1, 1, 1], [1, 0.4, 1, 1], [0.25, 0.4, 1, 1], [1, 1, 1, 1]], float
    )
    assert criteria.keeps(qualities).tolist() == [True, True, False, False, True]
    assert criteria.margins(qualities) == pytest.approx([0.5, 0.0, -0.5, -1.0, 1.0])
    assert criteria.shortcomings(qualities[3]) == "score 0.25 < 0.50; predicted_iou 0.40 < 0.80"
    assert criteria.shortcomings(qualities[0]) == ""
    near = [*qualities[0][:2], 0.8499, qualities[0][3]]
    assert MaskCriteria(stability=0.85).shortcomings(near).endswith("stability 0.8499 < 0.8500")
    assert MaskCriteria(1, 1, 1, 1).margins(np.ones((1, 4))).tolist() == [1.0]
    assert MaskCriteria(0, 0, 0, 0).keeps(np.zeros((1, 4))).all()
    assert astuple(criteria) == (0.5, 0.8, 0.8, 0.4)


@pytest.mark.parametrize("wanted", [0.0, 1.1, -1.0, float("nan")])
def test_senseless_precisions_are_refused(wanted) -> None:
    with pytest.raises(InvalidArgumentError, match="wanted precision"):
        choose_criteria(judged(20, 0), wanted)


def test_senseless_thresholds_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"least stability of a mask is 1\.5"):
        MaskCriteria(stability=1.5)
