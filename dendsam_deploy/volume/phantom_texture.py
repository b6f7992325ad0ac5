"""The look of a phantom: from the cells of one slice to grey levels as in serial electron microscopy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TextureStyle:
    """How a stack looks; grey levels are on the scale of uint8.

    Parameters
    ----------
    contrast : float
        Scale of all differences of tissue.
    noise : float
        Standard deviation of pixel noise, grey levels.
    membrane_width_px, membrane_depth : float
        Width (px) of the dark line between two cells and how much darker it is than cytoplasm.
    brightness : float
        Mean grey level.
    blur_px, grain_px : float
        Standard deviation of the optics' blur and of the grain of cytoplasm.
    grain, illumination : float
        Standard deviation of cytoplasmic grain and of uneven illumination, grey levels.
    tissue_darkness : float
        How much darker the tissue between dendrites is, grey levels.
    """

    contrast: float
    noise: float
    membrane_width_px: float
    membrane_depth: float
    brightness: float
    blur_px: float
    grain_px: float
    grain: float
    illumination: float
    tissue_darkness: float


@dataclass(frozen=True, slots=True)
class Tissue:
    """What lies in a slice.

    Parameters
    ----------
    cells : ndarray, shape (Y, X), uint32
        Index of the cell of each pixel.
    kinds : ndarray, shape (cells,), uint8
        0 dendrite, 1 axon, 2 axon with vesicles, 3 glia.
    mitochondria : ndarray, shape (Y, X), float64
        Depth inside a mitochondrion, px, 0 outside.
    """

    cells: NDArray[np.uint32]
    kinds: NDArray[np.uint8]
    mitochondria: Floats


def render_slice(tissue: Tissue, style: TextureStyle, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Paint one slice.

    Parameters
    ----------
    tissue : Tissue
        What lies where.
    style : TextureStyle
        How it looks.
    rng : numpy.random.Generator
        Source of grain and noise.

    Returns
    -------
    ndarray, shape (Y, X), uint8
        Grey levels.
    """
    shape = tissue.cells.shape
    depth_px = _depth_in_cell(tissue.cells)
    kind = tissue.kinds[tissue.cells]
    image = _cytoplasm(tissue, kind, style, rng)
    image += _specks(kind, depth_px, rng)
    inside = (tissue.mitochondria > 0) & (depth_px > 2) & (kind == 0)
    image = np.where(inside, _mitochondria(tissue.mitochondria, rng), image)
    half_width = style.membrane_width_px / 2 * np.clip(1 + 0.35 * smooth_noise(rng, shape, 24), 0.6, 2.2)
    membrane = np.exp(-((depth_px / half_width) ** 2))
    image = image * (1 - membrane) + (45 - style.membrane_depth) * membrane
    image = ndimage.gaussian_filter(image, style.blur_px) * style.contrast
    image += style.brightness + rng.normal(0, 3) + style.illumination * smooth_noise(rng, shape, 150)
    image += style.noise * rng.standard_normal(shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


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
    height, width = shape_yx
    coarse = rng.standard_normal((height // scale_px + 4, width // scale_px + 4))
    fine = ndimage.zoom(coarse, scale_px, order=2, mode="nearest", grid_mode=True)
    result: Floats = 1.5 * fine[scale_px : scale_px + height, scale_px : scale_px + width]
    return result


def _depth_in_cell(cells: NDArray[np.uint32]) -> Floats:
    """Return the distance (Y, X) of every pixel to the nearest border of its cell, px; 0.5 beside a border."""
    border = np.zeros(cells.shape, bool)
    for axis in range(2):
        first = tuple(slice(None, -1) if a == axis else slice(None) for a in range(2))
        second = tuple(slice(1, None) if a == axis else slice(None) for a in range(2))
        differs = cells[first] != cells[second]
        border[first] |= differs
        border[second] |= differs
    if not border.any():
        return np.full(cells.shape, float(max(cells.shape)))
    distance: Floats = ndimage.distance_transform_edt(~border) + 0.5
    return distance


def _cytoplasm(tissue: Tissue, kind: NDArray[np.uint8], style: TextureStyle, rng: np.random.Generator) -> Floats:
    """Return the ground of every cell, grey levels about 0, with its grain."""
    darkness = np.array(
        [-45.0, -45 + 0.7 * style.tissue_darkness, -45 + style.tissue_darkness, 10 + style.tissue_darkness]
    )
    grain_of = np.array([0.7, 0.9, 1.2, 1.8]) * style.grain
    # A cell keeps its own shade through the stack: hashed from its index, not drawn per slice.
    shade = 7.0 * np.sin(np.arange(len(tissue.kinds)) * 12.9898)
    grain = ndimage.gaussian_filter(rng.standard_normal(kind.shape), style.grain_px)
    grain *= 1 / grain.std()
    ground: Floats = shade[tissue.cells] - darkness[kind] + grain_of[kind] * grain
    return ground


def _specks(kind: NDArray[np.uint8], depth_px: Floats, rng: np.random.Generator) -> Floats:
    """Return dark dots (microtubules in dendrites) and rings (vesicles in axons), and thin curves of reticulum."""
    chance = np.array([0.006, 0.004, 0.03, 0.004])[kind] * (depth_px > 3)
    hits = (rng.random(kind.shape) < chance).astype(np.float64)
    dots = ndimage.gaussian_filter(hits * (kind != 2), 0.8)
    vesicles = hits * (kind == 2)
    rings = ndimage.gaussian_filter(vesicles, 1.7) * 1.6 - ndimage.gaussian_filter(vesicles, 0.9)
    curve = np.abs(smooth_noise(rng, kind.shape, 14))
    reticulum = np.exp(-((curve / 0.12) ** 2)) * (smooth_noise(rng, kind.shape, 40) > 1.0)
    reticulum *= (kind == 0) & (depth_px > 4)
    result: Floats = -150 * dots - 400 * rings - 38 * reticulum
    return result


def _mitochondria(depth: Floats, rng: np.random.Generator) -> Floats:
    """Return the grey levels of mitochondria: a dark rim and cristae in a dark matrix."""
    height, width = depth.shape
    y, x = np.mgrid[:height, :width]
    angle = rng.uniform(0, np.pi)
    phase = 1.3 * smooth_noise(rng, depth.shape, 20)
    cristae = np.sin((y * np.sin(angle) + x * np.cos(angle)) * (2 * np.pi / 5.5) + 2 * phase)
    rim = np.exp(-((depth - 0.8) ** 2))
    result: Floats = -18 + 12 * cristae - 30 * rim
    return result
