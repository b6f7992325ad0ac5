"""Changes of a training tile that leave its truth valid: the ways in which one micrograph differs from the next.

Whatever moves pixels moves image and labels by one map, the labels by nearest neighbour, so that no label appears that
was not there and no two objects become one. Whatever changes grey values leaves the labels alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.training.options import AugmentStrength

STRAIN_LIMIT = 0.3
"""Largest derivative of a displacement. Below 1 a map is one-to-one: it neither folds nor tears."""

_NODE_PX = 96.0
"""About how far apart tissue moves independently of each other, px."""

_FIELD_STEP_PX = 8
"""Displacements are smooth: they are computed on a grid of that spacing and interpolated."""


def augmented(
    image: NDArray[np.uint8], labels: NDArray[np.int32], strength: AugmentStrength, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Vary an image and its labels, both ``(h, w)``; quarter turns exchange the sides.

    Parameters
    ----------
    image : ndarray, shape (h, w), uint8
        Grey values.
    labels : ndarray, shape (h, w), int32
        Objects, 0 elsewhere.
    strength : str
        One of `options.AUGMENT_STRENGTHS`.
    rng : numpy.random.Generator
        Source of all choices.
    """
    if strength == "none":
        return image, labels
    image, labels = flip_and_turn(image, labels, rng)
    if strength == "em":
        if rng.random() < 0.5:
            image, labels = deform(image, labels, rng.uniform(0.05, STRAIN_LIMIT), rng)
        image = vary_section(image, rng)
    return vary_intensity(image, rng), labels


def flip_and_turn(
    image: NDArray[np.uint8], labels: NDArray[np.int32], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Apply one of the eight symmetries of the square to an image and its labels, both ``(h, w)``.

    Sections have no up or down, so all eight are equally likely.
    """
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    return (image[:, ::-1], labels[:, ::-1]) if mirrored else (image, labels)


def deform(
    image: NDArray[np.uint8], labels: NDArray[np.int32], strain: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Stretch and bend an image and its labels, both ``(h, w)``, as cutting and the beam deform a section.

    The border stays where it is, so nothing is needed from beyond it.

    Parameters
    ----------
    image : ndarray, shape (h, w), uint8
        Resampled bilinearly.
    labels : ndarray, shape (h, w), int32
        Resampled by nearest neighbour.
    strain : float
        Largest derivative of the displacement, at most `STRAIN_LIMIT`: 0.1 changes lengths by up to a tenth.
    rng : numpy.random.Generator
        Source of all choices.
    """
    shift = displacement(image.shape, strain, rng)
    place = np.indices(image.shape, np.float32) + shift
    moved: NDArray[np.float32] = ndimage.map_coordinates(image, place, np.float32, order=1, mode="nearest")
    rows, columns = (
        np.clip(np.rint(axis), 0, n - 1).astype(np.intp) for axis, n in zip(place, image.shape, strict=True)
    )
    return np.rint(moved).astype(np.uint8), labels[rows, columns]


def displacement(shape_hw: tuple[int, ...], strain: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a smooth field that says for each pixel from where its value comes.

    It is a random affine map, and bends between nodes about `_NODE_PX` apart, faded out towards the border; then it is
    scaled so that none of its four derivatives exceeds `strain`.

    Returns
    -------
    ndarray, shape (2, h, w), float32
        Shift in y and x, px; 0 at the border.
    """
    grid = tuple(max(3, 1 + round(length / _FIELD_STEP_PX)) for length in shape_hw)
    nodes = tuple(max(4, 1 + round(length / _NODE_PX)) for length in shape_hw)
    spacing = [(length - 1) / max(count - 1, 1) for length, count in zip(shape_hw, grid, strict=True)]
    y, x = (np.linspace(-1, 1, count) * length / 2 for count, length in zip(grid, shape_hw, strict=True))
    affine = rng.uniform(-1, 1, (2, 2))
    bends = np.stack([ndimage.zoom(rng.normal(size=nodes), np.divide(grid, nodes), order=3) for _ in range(2)])
    linear = affine[:, :1, None] * y[:, None] + affine[:, 1:, None] * x[None]
    # Equal parts of both, measured by how far they move things.
    field = linear / max(np.abs(linear).max(), 1e-6) + bends / max(np.abs(bends).max(), 1e-6)
    field *= (1 - np.linspace(-1, 1, grid[0]) ** 2)[:, None] * (1 - np.linspace(-1, 1, grid[1]) ** 2)
    steepest = max(
        np.abs(np.diff(field, axis=axis)).max() / max(step, 1e-6) for axis, step in zip((1, 2), spacing, strict=True)
    )
    field *= strain / max(steepest, 1e-12)
    corners = [np.linspace(0, count - 1, length) for count, length in zip(grid, shape_hw, strict=True)]
    place = np.stack(np.meshgrid(*corners, indexing="ij"))
    return np.stack([ndimage.map_coordinates(part, place, np.float32, order=1) for part in field])


def vary_section(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Give an image ``(h, w)`` faults of single sections: uneven thickness, a dark section, dark or missing bands.

    Each is drawn on its own; most sections get none or one of them.
    """
    grey = image.astype(np.float32)
    if rng.random() < 0.3:
        grey = through_thickness(grey, _profile(grey.shape, rng.uniform(0.1, 0.4), rng))
    if rng.random() < 0.1:  # a section that was exposed or stained badly
        grey = grey * rng.uniform(0.35, 0.75)
    if rng.random() < 0.15:  # a fold, a knife mark or dirt
        grey = grey * (1 - rng.uniform(0.3, 0.8) * _band(grey.shape, rng.uniform(0.004, 0.02), rng))
    if rng.random() < 0.1:  # a crack or a stripe that was not recorded
        lost = _band(grey.shape, rng.uniform(0.005, 0.02), rng) > np.exp(-0.5)
        grey = np.where(lost, rng.choice(np.array([0.0, 255.0])), grey)
    varied: NDArray[np.uint8] = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return varied


def through_thickness(grey: NDArray[np.float32], thickness: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return grey values 0 to 255, ``(h, w)``, as a section of another thickness shows them.

    Of the light that enters a section ``exp(-d t)`` leaves it, where d is its density and t its thickness, so thicker
    parts are darker.

    Parameters
    ----------
    grey : ndarray, shape (h, w), float32
        Grey values at a thickness of 1.
    thickness : ndarray, shape (h, w), float32
        Positive.
    """
    passed: NDArray[np.float32] = (255.0 * (np.clip(grey, 0, 255) / 255.0) ** thickness).astype(np.float32)
    return passed


def vary_intensity(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Change contrast, brightness, gamma, focus, noise and illumination of a micrograph.

    Parameters
    ----------
    image : ndarray, shape (h, w), uint8
        Grey values.
    rng : numpy.random.Generator
        Source of all choices.

    Returns
    -------
    ndarray, shape (h, w), uint8
    """
    grey = image.astype(np.float32)
    if rng.random() < 0.3:
        grey = ndimage.gaussian_filter(grey, rng.uniform(0.4, 1.2))
    mean = grey.mean()
    grey = (grey - mean) * rng.uniform(0.7, 1.35) + mean + rng.uniform(-25, 25)
    if rng.random() < 0.3:
        grey = 255.0 * (np.clip(grey, 0, 255) / 255.0) ** rng.uniform(0.7, 1.4)
    if rng.random() < 0.3:
        grey += _illumination(grey.shape, rng)
    if rng.random() < 0.5:
        grey += rng.normal(0, rng.uniform(2, 14), grey.shape)
    varied: NDArray[np.uint8] = np.clip(grey, 0, 255).astype(np.uint8)
    return varied


def _illumination(shape_hw: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a smooth ramp across the field, as charging or uneven staining produce it."""
    y, x = np.linspace(-1, 1, shape_hw[0])[:, None], np.linspace(-1, 1, shape_hw[1])[None]
    slope_y, slope_x = rng.uniform(-20, 20, 2)
    ramp: NDArray[np.float32] = (slope_y * y + slope_x * x).astype(np.float32)
    return ramp


def _profile(shape_hw: tuple[int, ...], amplitude: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a thickness around 1 that changes in one direction only, as a vibrating knife leaves it."""
    along = _along(shape_hw, rng)
    waves = rng.uniform(0.5, 6)
    profile: NDArray[np.float32] = (1 + amplitude * np.sin(2 * np.pi * (waves * along + rng.random()))).astype(
        np.float32
    )
    return profile


def _band(shape_hw: tuple[int, ...], width: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a straight ridge of height 1 across the field; `width` is its standard deviation in parts of the field."""
    along = _along(shape_hw, rng)
    ridge: NDArray[np.float32] = np.exp(-0.5 * ((along - rng.uniform(-0.4, 0.4)) / width) ** 2).astype(np.float32)
    return ridge


def _along(shape_hw: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return how far each pixel lies in a random direction, in parts of the longer side, 0 in the middle."""
    angle = rng.uniform(0, np.pi)
    y, x = (np.arange(length) - (length - 1) / 2 for length in shape_hw)
    distance: NDArray[np.float64] = (np.sin(angle) * y[:, None] + np.cos(angle) * x) / max(shape_hw)
    return distance
