"""How much the objects of two slices overlap, measured on run-length codes: no label image is ever painted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.instances import Instances

_ROW_SHIFT = 32
"""A pixel's key is ``row * 2**32 + column``: runs become intervals on one axis, and shifted columns cannot meet
another row."""


@dataclass(frozen=True, slots=True)
class SliceRuns:
    """The objects of one slice as disjoint intervals on one axis.

    Parameters
    ----------
    starts, ends : ndarray, shape (R,), int64
        Half-open intervals of pixel keys, ascending.
    owners : ndarray, shape (R,), int64
        Row of the object (0 to N - 1) that each run belongs to.
    areas_px : ndarray, shape (N,), int64
        Area of each object, slice px.
    centroids_yx : ndarray, shape (N, 2), float64
        Centre of mass of each object, slice px.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    owners: NDArray[np.int64]
    areas_px: NDArray[np.int64]
    centroids_yx: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.areas_px)

    def moved(self, offset_yx: tuple[int, int]) -> SliceRuns:
        """Return the objects shifted by whole pixels."""
        offset = (offset_yx[0] << _ROW_SHIFT) + offset_yx[1]
        return SliceRuns(
            self.starts + offset, self.ends + offset, self.owners, self.areas_px, self.centroids_yx + offset_yx
        )

    def take(self, objects: NDArray[np.intp]) -> SliceRuns:
        """Return some of the objects (ascending rows), renumbered from 0."""
        row_of = np.full(len(self), -1, np.int64)
        row_of[objects] = np.arange(len(objects))
        owners = row_of[self.owners]
        kept = owners >= 0
        return SliceRuns(
            self.starts[kept], self.ends[kept], owners[kept], self.areas_px[objects], self.centroids_yx[objects]
        )

    @classmethod
    def from_instances(cls, instances: Instances) -> SliceRuns:
        """Lay the painted objects of a slice on one axis.

        Raises
        ------
        InvalidArgumentError
            Two objects share a pixel; painting gives each pixel to one object at most.
        """
        codes = instances.run_lengths
        counts = np.array([len(code.runs) for code in codes], np.int64)
        owners = np.repeat(np.arange(len(codes), dtype=np.int64), counts)
        corners = np.array([(code.window.y0, code.window.x0) for code in codes], np.int64).reshape(-1, 2)[owners]
        runs = np.concatenate([code.runs for code in codes]).astype(np.int64) if codes else np.zeros((0, 3), np.int64)
        rows, columns, lengths = runs[:, 0] + corners[:, 0], runs[:, 1] + corners[:, 1], runs[:, 2]
        areas = np.bincount(owners, lengths, len(codes))
        mass_y = np.bincount(owners, lengths * (rows + 0.5), len(codes))
        mass_x = np.bincount(owners, lengths * (columns + lengths / 2), len(codes))
        centroids = np.stack([mass_y, mass_x], axis=1) / np.maximum(areas, 1)[:, None]

        starts = (rows << _ROW_SHIFT) + columns
        order = np.argsort(starts)
        starts, ends, owners = starts[order], (starts + lengths)[order], owners[order]
        if clash := np.flatnonzero(starts[1:] < ends[:-1]).tolist():
            one, other = (int(instances.ids[owners[clash[0] + i]]) for i in (0, 1))
            raise InvalidArgumentError(
                f"objects {one} and {other} of a slice share pixels; give each pixel to one object before linking"
            )
        return cls(starts, ends, owners, areas.astype(np.int64), centroids)


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Every pair of objects of two slices that share at least one pixel position; row ``i`` describes one pair.

    Parameters
    ----------
    lower, upper : ndarray, shape (P,), int64
        Rows of the two objects in their slices. Pairs are sorted by (lower, upper).
    iou : ndarray, shape (P,), float64
        Intersection over union.
    containment : ndarray, shape (P,), float64
        Intersection over the smaller area: near one where the smaller object lies inside the larger one.
    area_ratio : ndarray, shape (P,), float64
        Smaller over larger area.
    shift : ndarray, shape (P,), float64
        Distance of the centroids over the square root of the smaller area.
    """

    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    iou: NDArray[np.float64]
    containment: NDArray[np.float64]
    area_ratio: NDArray[np.float64]
    shift: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.lower)


def measure_overlaps(lower: SliceRuns, upper: SliceRuns) -> Overlaps:
    """Measure all pairs of overlapping objects of two slices.

    Each run of `lower` meets a contiguous range of the runs of `upper`, found by bisection, so the cost grows with
    the number of runs and not with the size of the slice.

    Parameters
    ----------
    lower, upper : SliceRuns
        Two slices in one frame.

    Returns
    -------
    Overlaps
        Features without units, so that they mean the same at every pixel size.
    """
    first = np.searchsorted(upper.ends, lower.starts, side="right")
    last = np.searchsorted(upper.starts, lower.ends, side="left")
    counts = np.maximum(last - first, 0)
    from_lower = np.repeat(np.arange(len(counts)), counts)
    from_upper = np.arange(len(from_lower)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    shared = np.minimum(lower.ends[from_lower], upper.ends[from_upper]) - np.maximum(
        lower.starts[from_lower], upper.starts[from_upper]
    )
    pair_keys, pair_of_run = np.unique(
        lower.owners[from_lower] * len(upper) + upper.owners[from_upper], return_inverse=True
    )
    intersection = np.bincount(pair_of_run, shared, len(pair_keys))
    rows_lower, rows_upper = np.divmod(pair_keys, max(len(upper), 1))

    area_lower, area_upper = lower.areas_px[rows_lower], upper.areas_px[rows_upper]
    smaller, larger = np.minimum(area_lower, area_upper), np.maximum(area_lower, area_upper)
    distance = np.linalg.norm(lower.centroids_yx[rows_lower] - upper.centroids_yx[rows_upper], axis=1)
    return Overlaps(
        lower=rows_lower,
        upper=rows_upper,
        iou=intersection / (area_lower + area_upper - intersection),
        containment=intersection / smaller,
        area_ratio=smaller / larger,
        shift=distance / np.sqrt(smaller),
    )


@dataclass(frozen=True, slots=True)
class WeighedPairs:
    """Some of the pairs of an `Overlaps`, each with its evidence.

    Parameters
    ----------
    index : ndarray, shape (K,), intp
        Rows of the `Overlaps`.
    log_odds : ndarray, shape (K,), float64
        Natural logarithm of p / (1 - p), where p is the probability that both objects belong to one dendrite.
    """

    index: NDArray[np.intp]
    log_odds: NDArray[np.float64]

    @classmethod
    def none(cls) -> WeighedPairs:
        """Return no pairs at all."""
        return cls(np.zeros(0, np.intp), np.zeros(0))


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """What a linker makes of the overlaps of two slices.

    Parameters
    ----------
    chained : WeighedPairs
        Pairs that continue one another beyond doubt. They are one-to-one.
    continuations : WeighedPairs
        Pairs of which neither object is chained: perhaps the same dendrite, to be judged when all slices are known.
    branches : WeighedPairs
        Pairs of which at most one object is chained: perhaps a branch, to be judged when all slices are known.
    """

    chained: WeighedPairs
    continuations: WeighedPairs
    branches: WeighedPairs
