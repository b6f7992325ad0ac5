"""The object-level consistency error: worked examples with named directions, and the formula in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.object_consistency import ObjectConsistency, object_consistency
from dendsam_deploy.metrics.overlaps import ObjectOverlaps


def consistency(truth: np.ndarray, segmentation: np.ndarray) -> ObjectConsistency:
    return object_consistency(ObjectOverlaps.from_table(ContingencyTable.from_labels(truth, segmentation)))


def image(*rows: str) -> np.ndarray:
    return np.array([[int(character) for character in row] for row in rows], np.uint32)


SQUARE = image("0000", "0110", "0110", "0000")
TWO = image("11110222", "11110222", "11110000", "11110000")
NOTHING = np.zeros_like(SQUARE)


@pytest.mark.parametrize(
    ("truth", "segmentation", "e_gs", "e_sg", "oce"),
    [
        pytest.param(SQUARE, SQUARE, 0, 0, 0, id="identical"),
        pytest.param(SQUARE, NOTHING, 1, 1, 1, id="empty segmentation"),
        pytest.param(NOTHING, SQUARE, 1, 1, 1, id="empty truth"),
        pytest.param(NOTHING, NOTHING, 0, 0, 0, id="both empty"),
        pytest.param(SQUARE, image("1111", "0000", "0000", "0000"), 1, 1, 1, id="disjoint"),
        pytest.param(SQUARE, image("0000", "0110", "0220", "0000"), 0.5, 0.5, 0.5, id="two halves"),
        pytest.param(SQUARE, image("0000", "0110", "0230", "0000"), 0.625, 0.625, 0.625, id="pieces of 2, 1, 1 px"),
        pytest.param(
            TWO, image("11110000", "11110000", "11110000", "11110000"), 6 / 22, 0, 0, id="object 2 is missing"
        ),
        pytest.param(TWO, image("11110222", "11110222", "11110000", "11110333"), 0, 3 / 25, 0, id="an extra object"),
        pytest.param(
            TWO,
            image("11110111", "11110111", "11110000", "11110000"),
            0.396694,
            0.396694,
            0.396694,
            id="both in one label",
        ),
        pytest.param(
            TWO,
            image("11110222", "11110222", "11110000", "00000000"),
            0.181818,
            0.166667,
            0.166667,
            id="object 1 loses its last row",
        ),
        pytest.param(
            TWO,
            image("11110222", "11110222", "33330000", "33330000"),
            0.363636,
            0.363636,
            0.363636,
            id="object 1 in two halves",
        ),
    ],
)
def test_worked_examples(truth, segmentation, e_gs, e_sg, oce):
    found = consistency(truth, segmentation)
    assert (found.e_gs, found.e_sg, found.oce) == pytest.approx((e_gs, e_sg, oce), abs=5e-7)


def test_a_missing_object_shows_in_e_gs_and_an_extra_one_in_e_sg():
    missing = consistency(TWO, np.where(TWO == 2, 0, TWO))
    assert missing.e_gs > 0
    assert missing.e_sg == 0
    extra = consistency(np.where(TWO == 2, 0, TWO), TWO)
    assert extra.e_gs == 0
    assert extra.e_sg > 0


def directed_error_in_fractions(truth: np.ndarray, segmentation: np.ndarray) -> Fraction:
    """E_gs, written down from the formula with boolean masks."""
    truth_masks = [truth == label for label in np.unique(truth) if label]
    segment_masks = [segmentation == label for label in np.unique(segmentation) if label]
    if not truth_masks or not segment_masks:
        return Fraction(int(len(truth_masks) != len(segment_masks)))
    error = Fraction(0)
    for a in truth_masks:
        meeting = [b for b in segment_masks if (a & b).any()]
        sizes = sum(int(b.sum()) for b in meeting)
        agreement = sum(
            (Fraction(int(b.sum()), sizes) * Fraction(int((a & b).sum()), int((a | b).sum())) for b in meeting),
            Fraction(0),
        )
        error += Fraction(int(a.sum()), int((truth > 0).sum())) * (1 - agreement)
    return error


IMAGE_PAIRS = st.tuples(*[hnp.arrays(np.uint8, (4, 5), elements=st.integers(0, 4))] * 2)


@settings(deadline=None)
@given(IMAGE_PAIRS)
def test_equals_the_formula(pair):
    truth, segmentation = pair
    found = consistency(truth, segmentation)
    assert found.e_gs == pytest.approx(float(directed_error_in_fractions(truth, segmentation)), abs=1e-12)
    assert found.e_sg == pytest.approx(float(directed_error_in_fractions(segmentation, truth)), abs=1e-12)
