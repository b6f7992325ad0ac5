"""Variations of training tiles: what moves pixels moves labels alike, what changes grey values leaves labels alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dendsam_deploy.training.augment import (
    STRAIN_LIMIT,
    augmented,
    deform,
    displacement,
    flip_and_turn,
    through_thickness,
    vary_section,
)
from dendsam_deploy.training.options import AUGMENT_STRENGTHS


def tissue(shape=(96, 128), seed=0):
    """Return touching cells of a Voronoi diagram and an image that shows each in its own grey."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (14, 2)) * shape
    pixels = np.indices(shape).reshape(2, -1).T
    nearest = ((pixels[:, None] - points[None]) ** 2).sum(-1).argmin(1).reshape(shape)
    labels = (nearest + 1).astype(np.int32)
    labels[nearest == 3] = 0
    return (15 * labels + 20).astype(np.uint8), labels


@pytest.mark.parametrize("strength", AUGMENT_STRENGTHS)
def test_a_variation_depends_on_its_generator_alone(strength):
    image, labels = tissue()
    first, second = (augmented(image, labels, strength, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    others = [augmented(image, labels, strength, np.random.default_rng(seed))[0] for seed in range(6)]
    differ = any(other.shape != first[0].shape or (other != first[0]).any() for other in others)
    assert differ == (strength != "none")


def test_without_variation_a_tile_stays_as_it_is():
    image, labels = tissue()
    same_image, same_labels = augmented(image, labels, "none", np.random.default_rng(0))
    np.testing.assert_array_equal(same_image, image)
    np.testing.assert_array_equal(same_labels, labels)


@pytest.mark.parametrize("strength", ["light", "em"])
def test_no_object_appears_or_joins_another(strength):
    """Every object keeps its number, and the area of each changes by no more than the largest strain allows."""
    image, labels = tissue()
    before = np.bincount(labels.ravel(), minlength=16)
    seen = []
    for seed in range(12):
        varied, moved = augmented(image, labels, strength, np.random.default_rng(seed))
        assert (varied.dtype, moved.dtype) == (np.uint8, np.int32)
        assert sorted(varied.shape) == sorted(image.shape)
        assert varied.shape == moved.shape
        assert set(np.unique(moved)) == set(np.unique(labels))
        after = np.bincount(moved.ravel(), minlength=16)
        big = before > 200
        assert (after[big] <= before[big] / (1 - STRAIN_LIMIT) ** 2.5).all()
        assert (after[big] >= before[big] * (1 - STRAIN_LIMIT) ** 2.5).all()
        seen.append((np.sort(after) != np.sort(before)).any())
    assert any(seen) == (strength == "em")  # light ones only flip and turn


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 200), st.floats(0, STRAIN_LIMIT), st.integers(0, 2**32 - 1))
def test_a_displacement_neither_folds_nor_leaves_the_tile(height, width, strain, seed):
    shift = displacement((height, width), strain, np.random.default_rng(seed))
    assert shift.shape == (2, height, width)
    for axis in (1, 2):
        assert np.abs(np.diff(shift, axis=axis)).max(initial=0) <= strain + 1e-4
        border = np.take(shift, [0, -1], axis=axis)
        assert np.abs(border).max() <= 1e-3 * max(height, width)
    place = np.indices((height, width)) + shift
    for axis, side in ((0, height), (1, width)):
        assert place[axis].min() >= -0.5
        assert place[axis].max() <= side - 0.5
        # Along its own axis the map rises everywhere, so that no two pixels of a line come from the same place.
        assert (np.diff(place[axis], axis=axis) > 0).all()


@pytest.mark.parametrize("strain", [0.0, 0.1, STRAIN_LIMIT])
def test_image_and_labels_move_by_one_map(strain):
    image, labels = tissue()
    moved_image, moved_labels = deform(image, labels, strain, np.random.default_rng(3))
    place = np.indices(labels.shape) + displacement(labels.shape, strain, np.random.default_rng(3))
    oracle = ndimage.map_coordinates(labels, place, order=0, mode="nearest")
    assert (moved_labels != oracle).mean() < 1e-3  # halves may be rounded differently
    # Away from borders between objects, where grey values mix, the image shows the object that the labels name.
    inside = ndimage.minimum_filter(moved_labels, 3) == ndimage.maximum_filter(moved_labels, 3)
    assert inside.mean() > 0.5
    np.testing.assert_array_equal(moved_image[inside], 15 * moved_labels[inside] + 20)
    assert ((moved_labels != labels).any()) == (strain > 0)


def test_touching_objects_stay_apart_under_the_strongest_deformation():
    image, labels = tissue()
    for seed in range(8):
        _, moved = deform(image, labels, STRAIN_LIMIT, np.random.default_rng(seed))
        for number in np.unique(labels[labels > 0]):
            pieces = ndimage.label(moved == number)[1]
            assert pieces <= ndimage.label(labels == number)[1] + 1  # a corner may lose a pixel, nothing more


def test_faults_of_sections_change_grey_values_and_are_not_the_rule():
    image, _ = tissue((160, 160))
    varied = [vary_section(image, np.random.default_rng(seed)) for seed in range(60)]
    changed = [(result != image).any() for result in varied]
    assert 0.3 < np.mean(changed) < 0.75
    lost = [max((result == 0).mean(), (result == 255).mean()) for result in varied]
    assert max(lost) > 0.005  # some show a missing band,
    assert max(lost) < 0.12  # but never more of it than an annotator draws across
    assert any(result.mean() < 0.8 * image.mean() for result in varied)  # dark sections


def test_thicker_sections_absorb_as_beer_and_lambert_say():
    grey = np.array([[255.0, 200.0, 100.0, 10.0]], np.float32)
    density = -np.log(grey / 255)
    for thickness in (0.5, 1.0, 1.7):
        shown = through_thickness(grey, np.full_like(grey, thickness))
        np.testing.assert_allclose(shown, 255 * np.exp(-density * thickness), rtol=1e-5)


def test_all_eight_symmetries_occur():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    results = {flip_and_turn(image, image.astype(np.int32), np.random.default_rng(s))[0].tobytes() for s in range(60)}
    assert len(results) == 8
