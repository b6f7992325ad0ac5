"""Smooth random fields for phantoms: cubic B-splines over random knots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SPLINE_STD = 0.479  # of a 2-D cubic B-spline whose knots are independent with variance 1, averaged over a knot's cell


def smooth_noise(rng: np.random.Generator, shape_yx: tuple[int, ...], scale_px: int) -> Floats:
    """Return noise of about unit variance that varies over a length.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    shape_yx : (int, int)
        Shape of the result.
    scale_px : int
        Distance of the knots, px.

    Returns
    -------
    ndarray, shape `shape_yx`, float64
        The noise.
    """
    return blend_knots(rng.standard_normal(knot_shape(shape_yx, scale_px)), shape_yx, scale_px)


def knot_shape(shape_yx: tuple[int, ...], scale_px: int) -> tuple[int, int]:
    """Return how many knots of a distance (px) a field of a shape needs."""
    return shape_yx[0] // scale_px + 4, shape_yx[1] // scale_px + 4


def blend_knots(knots: Floats, shape_yx: tuple[int, ...], scale_px: int) -> Floats:
    """Return the field (Y, X) of knots of unit variance, itself of about unit variance."""
    down, across = (
        _spline_weights(length, scale_px, count) for length, count in zip(shape_yx, knots.shape, strict=True)
    )
    field: Floats = down @ knots @ across.T / _SPLINE_STD
    return field


def _spline_weights(length: int, scale_px: int, count: int) -> Floats:
    """Return the weights (length, count) of the cubic B-spline's knots at every pixel."""
    apart = np.abs(np.arange(length)[:, None] / scale_px + 1 - np.arange(count))
    near = 2 / 3 - apart**2 + apart**3 / 2
    far = np.clip(2 - apart, 0, None) ** 3 / 6
    weights: Floats = np.where(apart < 1, near, far)
    return weights
