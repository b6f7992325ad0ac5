"""The deformation of a phantom and the small profiles that fill it between the dendrites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from dendsam_deploy.volume.phantom_dendrites import Part
from dendsam_deploy.volume.phantom_noise import Floats, blend_knots, knot_shape, smooth_noise

if TYPE_CHECKING:
    from numpy.typing import NDArray

DENDRITE, AXON, BOUTON, GLIA = 0, 1, 2, 3

_MARGIN_PX = 48  # material beyond the image, about as far as the warp and the drift of sites reach
_WARP_PX = ((90, 11.0), (26, 2.6), (11, 0.7))  # distance of knots, standard deviation of the displacement
_SLICES_PER_KNOT = 9.0


@dataclass(frozen=True, slots=True)
class Warp:
    """Smooth displacement of the image against the material, changing slowly along z.

    Parameters
    ----------
    shape_yx : (int, int)
        Rows and columns of a slice.
    knots : tuple of ndarray, each of shape (K, 2, rows, columns), float64
        Displacements at the knots of each length, px.
    """

    shape_yx: tuple[int, int]
    knots: tuple[Floats, ...]

    @classmethod
    def sample(cls, rng: np.random.Generator, shape_zyx: tuple[int, int, int]) -> Warp:
        """Draw a deformation of a stack."""
        shape_yx = shape_zyx[1:]
        times = int(shape_zyx[0] / _SLICES_PER_KNOT) + 3
        knots = (std * rng.standard_normal((times, 2, *knot_shape(shape_yx, scale))) for scale, std in _WARP_PX)
        return cls(shape_yx, tuple(knots))

    def material_yx(self, z: int) -> Floats:
        """Return the material coordinates (2, Y, X), px, of every pixel of a slice."""
        grid = np.indices(self.shape_yx).astype(np.float64)
        knot, part = divmod(z / _SLICES_PER_KNOT, 1.0)
        before, after = np.cos(part * np.pi / 2), np.sin(part * np.pi / 2)  # keeps the variance between knots
        for knots, (scale, _) in zip(self.knots, _WARP_PX, strict=True):
            now = before * knots[int(knot)] + after * knots[int(knot) + 1]
            grid += [blend_knots(axis, self.shape_yx, scale) for axis in now]
        return grid


@dataclass(frozen=True, slots=True)
class Packing:
    """Tissue without gaps: Voronoi regions of sites that drift along z; some neighbours share one cell.

    Parameters
    ----------
    site_yx : ndarray, shape (Z, N, 2), float64
        Sites, material px, in a frame that begins `_MARGIN_PX` before the image.
    cell_of_site : ndarray, shape (N,), uint32
        The cell, below N, to which each site belongs.
    kinds : ndarray, shape (N,), uint8
        AXON, BOUTON or GLIA, by cell.
    canvas_yx : (int, int)
        Rows and columns of the frame.
    """

    site_yx: Floats
    cell_of_site: NDArray[np.uint32]
    kinds: NDArray[np.uint8]
    canvas_yx: tuple[int, int]

    @classmethod
    def sample(
        cls, rng: np.random.Generator, shape_zyx: tuple[int, int, int], spacing_px: tuple[float, float]
    ) -> Packing:
        """Draw a packing whose sites keep a spacing that varies between two bounds."""
        depth, height, width = shape_zyx
        canvas = (height + 2 * _MARGIN_PX, width + 2 * _MARGIN_PX)
        sites = _scatter(rng, canvas, spacing_px)
        cell = np.arange(len(sites), dtype=np.uint32)
        for site in np.flatnonzero(rng.random(len(sites)) < 0.3):  # twins make long and concave profiles
            apart = ((sites - sites[site]) ** 2).sum(axis=1)
            apart[site] = np.inf
            cell[site] = cell[int(apart.argmin())]
        kinds = rng.choice(np.array([AXON, BOUTON], np.uint8), len(sites), p=[0.55, 0.45])
        glia = np.flatnonzero(smooth_noise(rng, canvas, 60)[tuple(sites.astype(int).T)] > 1.4)
        cell[glia] = glia[:1]  # one process that creeps between the others
        kinds[glia] = GLIA
        shared = np.cumsum(rng.normal(0, 0.4, (depth, 1, 2)), axis=0)
        own = rng.normal(0, 0.35, (1, len(sites), 2)) * (np.arange(depth) - depth / 2)[:, None, None]
        own = np.clip(own, -0.6 * spacing_px[1], 0.6 * spacing_px[1])
        return cls(sites + shared + own, cell, kinds, canvas)

    def cells(self, z: int, material_yx: Floats) -> NDArray[np.uint32]:
        """Return the cell (Y, X), from 0, at material coordinates (2, Y, X)."""
        limit = np.array(self.canvas_yx) - 1
        at = np.clip(np.rint(self.site_yx[z]), 0, limit).astype(np.intp)
        seeds = np.zeros(self.canvas_yx, np.int64)
        seeds[at[:, 0], at[:, 1]] = np.arange(1, len(at) + 1)
        nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
        region = self.cell_of_site[seeds[tuple(nearest)] - 1]
        there = np.clip(np.rint(material_yx + _MARGIN_PX), 0, limit[:, None, None]).astype(np.intp)
        cells: NDArray[np.uint32] = region[there[0], there[1]]
        return cells

    def parts(self, first_owner: int) -> list[Part]:
        """Return the room around each site, as round parts that belong to its cell, for organelles to lie in."""
        middle = self.site_yx[len(self.site_yx) // 2]
        found = []
        for site, yx in enumerate(middle):
            apart = np.hypot(*(middle - yx).T)
            apart[site] = np.inf
            room = np.full((len(self.site_yx), 2), 0.6 * apart.min())
            owner = first_owner + int(self.cell_of_site[site])
            found.append(Part(owner, self.site_yx[:, site] - _MARGIN_PX, room, np.full(len(room), yx[0])))
        return found


def _scatter(rng: np.random.Generator, canvas_yx: tuple[int, int], spacing_px: tuple[float, float]) -> Floats:
    """Throw sites (N, 2) no closer to each other than a spacing that varies smoothly over the field."""
    smallest, largest = spacing_px
    share = np.clip(0.5 + 0.35 * smooth_noise(rng, canvas_yx, 50), 0, 1) ** 2
    spacing = smallest + share * (largest - smallest)
    tries = int(4 * canvas_yx[0] * canvas_yx[1] / smallest**2)
    kept = np.full((tries, 2), np.inf)
    count = 0
    for y, x in rng.uniform((0, 0), canvas_yx, (tries, 2)):
        apart = np.maximum(np.abs(kept[:count, 0] - y), np.abs(kept[:count, 1] - x))
        if apart.min(initial=np.inf) >= 0.9 * spacing[int(y), int(x)]:
            kept[count] = y, x
            count += 1
    return kept[:count]
