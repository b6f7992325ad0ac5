"""Changes of a training tile that leave its truth valid: the ways in which one micrograph differs from the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray


def flip_and_turn(
    image: NDArray[np.uint8], labels: NDArray[np.int32], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Apply one of the eight symmetries of the square to an image and its labels, both ``(h, w)``.

    Sections have no up or down, so all eight are equally likely.
    """
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    return (image[:, ::-1], labels[:, ::-1]) if mirrored else (image, labels)


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
