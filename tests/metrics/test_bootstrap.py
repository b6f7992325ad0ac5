"""Intervals that hold what they promise, and that are the same for the same seed."""

import numpy as np
import pytest
from scipy import stats

from dendsam_deploy.metrics.bootstrap import (
    blocks_of,
    bootstrap_weights,
    jackknife_interval,
    mean_intervals,
    percentile_interval,
)


def test_every_draw_has_as_many_slices_as_there_are():
    weights = bootstrap_weights(7, 50, seed=3)
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(weights, bootstrap_weights(7, 50, seed=3))
    assert (weights != bootstrap_weights(7, 50, seed=4)).any()


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(0).beta(5, 2, 12)
    low, high = mean_intervals(values[:, None], 20000, seed=1)[:, 0]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2))
    assert (low, high) == pytest.approx(theirs.confidence_interval, abs=3e-3)


def test_columns_are_resampled_together_and_judged_apart():
    values = np.random.default_rng(0).normal(size=(9, 1)) * [1, 10] + [0, 5]
    ends = mean_intervals(values, 500, seed=0)
    np.testing.assert_allclose(ends[:, 1], 10 * ends[:, 0] + 5)


def test_slices_that_agree_leave_no_doubt():
    np.testing.assert_allclose(mean_intervals(np.full((4, 1), 0.7), 100, seed=0), 0.7)


def test_the_middle_95_percent():
    low, high = percentile_interval(np.arange(1001.0))
    assert (low, high) == pytest.approx((25, 975))


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(5).normal(3, 2, 10)
    left_out = np.array([np.delete(values, i).mean() for i in range(10)])[:, None]
    low, high = jackknife_interval(np.array([values.mean()]), left_out)[:, 0]
    theirs = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(theirs)


def test_a_score_that_every_block_changes_alike_is_not_sure():
    """As a score with a threshold: .4 with all blocks, .6 without any one of them."""
    low, high = jackknife_interval(np.array([0.4]), np.full((10, 1), 0.6))[:, 0]
    assert low < 0.2
    assert high > 0.6


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(300):
        low, high = mean_intervals(rng.beta(6, 3, (30, 1)), 300, seed=trial)[:, 0]
        hits += low <= 6 / 9 <= high
    assert 0.88 <= hits / 300 <= 0.98


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(3, 8, [1, 1, 1]), (10, 4, [3, 2, 3, 2]), (6, 1, [6]), (0, 4, [])]
)
def test_blocks_are_of_neighbours_and_of_almost_equal_size(count, most, sizes):
    blocks = blocks_of(count, most)
    assert (np.diff(blocks) >= 0).all()
    assert np.bincount(blocks).tolist() == sizes
