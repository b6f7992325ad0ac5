"""Variation of information and adapted Rand: directions by example, values by scikit-image and by counting pairs."""

from __future__ import annotations

import itertools
from math import log2

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.metrics import adapted_rand_error
from skimage.metrics import variation_of_information as skimage_vi

from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.partition import AdaptedRand, VariationOfInformation, adapted_rand, variation_of_information


def vi(truth: np.ndarray, segmentation: np.ndarray) -> VariationOfInformation:
    return variation_of_information(ContingencyTable.from_labels(truth, segmentation))


def rand(truth: np.ndarray, segmentation: np.ndarray) -> AdaptedRand:
    return adapted_rand(ContingencyTable.from_labels(truth, segmentation))


ONE_OBJECT = np.array([1, 1, 1, 1])
IN_PIECES = np.array([1, 1, 2, 3])


def test_a_cut_object_raises_split_and_lowers_recall():
    cut = vi(truth=ONE_OBJECT, segmentation=IN_PIECES)
    assert cut == VariationOfInformation(split=0.5 * 1 + 0.5 * 2, merge=0.0)
    # Of the 6 pairs of the object 1 is still together; every pair that is together belongs together.
    assert rand(truth=ONE_OBJECT, segmentation=IN_PIECES) == AdaptedRand(
        precision=1.0, recall=1 / 6, error=pytest.approx(1 - 2 / 7)
    )


def test_joined_objects_raise_merge_and_lower_precision():
    joined = vi(truth=IN_PIECES, segmentation=ONE_OBJECT)
    assert joined == VariationOfInformation(split=0.0, merge=0.5 * 1 + 0.5 * 2)
    assert rand(truth=IN_PIECES, segmentation=ONE_OBJECT) == AdaptedRand(
        precision=1 / 6, recall=1.0, error=pytest.approx(1 - 2 / 7)
    )


def test_one_voxel_in_a_wrong_neighbour():
    # Object 1 has 3 voxels of 4, object 2 took the fourth: worked out by hand.
    truth, segmentation = np.array([1, 1, 1, 1, 2, 2]), np.array([5, 5, 5, 6, 6, 6])
    found = vi(truth, segmentation)
    assert found.split == pytest.approx((3 * log2(4 / 3) + 1 * log2(4 / 1)) / 6)
    assert found.merge == pytest.approx((1 * log2(3 / 1) + 2 * log2(3 / 2)) / 6)
    # 3 + 0 + 1 pairs agree; 6 + 1 belong together; 3 + 3 were put together.
    assert rand(truth, segmentation).precision == pytest.approx(4 / 6)
    assert rand(truth, segmentation).recall == pytest.approx(4 / 7)


def test_background_of_the_truth_is_not_looked_at():
    truth = np.array([0, 0, 1, 1])
    assert vi(truth, np.array([8, 9, 5, 5])) == VariationOfInformation(0.0, 0.0)
    assert rand(truth, np.array([5, 5, 5, 5])) == AdaptedRand(1.0, 1.0, 0.0)


def test_objects_that_are_not_found_count_as_joined():
    assert vi(np.array([1, 1, 2, 2]), np.zeros(4, int)).merge == 1
    assert rand(np.array([1, 1, 2, 2]), np.zeros(4, int)).precision == pytest.approx(2 / 6)


def test_without_any_object_nothing_is_wrong():
    assert vi(np.zeros(3, int), np.ones(3, int)) == VariationOfInformation(0.0, 0.0)
    assert rand(np.zeros(3, int), np.ones(3, int)) == AdaptedRand(1.0, 1.0, 0.0)


def test_single_voxel_objects_have_no_pairs_to_lose():
    assert rand(np.array([1, 2]), np.array([1, 2])) == AdaptedRand(1.0, 1.0, 0.0)
    assert rand(np.array([1, 2]), np.array([1, 1])) == AdaptedRand(precision=0.0, recall=1.0, error=1.0)


def test_squares_of_volume_sizes_do_not_overflow():
    def column(*values: int) -> np.ndarray:
        return np.array(values, np.int64)

    # 10^11 voxels: object 1 in two equal pieces.
    table = ContingencyTable(column(1, 1), column(1, 2), column(5 * 10**10, 5 * 10**10))
    assert adapted_rand(table).recall == pytest.approx(0.5)
    assert adapted_rand(table).precision == pytest.approx(1.0)


PAIRS = st.tuples(*[hnp.arrays(np.int64, (3, 4), elements=st.integers(0, 4))] * 2)


@settings(deadline=None)
@given(PAIRS)
def test_vi_equals_scikit_image_with_background_of_the_truth_ignored(pair):
    truth, segmentation = pair
    assume((truth > 0).any())
    found = vi(truth, segmentation)
    splits, merges = skimage_vi(truth, segmentation, ignore_labels=(0,))
    assert (found.split, found.merge) == pytest.approx((splits, merges), abs=1e-12)


@settings(deadline=None)
@given(PAIRS)
def test_rand_equals_scikit_image_whose_precision_and_recall_are_exchanged(pair):
    truth, segmentation = pair
    sizes_truth = np.bincount(truth[truth > 0], minlength=2)
    sizes_segments = np.bincount(segmentation[truth > 0], minlength=2)
    assume(sizes_truth.max() > 1)
    assume(sizes_segments.max() > 1)  # scikit-image divides by the number of pairs
    found = rand(truth, segmentation)
    error, their_precision, their_recall = adapted_rand_error(truth, segmentation)
    assert found.error == pytest.approx(error, abs=1e-12)
    assert (found.recall, found.precision) == pytest.approx((their_precision, their_recall), abs=1e-12)


@settings(deadline=None)
@given(PAIRS)
def test_rand_equals_counting_pairs(pair):
    truth, segmentation = (labels.ravel().tolist() for labels in pair)
    voxels = [(t, s) for t, s in zip(truth, segmentation, strict=True) if t]
    pairs = list(itertools.combinations(voxels, 2))
    belong = sum(a[0] == b[0] for a, b in pairs)
    together = sum(a[1] == b[1] for a, b in pairs)
    both = sum(a == b for a, b in pairs)
    found = rand(*pair)
    assert found.precision == pytest.approx(both / together if together else 1.0)
    assert found.recall == pytest.approx(both / belong if belong else 1.0)
