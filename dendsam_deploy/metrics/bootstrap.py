"""How sure a score is: resampling the slices that it was measured on.

Slices are drawn with replacement, as many as there are, and the score is computed anew; the interval that holds the
middle 95 % of what comes out says how much the score depends on which slices happened to be annotated. It is the
*percentile* interval. It says nothing about other specimens, and since neighbouring sections look alike it is rather
too narrow; `blocks_of` resamples runs of neighbours together where that matters.

References
----------
B. Efron, Annals of Statistics 7 (1979) 1-26, doi:10.1214/aos/1176344552; for blocks H. R. Kuensch, Annals of Statistics
17 (1989) 1217-1241, doi:10.1214/aos/1176347265, who does the same with the jackknife
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

if TYPE_CHECKING:
    from numpy.typing import NDArray

INTERVAL_LEVEL = 0.95
"""Share of the resampled scores that an interval holds."""


def bootstrap_weights(units: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Draw units with replacement and count them.

    Parameters
    ----------
    units : int
        Number of slices, or of blocks of slices.
    resamples : int
        How often all of them are drawn.
    seed : int
        The same seed gives the same draws.

    Returns
    -------
    ndarray, shape (resamples, units), int64
        How often each unit is in each resample; every row adds up to `units`.
    """
    rng = np.random.default_rng(seed)
    weights: NDArray[np.int64] = rng.multinomial(units, np.full(units, 1 / units), resamples).astype(np.int64)
    return weights


def percentile_interval(replicates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the percentile intervals of resampled scores.

    Parameters
    ----------
    replicates : ndarray, shape (R, ...), float64
        Scores of R resamples.

    Returns
    -------
    ndarray, shape (2, ...), float64
        Lower and upper ends.
    """
    tail = (1 - INTERVAL_LEVEL) / 2
    ends: NDArray[np.float64] = np.quantile(replicates, (tail, 1 - tail), axis=0)
    return ends


def mean_intervals(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Return the intervals of the means of values that were measured on each slice.

    Parameters
    ----------
    values : ndarray, shape (Z, M), float64
        M scores of Z slices.
    resamples, seed : int
        See `bootstrap_weights`.

    Returns
    -------
    ndarray, shape (2, M), float64
        Lower and upper ends.
    """
    weights = bootstrap_weights(len(values), resamples, seed)
    return percentile_interval(weights @ values / len(values))


def blocks_of(count: int, most: int) -> NDArray[np.int64]:
    """Divide consecutive slices into at most so many blocks of neighbours, as equal as can be.

    Parameters
    ----------
    count : int
        Number of slices.
    most : int
        Most blocks.

    Returns
    -------
    ndarray, shape (count,), int64
        The block of each slice, ascending from 0.
    """
    blocks: NDArray[np.int64] = np.arange(count, dtype=np.int64) * min(count, most) // max(count, 1)
    return blocks


def jackknife_interval(value: NDArray[np.float64], left_out: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return intervals from scores that were computed without one block each, around the score of all blocks.

    For the objects of a volume: a volume whose slices are drawn with replacement lacks a third of them, and with them
    every object that lives in few slices, so that its scores are those of an easier volume.

    Parameters
    ----------
    value : ndarray, shape (M,), float64
        Scores of all B blocks.
    left_out : ndarray, shape (B, M), float64
        Scores without each one; B is 2 or more.

    Returns
    -------
    ndarray, shape (2, M), float64
        Lower and upper ends: Student's t times ``sqrt((B - 1) / B sum (v_b - v)^2)``, the standard error around the
        score v of all blocks. Around the mean of the v_b it would be nothing where every single block makes the same
        difference, as it does to scores with thresholds.

    References
    ----------
    B. Efron, C. Stein, Annals of Statistics 9 (1981) 586-596, doi:10.1214/aos/1176345462
    """
    blocks = len(left_out)
    spread = np.sqrt((blocks - 1) / blocks * np.square(left_out - value).sum(axis=0))
    reach = stdtrit(blocks - 1, (1 + INTERVAL_LEVEL) / 2) * spread
    ends: NDArray[np.float64] = np.stack([value - reach, value + reach])
    return ends
