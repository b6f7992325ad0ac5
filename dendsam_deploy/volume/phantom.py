"""A seeded synthetic stack of dendrites in neuropil, with exact labels: for training, tests and demonstrations.

Everything is drawn in *material* coordinates, which a smooth noise field bends into the image slice by slice.
Dendrites are unions of bent, lobed ellipses that move along z; the tissue between them is a Voronoi packing of
small moving sites. Every profile ends with its membrane, which is labelled with it; only the membrane that two labelled
profiles share belongs to neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.volume.phantom_dendrites import (
    Part,
    depth_in_mitochondria,
    grow_dendrites,
    nearest_dendrite,
    sample_mitochondria,
)
from dendsam_deploy.volume.phantom_texture import TextureStyle, Tissue, render_slice
from dendsam_deploy.volume.phantom_tissue import DENDRITE, Packing, Warp

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SPARSE_SPACING_PX = (8.0, 15.0)  # of axons between labelled dendrites
_DENSE_SPACING_PX = (13.0, 60.0)  # of profiles that are all labelled
_SMALLEST_PIECE_PX = 200  # smaller pieces of an object in a slice are slivers of the geometry, not profiles
_MOST_VOXELS = 1 << 30


@dataclass(frozen=True, slots=True)
class PhantomOptions:
    """What kind of stack to make. None lets the seed choose, so that many seeds give varied stacks.

    Parameters
    ----------
    shape_zyx : (int, int, int)
        Slices, rows, columns; at least 1 x 64 x 64.
    seed : int
        Same options and seed, same bytes.
    voxel_size_nm : (float, float, float)
        Recorded voxel size ``(z, y, x)``; its anisotropy decides for how many slices a tube within the plane is seen.
    dendrite_fraction : float or None
        Share of the field to fill with dendrites, 0 to 0.8; None: 0.35 to 0.55.
    dense : bool
        Label every profile, as in a dense reconstruction, and pack larger profiles between the dendrites.
    missing_slice : int or None
        Index of a slice that was lost: blank in the image, kept in the labels.
    contrast : float or None
        Scale of grey-level differences; None: 0.75 to 1.25.
    noise : float or None
        Standard deviation of the pixel noise in grey levels; None: 3 to 14.
    membrane_width_px : float or None
        Width of the dark line between two profiles; None: 2 to 4.
    """

    shape_zyx: tuple[int, int, int] = (16, 384, 384)
    seed: int = 0
    voxel_size_nm: tuple[float, float, float] = (40.0, 15.0, 15.0)
    dendrite_fraction: float | None = None
    dense: bool = False
    missing_slice: int | None = None
    contrast: float | None = None
    noise: float | None = None
    membrane_width_px: float | None = None

    def __post_init__(self) -> None:
        depth, height, width = self.shape_zyx
        if depth < 1 or min(height, width) < 64:
            raise InvalidArgumentError(
                f"a phantom of shape {self.shape_zyx} is too small, expected at least (1, 64, 64)"
            )
        if math.prod(self.shape_zyx) > _MOST_VOXELS:
            raise InvalidArgumentError(
                f"a phantom of shape {self.shape_zyx} needs about {math.prod(self.shape_zyx) * 24 / 2**30:.0f} GiB of "
                f"memory, expected at most {_MOST_VOXELS:,} voxels; make several smaller ones"
            )
        if self.seed < 0:
            raise InvalidArgumentError(f"seed is {self.seed}, expected a number of at least 0")
        if min(self.voxel_size_nm) <= 0:
            raise InvalidArgumentError(f"voxel size is {self.voxel_size_nm} nm, expected three positive lengths")
        if self.missing_slice is not None and not 0 <= self.missing_slice < depth:
            raise InvalidArgumentError(f"missing slice is {self.missing_slice}, expected 0 to {depth - 1}")
        for name, least in (("contrast", 0.01), ("noise", 0.0), ("membrane_width_px", 0.1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InvalidArgumentError(f"{name} is {value}, expected at least {least}")
        if self.dendrite_fraction is not None and not 0 <= self.dendrite_fraction <= 0.8:
            raise InvalidArgumentError(f"dendrite fraction is {self.dendrite_fraction}, expected 0 to 0.8")


@dataclass(frozen=True, slots=True)
class Phantom:
    """A synthetic stack and its truth.

    Parameters
    ----------
    raw : ndarray, shape (Z, Y, X), uint8
        The image.
    labels : ndarray, shape (Z, Y, X), uint32
        Ids of the objects from 1, 0 elsewhere; each id is one 26-connected object. An object ends with its membrane;
        where two labelled ones touch, the two pixels of their common membrane are 0. Pieces under 200 px in a slice are
        not labelled. A missing slice keeps its true labels.
    voxel_size_nm : (float, float, float)
        Voxel size ``(z, y, x)``.
    missing_slices : tuple of int
        Slices that are blank in `raw`.
    """

    raw: NDArray[np.uint8]
    labels: NDArray[np.uint32]
    voxel_size_nm: tuple[float, float, float]
    missing_slices: tuple[int, ...]

    @property
    def labels_2d(self) -> NDArray[np.uint32]:
        """Labels (Z, Y, X), uint32, of profiles: 8-connected pieces of objects, numbered from 1 in each slice."""
        return np.stack([_connected_pieces(plane) for plane in self.labels])


def make_phantom(options: PhantomOptions | None = None) -> Phantom:
    """Make a stack of branching dendrites in other tissue.

    Parameters
    ----------
    options : PhantomOptions or None
        What to make; None stands for the defaults.

    Returns
    -------
    Phantom
        Image and exact labels; equal options give equal bytes on the same CPU and numpy.
    """
    options = options or PhantomOptions()
    # One stream of random numbers per purpose: overriding the style leaves the geometry as it is.
    style_rng, shape_rng, site_rng, warp_rng, organelle_rng, grain_rng = (
        np.random.default_rng([options.seed, purpose]) for purpose in range(6)
    )
    depth = options.shape_zyx[0]
    share = shape_rng.uniform(0.35, 0.55)
    share = share if options.dendrite_fraction is None else options.dendrite_fraction
    z_step_px = options.voxel_size_nm[0] / options.voxel_size_nm[2]
    parts = grow_dendrites(shape_rng, options.shape_zyx, share, z_step_px)
    packing = Packing.sample(site_rng, options.shape_zyx, _DENSE_SPACING_PX if options.dense else _SPARSE_SPACING_PX)
    warp = Warp.sample(warp_rng, options.shape_zyx)
    cells, labels = _fill(parts, packing, warp, dense=options.dense, depth=depth)
    first_cell = 1 + max((part.owner for part in parts), default=0)
    kinds = np.concatenate([np.full(first_cell, DENDRITE, np.uint8), packing.kinds])
    hosts = parts + packing.parts(first_cell) if options.dense else parts
    mitochondria = sample_mitochondria(organelle_rng, hosts, depth)
    style = _sample_style(style_rng, options)
    raw = np.empty(options.shape_zyx, np.uint8)
    for z in range(depth):
        inside = depth_in_mitochondria(mitochondria, z, warp.material_yx(z), cells[z])
        raw[z] = render_slice(Tissue(cells[z], kinds, inside), style, grain_rng)
    missing = () if options.missing_slice is None else (options.missing_slice,)
    raw[list(missing)] = 0
    return Phantom(raw, labels, options.voxel_size_nm, missing)


def _fill(
    parts: list[Part], packing: Packing, warp: Warp, *, dense: bool, depth: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return what fills each voxel (Z, Y, X), dendrites from 1 and then cells of the packing, and the exact labels."""
    first_cell = 1 + max((part.owner for part in parts), default=0)
    between = np.empty((depth, *warp.shape_yx), np.uint32)
    owner = np.empty_like(between)
    for z in range(depth):
        material_yx = warp.material_yx(z)
        between[z] = packing.cells(z, material_yx) + first_cell
        owner[z] = nearest_dendrite(parts, z, material_yx)
    labels = _exact_labels(np.where(owner > 0, owner, between) if dense else owner)
    kept = (owner > 0) & (labels > 0)  # a sliver without a label must not look like a dendrite
    return np.where(kept, owner, between), _parted(labels)


def _sample_style(rng: np.random.Generator, options: PhantomOptions) -> TextureStyle:
    """Choose the look of the stack, but for what the options fix."""
    contrast, noise, membrane = rng.uniform((0.75, 3.0, 2.0), (1.25, 14.0, 4.0))
    return TextureStyle(
        contrast=contrast if options.contrast is None else options.contrast,
        noise=noise if options.noise is None else options.noise,
        membrane_width_px=membrane if options.membrane_width_px is None else options.membrane_width_px,
        membrane_level=-rng.uniform(35, 70),
        brightness=rng.uniform(112, 142),
        blur_px=rng.uniform(0.4, 1.1),
        grain_px=rng.uniform(0.7, 1.8),
        grain=rng.uniform(5, 14),
        illumination=rng.uniform(2, 9),
        tissue_darkness=rng.uniform(24, 44),
        cristae=rng.uniform(0, 14),
    )


def _exact_labels(cells: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the 26-connected objects of cells (Z, Y, X), numbered from 1, without slivers of a slice."""
    kept = np.zeros_like(cells)
    for z, plane in enumerate(cells):
        pieces = _connected_pieces(plane)
        large = np.bincount(pieces.ravel()) >= _SMALLEST_PIECE_PX
        kept[z] = np.where(large[pieces], plane, 0)
    return _connected_pieces(kept)


def _parted(labels: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Take the pixels on either side of a contact of two labels in a slice away from both; return the objects then."""
    apart = labels.copy()
    for plane, result in zip(labels, apart, strict=True):
        highest = ndimage.maximum_filter(plane, size=3)
        lowest = ndimage.minimum_filter(np.where(plane > 0, plane, np.iinfo(np.uint32).max), size=3)
        result[(plane > 0) & ((highest != plane) | (lowest != plane))] = 0
    return _connected_pieces(apart)


def _connected_pieces(labels: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the pieces of labels, connected over faces, edges and corners, numbered from 1 in the order of labels."""
    pieces = np.zeros(labels.shape, np.uint32)
    full = np.ones((3,) * labels.ndim, bool)
    count = 0
    for label, box in enumerate(ndimage.find_objects(labels.astype(np.int64)), start=1):
        if box is None:
            continue
        found, number = ndimage.label(labels[box] == label, structure=full)
        inside = found > 0
        pieces[box][inside] = found[inside] + count
        count += number
    return pieces
