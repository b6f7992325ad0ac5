"""Outlines: their area is that of the mask, and what they enclose is the mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from mask_shapes import SLICE_HW, any_mask, encoded, letter_shapes
from scipy import ndimage

from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import RunLengths
from dendsam_deploy.volume.outlines import signed_area_px, trace_outlines


def inside(outline: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How often closed polygons wind around points, by crossings of a ray to the right."""
    winding = np.zeros(np.broadcast(y, x).shape, int)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (min(y0, y1) <= y) & (y < max(y0, y1)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
            winding += np.where(crosses, 1 if y1 > y0 else -1, 0)
    return winding


@settings(max_examples=60, deadline=None)
@given(any_mask())
def test_area_and_content_are_those_of_the_mask(mask) -> None:
    outlines = trace_outlines(encoded(mask))
    assert sum(map(signed_area_px, outlines)) == mask.sum()
    y, x = np.indices(SLICE_HW) + 0.5
    winding = sum(inside(outline, y, x) for outline in outlines)
    np.testing.assert_array_equal(winding, mask.astype(int))


@settings(max_examples=40, deadline=None)
@given(any_mask())
def test_there_is_one_outline_for_each_piece_and_each_hole(mask) -> None:
    outlines = trace_outlines(encoded(mask))
    pieces = ndimage.label(mask)[1]
    # What touches the border is no hole; background is connected through corners where the mask is not.
    holes = ndimage.label(np.pad(~mask, 1, constant_values=True), np.ones((3, 3)))[1] - 1
    areas = [signed_area_px(outline) for outline in outlines]
    assert sum(area > 0 for area in areas) == pieces
    assert sum(area < 0 for area in areas) == holes


def test_corners_only_and_in_slice_pixels() -> None:
    (outline,) = trace_outlines(RunLengths.from_mask(np.ones((2, 3), bool), Window(10, 20, 2, 3)))
    assert outline.tolist() == [[20, 10], [23, 10], [23, 12], [20, 12]]


def test_no_outline_visits_a_corner_twice() -> None:
    for mask in letter_shapes():
        for outline in trace_outlines(encoded(mask)):
            assert len(np.unique(outline, axis=0)) == len(outline)


def test_a_mask_without_pixels_has_no_outline() -> None:
    assert trace_outlines(RunLengths.from_mask(np.zeros((4, 4), bool), Window(0, 0, 4, 4))) == []


@pytest.mark.parametrize("turned", [False, True])
def test_area_has_the_sign_of_the_direction(turned) -> None:
    square = np.array([(0, 0), (4, 0), (4, 4), (0, 4)])
    assert signed_area_px(square[::-1] if turned else square) == (-16 if turned else 16)
