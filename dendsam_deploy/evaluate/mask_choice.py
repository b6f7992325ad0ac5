"""Which masks are good enough to train on: four criteria, and their thresholds for a wanted precision.

On slices whose truth is known a mask is right or wrong. Of all combinations of four thresholds, the one is taken that
keeps most masks while the wanted part of them is right. Because it was chosen on these very masks, its precision there
flatters it; so the same choice is made again with each block of slices left out, and what it then keeps of that block
is what counts.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import betaincinv

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

LEAST_KEPT = 10
"""Fewer masks on the labelled slices say nothing about a precision."""

_CANDIDATES = 24
"""Thresholds that are tried for each criterion."""

_MOST_FOLDS = 5

_STRICTNESS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Parts of the way from the wanted precision to 1 that the choice may have to aim at to be right on slices left out."""

CONFIDENCE = 0.95
"""Of the intervals of a precision."""


@dataclass(frozen=True, slots=True)
class MaskCriteria:
    """Least values of a mask that is kept; 0 asks for nothing.

    The defaults are for those who have no truth to choose by. With the packaged weights, which have seen phantoms only,
    they keep 25 of 78 masks in six slices of a larval nerve cord (serial-section TEM), all of them right, and 149 of
    288 in 24 slices of a medulla (FIB-SEM), of which 91 % are right; of all masks, 90 % and 84 % are.

    Parameters
    ----------
    score : float
        Detection score of the box.
    predicted_iou : float
        The model's own estimate of the mask's IoU.
    stability : float
        Mean IoU with the masks of wrong boxes.
    agreement : float
        Largest IoU with a mask of a neighbouring slice. A mask without any neighbouring slice is not asked.
    """

    score: float = 0.6
    predicted_iou: float = 0.7
    stability: float = 0.85
    agreement: float = 0.6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise InvalidArgumentError(f"the least {field.name} of a mask is {value}, expected 0 to 1")

    def keeps(self, qualities: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Tell which masks are kept.

        Parameters
        ----------
        qualities : ndarray, shape (N, 4)
            The values of N masks in the order of the criteria; NaN where a criterion cannot be asked.
        """
        kept: NDArray[np.bool_] = (np.isnan(qualities) | (qualities >= np.array(astuple(self)))).all(axis=1)
        return kept

    def margins(self, qualities: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return how far each mask ``(N,)`` is from the other side, by its weakest criterion.

        From 0 at the threshold to 1 for a perfect value, and below 0, down to -1 for each criterion that is missed, for
        a mask that is not kept.
        """
        least = np.array(astuple(self))
        room = np.where(qualities >= least, 1 - least, least)
        excess = np.divide(qualities - least, room, out=np.ones(qualities.shape), where=room > 0)
        excess[np.isnan(qualities)] = 1.0
        missed = np.minimum(excess, 0).sum(axis=1)
        margins: NDArray[np.float64] = np.where(missed < 0, missed, excess.min(axis=1, initial=1.0))
        return margins

    def shortcomings(self, quality: Sequence[float]) -> str:
        """Say why a mask with these values is not kept, such as ``stability 0.61 < 0.85``; empty for one that is."""
        return "; ".join(
            f"{field.name} {_told_apart(value, least)}"
            for field, value, least in zip(fields(self), quality, astuple(self), strict=True)
            if value < least
        )

    def __str__(self) -> str:
        return ", ".join(f"{field.name} >= {getattr(self, field.name):.3g}" for field in fields(self))


def _told_apart(value: float, least: float) -> str:
    """Write both numbers with as many decimals as it takes to see that they differ, at least two."""
    decimals = next((d for d in range(2, 17) if f"{value:.{d}f}" != f"{least:.{d}f}"), 17)
    return f"{value:.{decimals}f} < {least:.{decimals}f}"


@dataclass(frozen=True, slots=True)
class Share:
    """So many right ones among so many masks."""

    right: int
    kept: int

    @property
    def precision(self) -> float:
        """Part of the kept masks that is right; NaN of none."""
        return self.right / self.kept if self.kept else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Exact binomial interval of that part at `CONFIDENCE`, as if masks were independent of each other.

        References
        ----------
        C. J. Clopper, E. S. Pearson, Biometrika 26 (1934) 404-413, doi:10.1093/biomet/26.4.404
        """
        tail, wrong = (1 - CONFIDENCE) / 2, self.kept - self.right
        low = float(betaincinv(self.right, wrong + 1, tail)) if self.right else 0.0
        high = float(betaincinv(self.right + 1, wrong, 1 - tail)) if wrong else 1.0
        return (low, high) if self.kept else (0.0, 1.0)

    def to_document(self) -> dict[str, object]:
        """Return the numbers as plain values."""
        low, high = self.interval
        precision = self.precision if self.kept else None
        return {"right": self.right, "kept": self.kept, "precision": precision, "low": low, "high": high}


@dataclass(frozen=True, slots=True)
class MaskChoice:
    """The thresholds for a wanted precision, and what they achieve on the labelled slices.

    Parameters
    ----------
    wanted : float
        The wanted precision.
    reached : bool
        Whether it was reached; otherwise `criteria` are those that came closest.
    criteria : MaskCriteria
        The thresholds.
    everything : Share
        All masks of the labelled slices.
    chosen_on : Share
        What the thresholds keep of the masks that they were chosen on.
    left_out : Share or None
        What they keep of slices that had no part in the choice, each block left out once. None where there is one
        labelled slice only.
    """

    wanted: float
    reached: bool
    criteria: MaskCriteria
    everything: Share
    chosen_on: Share
    left_out: Share | None

    def to_document(self) -> dict[str, object]:
        """Return the choice as plain values."""
        return {
            "wanted": self.wanted,
            "reached": self.reached,
            "everything": self.everything.to_document(),
            "chosen_on": self.chosen_on.to_document(),
            "left_out": None if self.left_out is None else self.left_out.to_document(),
        }


@dataclass(frozen=True, slots=True)
class JudgedMasks:
    """Masks of labelled slices.

    Parameters
    ----------
    z : ndarray, shape (N,), int64
        Slice of each.
    qualities : ndarray, shape (N, 4), float64
        Its values, in the order of `MaskCriteria`; NaN where one does not apply.
    right : ndarray, shape (N,), bool
        Whether it is right.
    """

    z: NDArray[np.int64]
    qualities: NDArray[np.float64]
    right: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.z)

    def take(self, chosen: NDArray[np.bool_]) -> JudgedMasks:
        """Return some of the masks."""
        return JudgedMasks(self.z[chosen], self.qualities[chosen], self.right[chosen])

    def share(self, criteria: MaskCriteria | None = None) -> Share:
        """Return how many masks some criteria keep, and how many of them are right; None keeps all."""
        kept = np.ones(len(self), bool) if criteria is None else criteria.keeps(self.qualities)
        return Share(int((kept & self.right).sum()), int(kept.sum()))


def choose_criteria(
    masks: JudgedMasks, wanted: float, fixed: dict[str, float] | None = None, least_kept: int = LEAST_KEPT
) -> MaskChoice:
    """Choose the thresholds that keep most masks at a wanted precision, also on slices left out of the choice.

    Parameters
    ----------
    masks : JudgedMasks
        All masks of the labelled slices.
    wanted : float
        Precision, more than 0 and at most 1.
    fixed : dict, optional
        Thresholds that are given, by name.
    least_kept : int
        A choice that keeps fewer is none.

    Returns
    -------
    MaskChoice
        `reached` tells whether such thresholds exist.

    Raises
    ------
    InvalidArgumentError
        If the wanted precision is none.
    """
    if not 0 < wanted <= 1:
        raise InvalidArgumentError(f"the wanted precision is {wanted}, expected more than 0 and at most 1")
    fixed = fixed or {}
    folds = _folds(masks.z)
    tried: list[MaskChoice] = []
    for part in _STRICTNESS:
        aim = wanted + part * (1 - wanted)
        criteria = most_kept(masks, aim, fixed, least_kept)
        if criteria is None:
            break
        left_out = _on_left_out(masks, folds, aim, fixed, least_kept)
        reached = left_out is None or (left_out.kept > 0 and left_out.precision >= wanted)
        tried.append(MaskChoice(wanted, reached, criteria, masks.share(), masks.share(criteria), left_out))
        if reached:
            return tried[-1]
    if tried:
        return max(tried, key=lambda choice: choice.left_out.precision if choice.left_out else 0.0)
    closest = _most_precise(masks, fixed, least_kept)
    return MaskChoice(wanted, False, closest, masks.share(), masks.share(closest), None)


def most_kept(
    masks: JudgedMasks, wanted: float, fixed: dict[str, float], least_kept: int = LEAST_KEPT
) -> MaskCriteria | None:
    """Return the thresholds that keep most masks while their precision on these masks is at least `wanted`.

    All combinations of up to `_CANDIDATES` values of each criterion are compared; of equals the more precise one, and
    then the looser one, is taken. None where no combination keeps `least_kept` masks at that precision.
    """
    grid = _Grid(masks, fixed)
    possible = (grid.kept >= max(least_kept, 1)) & (grid.right >= wanted * grid.kept - 1e-9)
    if not possible.any():
        return None
    worth = np.where(possible, grid.kept.astype(np.float64) + grid.right / (grid.kept.max() + 1), -1.0)
    return grid.criteria(int(np.argmax(worth)))


def _most_precise(masks: JudgedMasks, fixed: dict[str, float], least_kept: int) -> MaskCriteria:
    """Return the thresholds of the highest precision among those that keep enough, or else that keep anything."""
    grid = _Grid(masks, fixed)
    precision = np.divide(grid.right, grid.kept, out=np.zeros(grid.kept.shape), where=grid.kept > 0)
    enough = grid.kept >= min(max(least_kept, 1), int(grid.kept.max()))
    return grid.criteria(int(np.argmax(np.where(enough, precision + 1e-9 * grid.kept, -1.0))))


class _Grid:
    """How many masks, and how many right ones, each combination of thresholds keeps.

    Masks are counted in cells between thresholds and summed from the strictest corner on, so the cost does not depend
    on the number of combinations times the number of masks.
    """

    def __init__(self, masks: JudgedMasks, fixed: dict[str, float]) -> None:
        names = [field.name for field in fields(MaskCriteria)]
        self._thresholds = [
            np.array([fixed[name]]) if name in fixed else _candidates(values)
            for name, values in zip(names, masks.qualities.T, strict=True)
        ]
        shape = tuple(len(thresholds) + 1 for thresholds in self._thresholds)
        cells = [
            np.where(np.isnan(values), len(thresholds), np.searchsorted(thresholds, values, side="right"))
            for thresholds, values in zip(self._thresholds, masks.qualities.T, strict=True)
        ]
        flat = np.ravel_multi_index(tuple(cells), shape) if len(masks) else np.zeros(0, np.int64)
        self.kept, self.right = (
            self._summed(np.bincount(rows, minlength=int(np.prod(shape))).reshape(shape))
            for rows in (flat, flat[masks.right])
        )

    def criteria(self, index: int) -> MaskCriteria:
        """Return the thresholds of one combination, by its flat index."""
        places = np.unravel_index(index, self.kept.shape)
        return MaskCriteria(*(float(row[place]) for row, place in zip(self._thresholds, places, strict=True)))

    @staticmethod
    def _summed(counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add up the cells at and beyond each threshold; a mask in cell 0 of an axis misses all thresholds there."""
        for axis in range(counts.ndim):
            counts = np.flip(np.cumsum(np.flip(counts, axis), axis), axis)
        return counts[(slice(1, None),) * counts.ndim]


def _candidates(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the thresholds to try for one criterion, ascending: 0, and values that occur, evenly by rank.

    They are rounded down, so that a report can write them and a threshold keeps the mask that it was taken from.
    """
    occurring = np.unique(np.floor(values[~np.isnan(values)] * 1000) / 1000)
    if len(occurring) >= _CANDIDATES:
        occurring = occurring[np.linspace(0, len(occurring) - 1, _CANDIDATES - 1).round().astype(int)]
    return np.unique(np.append(np.clip(occurring, 0, 1), 0.0))


def _folds(z: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """Divide masks into contiguous blocks of slices; none where all are of one slice."""
    slices = np.unique(z)
    if len(slices) < 2:
        return []
    return [np.isin(z, block) for block in np.array_split(slices, min(_MOST_FOLDS, len(slices)))]


def _on_left_out(
    masks: JudgedMasks, folds: list[NDArray[np.bool_]], aim: float, fixed: dict[str, float], least_kept: int
) -> Share | None:
    """Return what thresholds chosen without a block of slices keep of that block, summed over the blocks."""
    right = kept = 0
    for fold in folds:
        criteria = most_kept(masks.take(~fold), aim, fixed, least_kept)
        if criteria is not None:
            share = masks.take(fold).share(criteria)
            right, kept = right + share.right, kept + share.kept
    return Share(right, kept) if folds else None
