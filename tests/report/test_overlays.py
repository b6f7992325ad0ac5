"""Pictures: colours that tell objects apart, outlines, and what reaches the PNG."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pages import pixels

from dendsam_deploy.report.overlays import (
    LONGEST_SIDE_PX,
    PALETTE,
    LabelledSlice,
    choose_colours,
    draw_pictures,
    outlines,
    paint_overlay,
)


def grid(rows, columns, size=6):
    """Tiles that touch, labelled from 1."""
    numbers = np.arange(1, rows * columns + 1, dtype=np.uint32).reshape(rows, columns)
    return np.kron(numbers, np.ones((size, size), np.uint32))


def test_neighbours_have_different_colours():
    labels = grid(7, 9)
    colours = choose_colours([labels])
    numbers = labels[::6, ::6]
    for near, far in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert all(colours[a] != colours[b] for a, b in zip(near.ravel().tolist(), far.ravel().tolist(), strict=True))


def test_objects_a_few_pixels_apart_have_different_colours_too():
    labels = np.zeros((9, 40), np.uint32)
    labels[2:7, 2:10] = 1
    labels[2:7, 13:20] = 1 + len(PALETTE)  # the same preference
    colours = choose_colours([labels])
    assert colours[1] != colours[1 + len(PALETTE)]


def test_neighbours_in_any_of_the_slices_count():
    apart, touching = np.zeros((6, 40), np.uint32), np.zeros((6, 40), np.uint32)
    one, other = 3, 3 + len(PALETTE)
    apart[:, :5], apart[:, 30:] = one, other
    touching[:, :5], touching[:, 5:] = one, other
    assert len(set(choose_colours([apart]).values())) == 1
    assert len(set(choose_colours([apart, touching]).values())) == 2


def test_more_neighbours_than_colours_share_the_least_frequent():
    labels = np.arange(1, 2 * len(PALETTE) + 2, dtype=np.uint32)[None].repeat(3, axis=0)
    colours = choose_colours([labels])
    assert set(colours.values()) == set(range(len(PALETTE)))


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.uint32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3)))
def test_outlines_equal_a_look_at_the_four_neighbours(labels):
    expected = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(labels.shape):
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            v, u = y + dy, x + dx
            if 0 <= v < labels.shape[0] and 0 <= u < labels.shape[1] and labels[v, u] != labels[y, x]:
                expected[y, x] = labels[y, x] > 0
    np.testing.assert_array_equal(outlines(labels), expected)


def test_background_is_transparent_and_outlines_are_solid():
    labels = np.zeros((12, 12), np.uint32)
    labels[3:9, 3:9] = 5
    layer = paint_overlay(labels, {5: 2})
    assert (layer[labels == 0] == 0).all()
    assert layer[3, 3].tolist() == [*PALETTE[2].tolist(), 255]
    assert layer[5, 5, :3].tolist() == PALETTE[2].tolist()
    assert 0 < layer[5, 5, 3] < 255


def test_small_slices_are_shown_pixel_by_pixel():
    image = np.arange(120, dtype=np.uint8).reshape(10, 12)
    labels = np.zeros((10, 12), np.uint32)
    labels[2:5, 2:5] = 9
    (picture,) = draw_pictures([LabelledSlice(4, image, labels)])
    np.testing.assert_array_equal(pixels(picture.image_png), image)
    assert pixels(picture.overlay_png).shape == (10, 12, 4)
    assert (picture.z, picture.objects, picture.reduction) == (4, 1, 1.0)


def test_large_slices_are_reduced_and_keep_their_proportions():
    labels = np.zeros((1200, 2 * LONGEST_SIDE_PX), np.uint32)
    labels[:, LONGEST_SIDE_PX:] = 1
    (picture,) = draw_pictures([LabelledSlice(0, np.full(labels.shape, 7, np.uint8), labels)])
    assert (picture.width_px, picture.height_px) == (LONGEST_SIDE_PX, 600)
    assert picture.reduction == pytest.approx(2.0)
    layer = pixels(picture.overlay_png)
    assert (layer[:, : LONGEST_SIDE_PX // 2, 3] == 0).all()
    assert (layer[:, LONGEST_SIDE_PX // 2 :, 3] > 0).all()
    assert (pixels(picture.image_png) == 7).all()


def test_a_slice_without_image():
    (picture,) = draw_pictures([LabelledSlice(0, None, np.zeros((5, 5), np.uint32))])
    assert picture.image_png is None
    assert picture.objects == 0
