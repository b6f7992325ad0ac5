"""The look of a phantom: from the cells of one slice to grey levels as in serial electron microscopy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from dendsam_deploy.volume.phantom_noise import Floats, smooth_noise
from dendsam_deploy.volume.phantom_tissue import BOUTON, DENDRITE

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TextureStyle:
    """How a stack looks; grey levels are on the scale of uint8.

    Parameters
    ----------
    contrast : float
        Scale of all differences of tissue.
    noise : float
        Standard deviation of pixel noise, grey levels.
    membrane_width_px, membrane_level : float
        Width (px) of the dark line between two cells and its grey level against the mean.
    brightness : float
        Mean grey level.
    blur_px, grain_px : float
        Standard deviation of the optics' blur and of the grain of cytoplasm.
    grain, illumination : float
        Standard deviation of cytoplasmic grain and of uneven illumination, grey levels.
    tissue_darkness : float
        How much darker the tissue between dendrites is, grey levels.
    cristae : float
        Contrast of the cristae of mitochondria, grey levels.
    """

    contrast: float
    noise: float
    membrane_width_px: float
    membrane_level: float
    brightness: float
    blur_px: float
    grain_px: float
    grain: float
    illumination: float
    tissue_darkness: float
    cristae: float


@dataclass(frozen=True, slots=True)
class Tissue:
    """What lies in a slice.

    Parameters
    ----------
    cells : ndarray, shape (Y, X), uint32
        Index of the cell of each pixel.
    kinds : ndarray, shape (cells,), uint8
        DENDRITE, AXON, BOUTON or GLIA.
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
    inside = (tissue.mitochondria > 0) & (depth_px > 2)
    image = np.where(inside, _mitochondria(tissue.mitochondria, style.cristae, rng), image)
    half_width = style.membrane_width_px / 2 * np.clip(1 + 0.35 * smooth_noise(rng, shape, 24), 0.6, 2.2)
    membrane = np.exp(-((depth_px / half_width) ** 2))
    image = image * (1 - membrane) + style.membrane_level * membrane
    image = ndimage.gaussian_filter(image, style.blur_px) * style.contrast
    image += style.brightness + rng.normal(0, 3) + style.illumination * smooth_noise(rng, shape, 150)
    image += style.noise * rng.standard_normal(shape)
    grey: NDArray[np.uint8] = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return grey


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
    level = 40 - np.array([0.0, 0.7, 1.0, 1.3]) * style.tissue_darkness  # by kind
    grain_of = np.array([0.8, 0.9, 1.2, 1.5]) * style.grain
    # A cell keeps its own shade through the stack: hashed from its index, not drawn per slice.
    shade = 7.0 * np.sin(np.arange(len(tissue.kinds)) * 12.9898)
    grain = ndimage.gaussian_filter(rng.standard_normal(kind.shape), style.grain_px)
    grain /= grain.std()
    grain += 0.4 * smooth_noise(rng, kind.shape, 9)
    ground: Floats = shade[tissue.cells] + level[kind] + grain_of[kind] * grain
    return ground


def _specks(kind: NDArray[np.uint8], depth_px: Floats, rng: np.random.Generator) -> Floats:
    """Return dark dots (microtubules in dendrites) and rings (vesicles in axons), and thin curves of reticulum."""
    chance = np.array([0.006, 0.004, 0.03, 0.004])[kind] * (depth_px > 3)
    hits = (rng.random(kind.shape) < chance).astype(np.float64)
    dots = ndimage.gaussian_filter(hits * (kind != BOUTON), 0.8)
    vesicles = hits * (kind == BOUTON)
    rings = ndimage.gaussian_filter(vesicles, 1.7) * 1.6 - ndimage.gaussian_filter(vesicles, 0.9)
    curve = np.abs(smooth_noise(rng, kind.shape, 14))
    reticulum = np.exp(-((curve / 0.12) ** 2)) * (smooth_noise(rng, kind.shape, 40) > 1.0)
    reticulum *= (kind == DENDRITE) & (depth_px > 4)
    result: Floats = -260 * dots - 420 * rings - 45 * reticulum
    return result


def _mitochondria(depth: Floats, contrast: float, rng: np.random.Generator) -> Floats:
    """Return the grey levels of mitochondria: a dark rim and cristae in a dark matrix."""
    height, width = depth.shape
    y, x = np.mgrid[:height, :width]
    angle = rng.uniform(0, np.pi)
    phase = 1.3 * smooth_noise(rng, depth.shape, 20)
    cristae = np.sin((y * np.sin(angle) + x * np.cos(angle)) * (2 * np.pi / 5.5) + 2 * phase)
    rim = np.exp(-((depth - 0.8) ** 2))
    result: Floats = -14 + contrast * cristae - 24 * rim
    return result
