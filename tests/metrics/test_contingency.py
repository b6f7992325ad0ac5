"""The contingency table against counting voxel by voxel."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.metrics.contingency import ContingencyTable

LABELS = st.integers(0, 5)
VOLUME_PAIRS = hnp.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=4).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.uint32, shape, elements=LABELS),
        hnp.arrays(np.int64, shape, elements=LABELS),
    )
)


def rows(table: ContingencyTable) -> list[tuple[int, int, int]]:
    return list(zip(table.truth.tolist(), table.segment.tolist(), table.voxels.tolist(), strict=True))


def counted(truth: np.ndarray, segmentation: np.ndarray) -> list[tuple[int, int, int]]:
    counts = Counter(zip(truth.ravel().tolist(), segmentation.ravel().tolist(), strict=True))
    return sorted((t, s, n) for (t, s), n in counts.items())


@settings(deadline=None)
@given(VOLUME_PAIRS)
def test_table_counts_every_voxel_once(pair):
    assert rows(ContingencyTable.from_labels(*pair)) == counted(*pair)


@settings(deadline=None)
@given(VOLUME_PAIRS)
def test_tables_of_slices_add_up_to_the_table_of_the_volume(pair):
    slices = [ContingencyTable.from_labels(truth, segmentation) for truth, segmentation in zip(*pair, strict=True)]
    assert rows(ContingencyTable.total(slices)) == counted(*pair)


@settings(deadline=None)
@given(VOLUME_PAIRS)
def test_transposed_table_is_the_table_of_exchanged_arguments(pair):
    truth, segmentation = pair
    assert rows(ContingencyTable.from_labels(truth, segmentation).transposed()) == counted(segmentation, truth)


def test_labels_beyond_32_bits_stay_apart():
    labels = np.array([1, 2**32 + 1, 2**62], np.uint64)
    assert rows(ContingencyTable.from_labels(labels, labels)) == [(i, i, 1) for i in labels.tolist()]


def test_views_with_gaps_are_read_in_the_same_order():
    truth = np.arange(24).reshape(4, 6)
    assert rows(ContingencyTable.from_labels(truth.T, truth.T)) == [(i, i, 1) for i in range(24)]


def test_void_voxels_leave_both_sides():
    truth = np.array([1, 1, 249, 249, 0])
    segmentation = np.array([7, 7, 7, 8, 8])
    table = ContingencyTable.from_labels(truth, segmentation).without_truth((249,))
    assert rows(table) == [(0, 8, 1), (1, 7, 2)]


def test_background_of_the_truth_may_be_void():
    table = ContingencyTable.from_labels(np.array([0, 0, 3]), np.array([5, 0, 5])).without_truth([0])
    assert rows(table) == [(3, 5, 1)]


def test_segments_without_annotation_leave_but_the_others_stay_whole():
    truth = np.array([1, 0, 0, 0])
    segmentation = np.array([4, 4, 5, 0])
    table = ContingencyTable.from_labels(truth, segmentation).without_unannotated()
    assert rows(table) == [(0, 0, 1), (0, 4, 1), (1, 4, 1)]


@pytest.mark.parametrize(
    ("truth", "segmentation", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"\(2, 3\) but the segmentation \(3, 2\)"),
        (np.zeros(2), np.zeros(2, int), "labels of the truth are float64"),
        (np.zeros(2, int), np.zeros(2, complex), "labels of the segmentation are complex128"),
        (np.array([-1]), np.array([1]), "negative"),
        (np.array([1]), np.array([2**63], np.uint64), "beyond int64"),
    ],
)
def test_what_is_no_pair_of_labellings_is_refused(truth, segmentation, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ContingencyTable.from_labels(truth, segmentation)


def test_columns_of_unequal_length_are_refused():
    column = np.ones(2, np.int64)
    with pytest.raises(InvalidArgumentError, match="column segment"):
        ContingencyTable(column, column[:1], column)
