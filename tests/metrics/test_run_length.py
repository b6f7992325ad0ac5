"""Expected run length against examples worked by hand; the directions of its errors are named."""

import numpy as np
import pytest

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.metrics.run_length import expected_run_length

CHAIN = [(0, 1), (1, 2), (2, 3), (3, 4)]
"""Edges of a skeleton of five nodes; of a second one the nodes are 5 to 7."""

SECOND = [(5, 6), (6, 7)]


def run(segments, edges=CHAIN, lengths=None, skeletons=None):
    edges = np.array(edges, np.int64)
    lengths = np.ones(len(edges)) if lengths is None else np.array(lengths, float)
    skeletons = np.zeros(len(segments), np.int64) if skeletons is None else np.array(skeletons)
    return expected_run_length(skeletons, np.array(segments, np.int64), edges, lengths)


def test_a_perfect_segmentation_has_the_length_of_the_skeleton():
    found = run([9] * 5)
    assert (found.expected, found.longest, found.share) == (4, 4, 1)
    assert (found.correct, found.split, found.merged, found.omitted) == (4, 0, 0, 0)


def test_a_cut_edge_is_lost_and_shortens_the_runs():
    found = run([9, 9, 9, 8, 8])  # runs of 2 and of 1, one edge between them: (2^2 + 1^2) / 4
    assert found.expected == 5 / 4
    assert (found.correct, found.split) == (3, 1)


def test_background_is_an_omission():
    found = run([9, 9, 0, 9, 9])  # two edges remain, in one segment: 2^2 / 4
    assert found.expected == 1
    assert (found.correct, found.omitted) == (2, 2)


def test_lengths_weigh():
    found = run([9, 9, 9, 8, 8], lengths=[3, 1, 2, 4])
    assert found.expected == (4**2 + 4**2) / 10
    assert found.longest == 10


def test_a_merger_costs_both_skeletons_all_of_their_length_in_it():
    skeletons = [0] * 5 + [1] * 3
    apart = run([9, 9, 9, 9, 9, 7, 7, 7], CHAIN + SECOND, skeletons=skeletons)
    assert apart.expected == apart.longest == (4**2 + 2**2) / 6
    joined = run([9, 9, 9, 8, 8, 9, 7, 7], CHAIN + SECOND, skeletons=skeletons)
    # 9 holds nodes of both: the edges 0-1, 1-2, 2-3 of the first and 5-6 of the second touch it. Left: 3-4 and 6-7.
    assert joined.merged_segments == 1
    assert (joined.merged, joined.correct, joined.split) == (4, 2, 0)
    assert joined.expected == (1 + 1) / 6


def test_cutting_costs_less_than_joining():
    skeletons = [0] * 5 + [1] * 3
    cut = run([9, 9, 9, 8, 8, 7, 7, 7], CHAIN + SECOND, skeletons=skeletons)
    joined = run([9, 9, 9, 9, 9, 9, 9, 9], CHAIN + SECOND, skeletons=skeletons)
    assert joined.expected == 0 < cut.expected < cut.longest


def test_branches_of_one_segment_belong_to_one_run():
    edges = [(0, 1), (1, 2), (1, 3), (3, 4)]
    assert run([9, 9, 9, 9, 8], edges).expected == 3**2 / 4


def test_it_is_the_mean_run_of_points_on_the_skeletons():
    """The definition, by brute force: points all along the skeletons, each with the length of its run."""
    rng = np.random.default_rng(3)
    segments = rng.integers(0, 4, 40)
    edges = [(i, i + 1) for i in range(39) if i not in (12, 25)]
    lengths = rng.integers(1, 6, len(edges))
    skeletons = np.searchsorted([12, 25], np.arange(40))
    found = run(segments, edges, lengths, skeletons)
    shared = {s for s in range(1, 4) if len(set(skeletons[segments == s])) > 1}
    owner = [
        (skeletons[a], segments[a]) if segments[a] == segments[b] and segments[a] not in {0, *shared} else None
        for a, b in edges
    ]
    runs = [
        0 if mine is None else sum(length for length, other in zip(lengths, owner, strict=True) if other == mine)
        for mine in owner
    ]
    assert found.expected == pytest.approx(np.average(runs, weights=lengths))


def test_nothing_to_walk_along():
    nothing = run([], np.zeros((0, 2)))
    assert (nothing.expected, nothing.longest, nothing.share) == (0, 0, 1)


def test_an_edge_between_skeletons_is_refused():
    with pytest.raises(InvalidArgumentError, match="joins two skeletons"):
        run([1, 1], [(0, 1)], skeletons=[0, 1])
