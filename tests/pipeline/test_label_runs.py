"""Pieces, holes and outlines found on runs, against connected components of whole images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import RunLengths
from dendsam_deploy.pipeline.label_runs import LabelRuns


@st.composite
def label_images(draw: st.DrawFn) -> np.ndarray:
    """Blocks of up to three labels with specks of background: many corners, holes, and holes between two objects."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    blocks = rng.integers(0, 4, rng.integers(1, 12, 2))
    image = np.kron(blocks, np.ones(rng.integers(1, 6, 2), int))
    image[rng.random(image.shape) < draw(st.sampled_from([0, 0.05, 0.3]))] = 0
    return image.astype(np.int32)


def filled_by_components(image: np.ndarray, below_px: float) -> np.ndarray:
    """Fill the holes one by one: background that touches neither the border nor more than one label."""
    filled = image.copy()
    empty, count = ndimage.label(image == 0)
    for hole in range(1, count + 1):
        inside = empty == hole
        touched = set(image[ndimage.binary_dilation(inside)]) - {0}
        at_border = inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any()
        if inside.sum() < below_px and len(touched) == 1 and not at_border:
            filled[inside] = touched.pop()
    return filled


@settings(deadline=None, max_examples=150)
@given(label_images())
def test_an_image_comes_back_from_its_runs(image: np.ndarray):
    runs = LabelRuns.of(image)
    np.testing.assert_array_equal(runs.to_image(), image)
    assert runs.to_image().dtype == np.uint32
    rows, columns = np.divmod(runs.starts, image.shape[1])
    beside = image[rows, columns - 1] != image[rows, columns]
    assert (beside | (columns == 0)).all(), "runs are as long as can be"


@settings(deadline=None, max_examples=150)
@given(label_images(), st.sets(st.integers(1, 3)))
def test_pieces_are_the_connected_components_of_each_label(image: np.ndarray, labels: set[int]):
    runs = LabelRuns.of(image)
    piece = np.repeat(runs.pieces(np.isin(runs.labels, list(labels))), runs.lengths_px).reshape(image.shape)
    np.testing.assert_array_equal(piece > 0, np.isin(image, list(labels)))
    total = 0
    for label in labels:
        components, count = ndimage.label(image == label, np.ones((3, 3)))
        pairs = {(int(a), int(b)) for a, b in zip(components[components > 0], piece[components > 0], strict=True)}
        assert len(pairs) == len({b for _, b in pairs}) == count
        total += count
    assert set(np.unique(piece)) - {0} == set(range(1, total + 1))


@settings(deadline=None, max_examples=300)
@given(label_images(), st.integers(1, 9))
def test_holes_are_filled_as_if_each_were_looked_at(image: np.ndarray, below_px: int):
    filled = LabelRuns.of(image).without_holes(below_px)
    np.testing.assert_array_equal(filled.to_image(), filled_by_components(image, below_px))
    again = LabelRuns.of(filled.to_image())
    np.testing.assert_array_equal(again.starts, filled.starts)
    np.testing.assert_array_equal(again.labels, filled.labels)


@settings(deadline=None, max_examples=100)
@given(label_images())
def test_outlines_are_the_objects_in_their_bounding_windows(image: np.ndarray):
    present = np.unique(image[image > 0])
    image = np.searchsorted(np.append(0, present), image)
    outlines = LabelRuns.of(image).outlines(len(present))
    assert len(outlines) == len(present)
    for label, outline in enumerate(outlines, start=1):
        rows, columns = np.nonzero(image == label)
        y0, x0 = rows.min(), columns.min()
        window = Window(y0, x0, rows.max() + 1 - y0, columns.max() + 1 - x0)
        expected = RunLengths.from_mask((image == label)[window.slices], window)
        assert outline.window == window
        np.testing.assert_array_equal(outline.runs, expected.runs)


def test_small_holes_of_one_object_are_filled_and_gaps_between_objects_are_not():
    labels = np.zeros((12, 20), np.uint32)
    labels[1:7, 1:7] = 1
    labels[3, 3] = 0  # a hole
    labels[1:7, 10:14] = 2
    labels[1:7, 14:18] = 3
    labels[4, 13:15] = 0  # a gap between two objects
    labels[0, 19] = 0
    expected = labels.copy()
    expected[3, 3] = 1
    np.testing.assert_array_equal(LabelRuns.of(labels).without_holes(4.0).to_image(), expected)


def test_large_holes_and_bays_at_the_border_stay_open():
    labels = np.ones((12, 12), np.uint32)
    labels[2:6, 2:6] = 0
    labels[0, 8] = 0
    np.testing.assert_array_equal(LabelRuns.of(labels).without_holes(16.0).to_image(), labels)
    labels[2:6, 2:6] = 1
    labels[11, 3:5] = labels[5, 0] = labels[7, 11] = 0
    np.testing.assert_array_equal(LabelRuns.of(labels).without_holes(16.0).to_image(), labels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_thin_images_have_no_holes(shape: tuple[int, int]):
    image = (np.arange(9)[: shape[0] * shape[1]].reshape(shape) % 2).astype(np.int32)
    assert LabelRuns.of(image).without_holes(5.0).to_image().tolist() == image.tolist()
    assert LabelRuns.of(np.zeros(shape, np.int32)).outlines(0) == ()
