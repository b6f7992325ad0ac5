"""The geometry of dendrites in a phantom: trunks, branches, spines and mitochondria as moving ellipses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.volume.phantom_noise import Floats

_PROBE_STEP_PX = 4  # grid on which placing looks for room
_OVERLAP_LIMIT = 0.1  # share of a dendrite that may fall on those already there; they then touch along a membrane


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a dendrite or organelle: in each slice a bent, lobed ellipse.

    Parameters
    ----------
    owner : int
        The dendrite, from 1.
    centre_yx, half_axes : ndarray, shape (Z, 2), float64
        Centre, and half axes along and across, px; half axes of 0 mean absent from that slice.
    angle : ndarray, shape (Z,), float64
        Direction of the long axis against x, rad.
    bend : float
        Sagitta of the long axis over its half length.
    lobes : ndarray, shape (3, 2), float64
        Relative amplitude and phase (rad) of the rim's harmonics 2, 3 and 5.
    """

    owner: int
    centre_yx: Floats
    half_axes: Floats
    angle: Floats
    bend: float = 0.0
    lobes: Floats = field(default_factory=lambda: np.zeros((3, 2)))

    def present(self, z: int) -> bool:
        """Tell whether the piece is in a slice."""
        return bool(self.half_axes[z].min() > 0)

    def distance(self, z: int, yx: Floats) -> Floats:
        """Return roughly how far points (2, ...) lie outside (> 0) or inside the piece, px."""
        along, across = self.half_axes[z]
        y, x = yx[0] - self.centre_yx[z, 0], yx[1] - self.centre_yx[z, 1]
        cos, sin = np.cos(self.angle[z]), np.sin(self.angle[z])
        u, v = (x * cos + y * sin) / along, (y * cos - x * sin) / across
        v -= self.bend * (along / across) * (u * u - 0.4)
        rim = np.ones_like(u)
        if self.lobes.any():
            theta = np.arctan2(v, u)
            for order, (amplitude, phase) in zip((2, 3, 5), self.lobes, strict=True):
                rim += amplitude * np.cos(order * theta + phase)
        result: Floats = (np.hypot(u, v) - rim) * across
        return result

    def box(self, z: int, extent: Extent) -> tuple[slice, slice]:
        """Return the rows and columns of a grid of points outside which the piece cannot lie."""
        along, across = self.half_axes[z]
        rim = 1 + self.lobes[:, 0].sum()
        u = rim * along
        v = rim * across + abs(self.bend) * along * max(0.4, rim**2 - 0.4)
        cos, sin = abs(np.cos(self.angle[z])), abs(np.sin(self.angle[z]))
        y, x = self.centre_yx[z]
        return extent.rows(y, u * sin + v * cos + 1), extent.columns(x, u * cos + v * sin + 1)


@dataclass(frozen=True, slots=True)
class Extent:
    """Lowest and highest coordinate, px, in every row and column of a grid of points; measured once for many parts.

    Parameters
    ----------
    row_range, column_range : (ndarray, ndarray), float64
        Bounds of y by row, and of x by column.
    """

    row_range: tuple[Floats, Floats]
    column_range: tuple[Floats, Floats]

    @classmethod
    def of(cls, yx: Floats) -> Extent:
        """Measure a grid (2, Y, X)."""
        y, x = yx
        return cls((y.min(axis=1), y.max(axis=1)), (x.min(axis=0), x.max(axis=0)))

    def rows(self, centre: float, reach: float) -> slice:
        """Return the rows that come within reach of a y coordinate."""
        return _span(*self.row_range, centre, reach)

    def columns(self, centre: float, reach: float) -> slice:
        """Return the columns that come within reach of an x coordinate."""
        return _span(*self.column_range, centre, reach)


def _span(lowest: Floats, highest: Floats, centre: float, reach: float) -> slice:
    """Return the lines whose points come within reach of a centre."""
    lines = np.flatnonzero((highest > centre - reach) & (lowest < centre + reach))
    return slice(int(lines[0]), int(lines[-1]) + 1) if len(lines) else slice(0, 0)


def nearest_dendrite(parts: list[Part], z: int, yx: Floats) -> NDArray[np.uint32]:
    """Return for every point (2, Y, X) the dendrite inside which it lies deepest, 0 for none."""
    owner = np.zeros(yx.shape[1:], np.uint32)
    lowest = np.zeros(yx.shape[1:])
    extent = Extent.of(yx)
    for part in parts:
        if part.present(z):
            box = part.box(z, extent)
            distance = part.distance(z, yx[:, box[0], box[1]])
            deeper = distance < lowest[box]
            lowest[box][deeper] = distance[deeper]
            owner[box][deeper] = part.owner
    return owner


def depth_in_mitochondria(mitochondria: list[Part], z: int, yx: Floats, cells: NDArray[np.uint32]) -> Floats:
    """Return how deep points (2, Y, X) lie inside the mitochondria of their own cell, px; 0 outside."""
    depth = np.zeros(cells.shape)
    extent = Extent.of(yx)
    for part in mitochondria:
        if part.present(z):
            box = part.box(z, extent)
            inside = -part.distance(z, yx[:, box[0], box[1]]) * (cells[box] == part.owner)
            np.maximum(depth[box], inside, out=depth[box])
    return depth


def grow_dendrites(
    rng: np.random.Generator, shape_zyx: tuple[int, int, int], share: float, z_step_px: float
) -> list[Part]:
    """Place dendrites one by one until they fill a share of the field.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    shape_zyx : (int, int, int)
        Slices, rows, columns.
    share : float
        Share of the field to fill, 0 to 1.
    z_step_px : float
        Distance of two slices in px of the plane.

    Returns
    -------
    list of Part
        The parts, each with its dendrite's number from 1.
    """
    depth, height, width = shape_zyx
    grid = np.mgrid[0:height:_PROBE_STEP_PX, 0:width:_PROBE_STEP_PX].astype(np.float64)
    probes = sorted({0, depth // 4, depth // 2, (3 * depth) // 4, depth - 1})
    taken = np.zeros((len(probes), *grid.shape[1:]), bool)
    parts: list[Part] = []
    for _ in range(400):
        if taken.mean() >= share:
            break
        beside = parts[rng.integers(len(parts))] if parts and rng.random() < 0.6 else None
        owner = parts[-1].owner + 1 if parts else 1
        grown = _grow_one(rng, shape_zyx, z_step_px, owner, beside)
        covers = np.stack([nearest_dendrite(grown, z, grid) > 0 for z in probes])
        if covers.any() and (covers & taken).sum() <= _OVERLAP_LIMIT * covers.sum():
            taken |= covers
            parts += grown
    return parts


def _grow_one(
    rng: np.random.Generator, shape_zyx: tuple[int, int, int], z_step_px: float, owner: int, beside: Part | None
) -> list[Part]:
    """Grow a dendrite: a trunk through the stack or within its plane, perhaps a branch, perhaps spines."""
    depth, height, width = shape_zyx
    largest = min(45.0, min(height, width) / 6)
    radius = float(np.exp(rng.uniform(np.log(8.0), np.log(largest))))
    first = owner == 1  # the one that surely branches, in the middle of the field
    if first:
        radius = min(18.0, largest)
        start = rng.uniform(0.35, 0.55, 2) * (height, width)
    elif beside is None:
        start = rng.uniform((0, 0), (height, width))
    else:
        direction = rng.uniform(0, 2 * np.pi)
        gap = radius + float(beside.half_axes.max(axis=0).mean())
        start = beside.centre_yx[depth // 2] + gap * np.array([np.sin(direction), np.cos(direction)])
    if not first and rng.random() < 0.2:
        height_px: Floats = (np.arange(depth, dtype=np.float64) - rng.uniform(0, depth)) * z_step_px
        return [_flat_tube(rng, height_px, owner, start, radius)]
    trunk = _upright_tube(rng, depth, owner, start, radius)
    parts = [trunk]
    if first or (radius > 9 and rng.random() < 0.35):
        parts.append(_branch(rng, trunk, forced=first))
    if radius > 9:
        for _ in range(rng.poisson(depth / 14)):
            parts += _spine(rng, trunk)
    return parts


def _upright_tube(rng: np.random.Generator, depth: int, owner: int, start: Floats, radius: float) -> Part:
    """Return a tube that runs obliquely through all slices."""
    z = np.arange(depth, dtype=np.float64) - depth / 2
    heading = rng.uniform(0, 2 * np.pi)
    speed = abs(rng.normal(0, 1.3))  # px a slice
    sway = rng.uniform(1, 5) * np.sin(z / rng.uniform(5, 12) + rng.uniform(0, 6))
    path = start + np.outer(speed * z, [np.sin(heading), np.cos(heading)])
    path += np.outer(sway, [np.cos(heading), -np.sin(heading)])
    swell = 1.0 + rng.uniform(0, 0.3) * np.sin(z / rng.uniform(3, 9) + rng.uniform(0, 6))
    stretch = rng.uniform(1.0, 1.9) + 0.1 * speed
    axes = radius * swell[:, None] * np.array([np.sqrt(stretch), 1 / np.sqrt(stretch)])
    angle: Floats = heading + 0.03 * z
    lobes = np.stack([rng.uniform(0, (0.15, 0.14, 0.08)), rng.uniform(0, 2 * np.pi, 3)], axis=1)
    return Part(owner, path, axes, angle, rng.normal(0, 0.25), lobes)


def _flat_tube(rng: np.random.Generator, height_px: Floats, owner: int, start: Floats, radius: float) -> Part:
    """Return a long tube that lies nearly in the plane of the slices and is cut at heights (Z,) from its axis."""
    radius = min(radius, 22.0)
    across: Floats = np.sqrt(np.clip(radius**2 - height_px**2, 0, None))
    across[across < 4] = 0
    along = rng.uniform(3, 8) * radius * (across > 0)
    centre = start + np.outer(height_px, rng.normal(0, 0.3, 2))
    angle = np.full(len(height_px), rng.uniform(0, np.pi))
    return Part(owner, centre, np.stack([along, across], axis=1), angle, rng.normal(0, 0.12))


def _branch(rng: np.random.Generator, trunk: Part, *, forced: bool) -> Part:
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
    return Part(trunk.owner, trunk.centre_yx + away, axes, trunk.angle + 0.7, rng.normal(0, 0.2), trunk.lobes[::-1])


def _spine(rng: np.random.Generator, trunk: Part) -> list[Part]:
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
        Part(trunk.owner, centre + away * towards, head_axes, angle + rng.normal(0, 1)),
        Part(trunk.owner, centre + 0.55 * away * towards, neck_axes, angle),
    ]


def sample_mitochondria(rng: np.random.Generator, parts: list[Part], depth: int) -> list[Part]:
    """Put mitochondria into those parts that have room for them."""
    z = np.arange(depth)
    found: list[Part] = []
    for part in parts:
        room = float(part.half_axes[:, 1].mean())
        if room < 8:
            continue
        for _ in range(rng.poisson(0.9)):
            profile = np.sqrt(np.clip(1 - ((z - rng.uniform(0, depth)) / rng.uniform(3, 14)) ** 2, 0, None))
            size = min(room * rng.uniform(0.3, 0.5), 16.0) * profile * (part.half_axes[:, 1] > 0)
            size[size < 3] = 0
            axes = size[:, None] * np.array([rng.uniform(1.1, 2.0), 0.8])
            centre = part.centre_yx + rng.uniform(-0.35, 0.35, 2) * room
            found.append(Part(part.owner, centre, axes, part.angle, rng.normal(0, 0.2)))
    return found
