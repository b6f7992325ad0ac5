"""A seeded synthetic stack of dendrites in neuropil, with exact labels: for training, tests and demonstrations.

Everything is drawn in *material* coordinates, which a smooth noise field bends into the image slice by slice. Dendrites are
unions of bent, lobed ellipses that move along z; the tissue between them is a Voronoi packing of small moving sites. Where two
profiles meet there is a membrane, and it belongs to the labels on both of its sides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.volume.phantom_texture import TextureStyle, Tissue, render_slice, smooth_noise

Floats = NDArray[np.float64]

_MARGIN_PX = 48  # material beyond the image, more than the warp and the drift of sites can reach
_SMALLEST_PIECE_PX = 30  # smaller pieces of an object in a slice are slivers of the geometry, not profiles


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
        Scale of grey-level differences; None: 0.65 to 1.15.
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
        if self.seed < 0:
            raise InvalidArgumentError(f"seed is {self.seed}, expected a number of at least 0")
        if min(self.voxel_size_nm) <= 0:
            raise InvalidArgumentError(f"voxel size is {self.voxel_size_nm} nm, expected three positive lengths")
        if self.missing_slice is not None and not 0 <= self.missing_slice < depth:
            raise InvalidArgumentError(f"missing slice is {self.missing_slice}, expected 0 to {depth - 1}")
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
        Ids of the objects from 1, 0 elsewhere; each id is one 26-connected object. Membranes belong to the object they bound.
        A missing slice keeps its true labels.
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
        """Labels ``(Z, Y, X)`` of the profiles: 8-connected pieces of objects, numbered from 1 in each slice; made on each access."""
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
        Image and exact labels; equal options give equal bytes.
    """
    options = options or PhantomOptions()
    depth, height, width = options.shape_zyx
    # One stream of random numbers per purpose: overriding the style leaves the geometry as it is.
    style_rng, shape_rng, site_rng, warp_rng, grain_rng = (
        np.random.default_rng([options.seed, purpose]) for purpose in range(5)
    )
    style = _sample_style(style_rng, options)
    warps = _Warp.sample(warp_rng, options.shape_zyx)
    dendrites = _grow_dendrites(shape_rng, options)
    packing = _Packing.sample(site_rng, options)
    count = 1 + max((part.owner for part in dendrites), default=0)
    cells = np.zeros(options.shape_zyx, np.uint32)
    for z in range(depth):
        material_yx = warps.material_yx(z)
        plane = packing.cells(z, material_yx) + count
        owner = _nearest_dendrite(dendrites, z, material_yx)
        cells[z] = np.where(owner > 0, owner, plane)
    labels = _exact_labels(np.where(cells < count, cells, 0) if not options.dense else cells)
    raw = np.empty(options.shape_zyx, np.uint8)
    kinds = np.concatenate([np.zeros(count, np.uint8), packing.kinds])
    organelles = _sample_organelles(shape_rng, dendrites, depth)
    for z in range(depth):
        tissue = Tissue(cells[z], kinds, _organelle_map(organelles, z, warps.material_yx(z)))
        raw[z] = render_slice(tissue, style, grain_rng)
    missing = () if options.missing_slice is None else (options.missing_slice,)
    raw[list(missing)] = 0
    return Phantom(raw, labels, options.voxel_size_nm, missing)


def _sample_style(rng: np.random.Generator, options: PhantomOptions) -> TextureStyle:
    """Choose the look of the stack, but for what the options fix."""
    contrast, noise, membrane = rng.uniform((0.65, 3.0, 2.0), (1.15, 14.0, 4.0))
    return TextureStyle(
        contrast=contrast if options.contrast is None else options.contrast,
        noise=noise if options.noise is None else options.noise,
        membrane_width_px=membrane if options.membrane_width_px is None else options.membrane_width_px,
        membrane_depth=rng.uniform(70, 115),
        brightness=rng.uniform(112, 142),
        blur_px=rng.uniform(0.4, 1.1),
        grain_px=rng.uniform(0.7, 1.8),
        grain=rng.uniform(5, 14),
        illumination=rng.uniform(2, 9),
        tissue_darkness=rng.uniform(18, 42),
    )


@dataclass(frozen=True, slots=True)
class _Warp:
    """Smooth displacement of the image against the material, changing slowly along z."""

    shape_yx: tuple[int, int]
    knots: tuple[NDArray[np.float64], ...]  # per scale: (K, 2, rows, columns), px
    scales_px: tuple[int, ...]
    slices_per_knot: float = 9.0

    @classmethod
    def sample(cls, rng: np.random.Generator, shape_zyx: tuple[int, int, int]) -> _Warp:
        depth, height, width = shape_zyx
        scales, amplitudes = (90, 26), (10.0, 2.6)
        knots = int(depth / 9.0) + 3
        fields = tuple(
            amplitude * rng.standard_normal((knots, 2, height // scale + 4, width // scale + 4))
            for scale, amplitude in zip(scales, amplitudes, strict=True)
        )
        return cls((height, width), fields, scales)

    def material_yx(self, z: int) -> Floats:
        """Return the material coordinates (2, Y, X) of every pixel of a slice."""
        height, width = self.shape_yx
        grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).astype(np.float64)
        knot, part = divmod(z / self.slices_per_knot, 1.0)
        before, after = np.cos(part * np.pi / 2), np.sin(part * np.pi / 2)  # keeps the variance between knots
        for field_, scale in zip(self.knots, self.scales_px, strict=True):
            coarse = before * field_[int(knot)] + after * field_[int(knot) + 1]
            for axis in range(2):
                fine = ndimage.zoom(coarse[axis], scale, order=3, mode="nearest", grid_mode=True)
                grid[axis] += fine[scale : scale + height, scale : scale + width]
        return grid


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of a dendrite: in each slice a bent, lobed ellipse (half axes of 0: absent)."""

    owner: int
    centre_yx: Floats  # (Z, 2) px
    half_axes: Floats  # (Z, 2) px, along and across
    angle: Floats  # (Z,) rad, of the long axis against x
    bend: float = 0.0  # sagitta of the long axis over its half length
    lobes: Floats = field(default_factory=lambda: np.zeros((3, 2)))  # amplitude and phase of harmonics 2, 3, 5

    def distance(self, z: int, yx: Floats) -> Floats:
        """Return roughly how far points (2, ...) lie outside (> 0) or inside the piece, px."""
        along, across = self.half_axes[z]
        y, x = yx[0] - self.centre_yx[z, 0], yx[1] - self.centre_yx[z, 1]
        cos, sin = np.cos(self.angle[z]), np.sin(self.angle[z])
        u, v = (x * cos + y * sin) / along, (y * cos - x * sin) / across
        v = v - self.bend * (along / across) * (u * u - 0.4)
        theta = np.arctan2(v, u)
        rim = 1.0 + sum(
            amplitude * np.cos(order * theta + phase)
            for order, (amplitude, phase) in zip((2, 3, 5), self.lobes, strict=True)
        )
        result: Floats = (np.hypot(u, v) - rim) * across
        return result

    def reach_px(self, z: int) -> float:
        """Return a radius about the centre outside which the piece cannot lie."""
        along, across = self.half_axes[z]
        return 1.5 * float(max(along, across)) + abs(self.bend) * 2.0 * float(along) + 2.0


def _nearest_dendrite(parts: list[_Part], z: int, yx: Floats) -> NDArray[np.uint32]:
    """Return for every point (2, Y, X) the dendrite inside which it lies deepest, 0 for none."""
    owner = np.zeros(yx.shape[1:], np.uint32)
    depth = np.zeros(yx.shape[1:])
    for part in parts:
        if part.half_axes[z].min() <= 0:
            continue
        near = np.abs(yx - part.centre_yx[z][:, None, None]).max(axis=0) < part.reach_px(z)
        box = ndimage.find_objects(near.view(np.uint8))
        if not box or box[0] is None:
            continue
        distance = part.distance(z, yx[(slice(None), *box[0])])
        deeper = distance < depth[box[0]]
        depth[box[0]][deeper] = distance[deeper]
        owner[box[0]][deeper] = part.owner
    return owner


def _grow_dendrites(rng: np.random.Generator, options: PhantomOptions) -> list[_Part]:
    """Place dendrites one by one until they fill their share of the field."""
    depth, height, width = options.shape_zyx
    share = rng.uniform(0.35, 0.55)
    share = share if options.dendrite_fraction is None else options.dendrite_fraction
    step = 4
    grid = np.stack(np.meshgrid(np.arange(0, height, step), np.arange(0, width, step), indexing="ij")).astype(
        np.float64
    )
    probes = sorted({0, depth // 4, depth // 2, (3 * depth) // 4, depth - 1})
    taken = np.zeros((len(probes), *grid.shape[1:]), bool)
    parts: list[_Part] = []
    owner = 0
    for attempt in range(400):
        if taken.mean() >= share:
            break
        beside = parts[rng.integers(len(parts))] if parts and rng.random() < 0.6 else None
        grown = _grow_one(rng, options, owner + 1, beside, attempt)
        covers = np.stack([_nearest_dendrite(grown, z, grid) > 0 for z in probes])
        if not covers.any() or (covers & taken).sum() > 0.1 * covers.sum():
            continue
        taken |= covers
        parts += grown
        owner += 1
    return parts


def _grow_one(
    rng: np.random.Generator, options: PhantomOptions, owner: int, beside: _Part | None, attempt: int
) -> list[_Part]:
    """Grow a dendrite: a trunk through the stack or within its plane, perhaps a branch, perhaps spines."""
    depth, height, width = options.shape_zyx
    largest = min(45.0, min(height, width) / 6)
    radius = float(np.exp(rng.uniform(np.log(6.0), np.log(largest))))
    if attempt == 0:
        radius = min(18.0, largest)  # the first dendrite is the one that surely branches
    start = rng.uniform((0, 0), (height, width))
    if beside is not None:
        direction = rng.uniform(0, 2 * np.pi)
        gap = radius + float(beside.half_axes.max(axis=0).mean())
        start = beside.centre_yx[depth // 2] + gap * np.array([np.sin(direction), np.cos(direction)])
    if attempt > 0 and rng.random() < 0.2:
        return [_flat_tube(rng, options, owner, start, radius)]
    trunk = _upright_tube(rng, depth, owner, start, radius)
    parts = [trunk]
    if attempt == 0 or (radius > 9 and rng.random() < 0.35):
        parts.append(_branch(rng, trunk, forced=attempt == 0))
    if radius > 9:
        for _ in range(rng.poisson(depth / 14)):
            parts += _spine(rng, trunk)
    return parts


def _upright_tube(rng: np.random.Generator, depth: int, owner: int, start: Floats, radius: float) -> _Part:
    """Return a tube that runs obliquely through all slices."""
    z = np.arange(depth) - depth / 2
    heading = rng.uniform(0, 2 * np.pi)
    speed = abs(rng.normal(0, 1.3))  # px a slice
    sway = rng.uniform(1, 5) * np.sin(z / rng.uniform(5, 12) + rng.uniform(0, 6))
    path = start + np.outer(speed * z, [np.sin(heading), np.cos(heading)])
    path += np.outer(sway, [np.cos(heading), -np.sin(heading)])
    swell = 1.0 + rng.uniform(0, 0.3) * np.sin(z / rng.uniform(3, 9) + rng.uniform(0, 6))
    stretch = rng.uniform(1.0, 1.9) + 0.1 * speed
    axes = radius * swell[:, None] * np.array([np.sqrt(stretch), 1 / np.sqrt(stretch)])
    lobes = np.stack([rng.uniform(0, (0.15, 0.14, 0.08)), rng.uniform(0, 2 * np.pi, 3)], axis=1)
    return _Part(owner, path, axes, heading + 0.03 * z, rng.normal(0, 0.25), lobes)


def _flat_tube(rng: np.random.Generator, options: PhantomOptions, owner: int, start: Floats, radius: float) -> _Part:
    """Return a long tube that lies nearly in the plane of the slices and is cut lengthwise."""
    depth = options.shape_zyx[0]
    radius = min(radius, 22.0)
    z_px = options.voxel_size_nm[0] / options.voxel_size_nm[2]
    height = (np.arange(depth) - rng.uniform(0, depth)) * z_px
    across = np.sqrt(np.clip(radius**2 - height**2, 0, None))
    across[across < 4] = 0
    along = rng.uniform(3, 8) * radius * (across > 0)
    centre = start + np.outer(height, rng.normal(0, 0.3, 2))
    angle = np.full(depth, rng.uniform(0, np.pi))
    return _Part(owner, centre, np.stack([along, across], axis=1), angle, rng.normal(0, 0.12))


def _branch(rng: np.random.Generator, trunk: _Part, *, forced: bool) -> _Part:
    """Return a second tube that leaves the trunk at some slice."""
    depth = len(trunk.angle)
    radius = trunk.half_axes.mean()
    split = depth * (0.25 if forced else rng.uniform(-0.2, 0.7))
    # A forced branch has left the trunk by three quarters of the stack.
    speed = 2.8 * radius / max(depth / 2, 1) if forced else rng.uniform(2.5, 6.0)
    up = forced or rng.random() < 0.5
    z = np.arange(depth) if up else np.arange(depth)[::-1]
    heading = trunk.angle[0] + np.pi / 2 + rng.normal(0, 0.4)
    away = np.outer(speed * np.clip(z - split, 0, None), [np.sin(heading), np.cos(heading)])
    axes = np.where((z < split)[:, None], 0.5, rng.uniform(0.55, 0.9)) * trunk.half_axes
    return _Part(trunk.owner, trunk.centre_yx + away, axes, trunk.angle + 0.7, rng.normal(0, 0.2), trunk.lobes[::-1])


def _spine(rng: np.random.Generator, trunk: _Part) -> list[_Part]:
    """Return a thin neck and a round head beside the trunk; the head is seen in more slices than the neck."""
    depth = len(trunk.angle)
    first, neck_slices, head_slices = rng.integers(-1, depth), rng.integers(1, 3), rng.integers(3, 7)
    direction = rng.uniform(0, 2 * np.pi)
    towards = np.array([np.sin(direction), np.cos(direction)])
    head = rng.uniform(6.5, 13.0)
    away = trunk.half_axes.mean() + head + rng.uniform(2, 18)
    z = np.arange(depth)
    middle = first + head_slices / 2
    profile = np.sqrt(np.clip(1 - ((z + 0.5 - middle) / (head_slices / 2 + 0.5)) ** 2, 0, None))
    head_axes = head * profile[:, None] * np.array([1.15, 0.9])
    has_neck = np.abs(z + 0.5 - middle) < neck_slices / 2 + 0.5
    neck_axes = has_neck[:, None] * np.array([0.62 * away, rng.uniform(2.6, 4.0)])
    angle = np.full(depth, direction)
    centre = trunk.centre_yx
    return [
        _Part(trunk.owner, centre + away * towards, head_axes, angle + rng.normal(0, 1)),
        _Part(trunk.owner, centre + 0.55 * away * towards, neck_axes, angle),
    ]


@dataclass(frozen=True, slots=True)
class _Packing:
    """The tissue between dendrites: Voronoi regions of sites that drift along z; some neighbours share one cell."""

    site_yx: Floats  # (Z, N, 2) material px
    cell_of_site: NDArray[np.uint32]
    kinds: NDArray[np.uint8]  # by cell, see Tissue
    canvas_yx: tuple[int, int]

    @classmethod
    def sample(cls, rng: np.random.Generator, options: PhantomOptions) -> _Packing:
        depth, height, width = options.shape_zyx
        canvas = (height + 2 * _MARGIN_PX, width + 2 * _MARGIN_PX)
        smallest, largest = (13.0, 60.0) if options.dense else (8.0, 15.0)
        sites = _scatter(rng, canvas, smallest, largest)
        glia = smooth_noise(rng, canvas, 60)[tuple(sites.astype(int).T)] > 1.2
        cell = np.arange(len(sites))
        for site in np.flatnonzero(rng.random(len(sites)) < 0.3):
            nearest = np.argsort(((sites - sites[site]) ** 2).sum(axis=1))[1:2]
            cell[site] = cell[nearest[0]] if len(nearest) else site
        if not options.dense:
            cell[glia] = 0 if not glia.any() else int(np.flatnonzero(glia)[0])
        kinds = rng.choice(np.array([1, 2], np.uint8), len(sites), p=[0.55, 0.45])
        kinds[glia] = 3
        drift = np.cumsum(rng.normal(0, 0.8, (depth, 1, 2)), axis=0) * 0.5
        own = rng.normal(0, 0.35, (1, len(sites), 2)) * (np.arange(depth) - depth / 2)[:, None, None]
        own = np.clip(own, -0.6 * largest, 0.6 * largest)
        return cls(sites + drift + own, cell.astype(np.uint32), kinds, canvas)

    def cells(self, z: int, material_yx: Floats) -> NDArray[np.uint32]:
        """Return the cell, from 0, of every point (2, Y, X)."""
        limit = np.array(self.canvas_yx) - 1
        at = np.clip(np.rint(self.site_yx[z]), 0, limit).astype(np.intp)
        seeds = np.zeros(self.canvas_yx, np.int64)
        seeds[at[:, 0], at[:, 1]] = np.arange(1, len(at) + 1)
        nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
        region = self.cell_of_site[seeds[tuple(nearest)] - 1]
        rows, columns = (
            np.clip(np.rint(c + _MARGIN_PX), 0, m).astype(np.intp) for c, m in zip(material_yx, limit, strict=True)
        )
        result: NDArray[np.uint32] = region[rows, columns]
        return result


def _scatter(rng: np.random.Generator, canvas_yx: tuple[int, int], smallest: float, largest: float) -> Floats:
    """Throw sites (N, 2) no closer to each other than a spacing that varies smoothly over the field."""
    spacing = np.clip(0.5 + 0.35 * smooth_noise(rng, canvas_yx, 50), 0, 1) ** 2 * (largest - smallest) + smallest
    tries = int(4 * canvas_yx[0] * canvas_yx[1] / smallest**2)
    candidates = rng.uniform((0, 0), canvas_yx, (tries, 2))
    kept = np.full((tries, 2), -1e6)
    count = 0
    for point in candidates:
        near = np.abs(kept[:count] - point).max(axis=1) if count else np.array([np.inf])
        if near.min() >= spacing[int(point[0]), int(point[1])] * 0.9:
            kept[count] = point
            count += 1
    return kept[:count]


@dataclass(frozen=True, slots=True)
class _Organelle:
    """A mitochondrion inside a dendrite."""

    shape: _Part


def _sample_organelles(rng: np.random.Generator, parts: list[_Part], depth: int) -> list[_Part]:
    """Put mitochondria into dendrites that have room for them."""
    found: list[_Part] = []
    for part in parts:
        across = float(part.half_axes[:, 1].mean())
        if across < 9:
            continue
        for _ in range(rng.poisson(0.9)):
            size = min(across * rng.uniform(0.3, 0.5), 16.0)
            shift = rng.uniform(-0.4, 0.4, 2) * across
            z = np.arange(depth)
            half = rng.uniform(3, 12)
            profile = np.sqrt(np.clip(1 - ((z - rng.uniform(0, depth)) / half) ** 2, 0, None))
            axes = size * profile[:, None] * np.array([rng.uniform(1.1, 1.8), 0.8]) * (part.half_axes[:, 1:] > 0)
            axes[axes.min(axis=1) < 3] = 0
            found.append(_Part(part.owner, part.centre_yx + shift, axes, part.angle, rng.normal(0, 0.2)))
    return found


def _organelle_map(organelles: list[_Part], z: int, yx: Floats) -> Floats:
    """Return depth inside mitochondria (Y, X), px, 0 outside."""
    depth = np.zeros(yx.shape[1:])
    for part in organelles:
        if part.half_axes[z].min() <= 0:
            continue
        near = np.abs(yx - part.centre_yx[z][:, None, None]).max(axis=0) < part.reach_px(z)
        box = ndimage.find_objects(near.view(np.uint8))
        if box and box[0] is not None:
            np.maximum(depth[box[0]], -part.distance(z, yx[(slice(None), *box[0])]), out=depth[box[0]])
    return depth


def _exact_labels(cells: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Number the 26-connected objects of cells (Z, Y, X) from 1, without slivers of a slice."""
    kept = np.zeros_like(cells)
    for z, plane in enumerate(cells):
        pieces = _connected_pieces(plane)
        large = np.bincount(pieces.ravel()) >= _SMALLEST_PIECE_PX
        kept[z] = np.where(large[pieces], plane, 0)
    return _connected_pieces(kept)


def _connected_pieces(labels: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Number the pieces of labels (touching at faces, edges or corners) from 1, ordered by label."""
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
