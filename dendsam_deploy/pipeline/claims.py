"""What each mask claims of a slice, and how strong its claim is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.geometry import Window

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.pipeline.upsample import LogitWindow

FULL_EVIDENCE = 255
"""Evidence of a pixel that is as convincing as the typical pixel of its mask."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The pixels that one mask calls its own.

    Parameters
    ----------
    window : Window
        Where they lie, slice px.
    evidence : ndarray, shape (window.height, window.width), uint8
        0 outside the mask; inside, 1 at the threshold and `FULL_EVIDENCE` from the mask's median logit on. One byte a
        pixel keeps a crowded slice small, and evidence relative to the mask itself is comparable between models, whose
        logits differ in scale.
    """

    window: Window
    evidence: NDArray[np.uint8]

    @property
    def area_px(self) -> int:
        """Number of claimed pixels."""
        return int(np.count_nonzero(self.evidence))

    def part(self, window: Window) -> NDArray[np.uint8]:
        """Return the evidence inside a window that lies in the claim's own."""
        y0, x0 = window.y0 - self.window.y0, window.x0 - self.window.x0
        return self.evidence[y0 : y0 + window.height, x0 : x0 + window.width]


def united(claims: Sequence[Claim]) -> Claim:
    """Return one claim with the larger evidence of several at each pixel."""
    filled = [claim for claim in claims if claim.area_px]
    if len(filled) < 2:
        return (*filled, *claims)[0]
    window = bounding([claim.window for claim in filled])
    whole = Claim(window, np.zeros((window.height, window.width), np.uint8))
    for claim in filled:
        part = whole.part(claim.window)
        np.maximum(part, claim.evidence, out=part)
    return whole


def claim_from_logits(patch: LogitWindow, mask_logit: float) -> Claim:
    """Turn a mask's logits into the claim ``1 + floor(254 min(1, (l - t) / (median - t)))`` where ``l > t``.

    Parameters
    ----------
    patch : LogitWindow
        Logits ``l`` at full resolution; the median is that of the logits above the threshold.
    mask_logit : float
        The threshold ``t``.
    """
    excess = patch.logits - np.float32(mask_logit)
    inside = excess > 0
    if not inside.any():
        return Claim(patch.window, np.zeros(excess.shape, np.uint8))
    excess /= _median(excess[inside])
    np.minimum(excess, 1, out=excess)
    excess *= FULL_EVIDENCE - 1
    np.copyto(excess, -1, where=~inside)
    excess += 1
    return Claim(patch.window, excess.astype(np.uint8))


def _median(values: NDArray[np.float32]) -> np.float32:
    """Return what ``numpy.median`` does, which spends most of its time on other kinds of input."""
    middle = len(values) // 2
    if len(values) % 2:
        odd: np.float32 = np.partition(values, middle)[middle]
        return odd
    low, high = np.partition(values, (middle - 1, middle))[middle - 1 : middle + 1]
    even: np.float32 = (low + high) / np.float32(2)
    return even


def bounding(windows: Sequence[Window]) -> Window:
    """Return the smallest window that holds others, of which there is at least one."""
    y0, x0 = min(window.y0 for window in windows), min(window.x0 for window in windows)
    y1, x1 = max(window.y1 for window in windows), max(window.x1 for window in windows)
    return Window(y0, x0, y1 - y0, x1 - x0)


def intersection(a: Window, b: Window) -> Window:
    """Return the pixels that two windows share; empty where they do not meet."""
    y0, x0 = max(a.y0, b.y0), max(a.x0, b.x0)
    return Window(y0, x0, max(min(a.y1, b.y1) - y0, 0), max(min(a.x1, b.x1) - x0, 0))


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Pairs of claims that share pixels.

    Parameters
    ----------
    first, second : ndarray, shape (P,), int64
        Indices of the claims, ``first < second``, in lexical order.
    areas_px : ndarray, shape (P,), int64
        Pixels that both claim, never 0.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    areas_px: NDArray[np.int64]

    def among(self, kept: NDArray[np.bool_]) -> Overlaps:
        """Return the pairs of which both are kept, renumbered."""
        number = np.cumsum(kept) - 1
        both = kept[self.first] & kept[self.second]
        return Overlaps(number[self.first[both]], number[self.second[both]], self.areas_px[both])


def measure_overlaps(claims: Sequence[Claim]) -> Overlaps:
    """Count the shared pixels of every pair of claims whose windows meet."""
    edges = np.array([(c.window.y0, c.window.x0, c.window.y1, c.window.x1) for c in claims], np.int64).reshape(-1, 4)
    low, high = edges[:, :2], edges[:, 2:]
    first, second = np.nonzero(np.triu((low[:, None] < high).all(axis=2) & (high[:, None] > low).all(axis=2), k=1))
    begin, end = np.maximum(low[first], low[second]), np.minimum(high[first], high[second])
    # The common window in the frame of either claim: (y0, y1, x0, x1) twice.
    frames = [(begin - low[index], end - low[index]) for index in (first, second)]
    corners = np.stack([edge[:, axis] for start, stop in frames for axis in (0, 1) for edge in (start, stop)], axis=1)
    areas = np.zeros(len(first), np.int64)
    for pair, (i, j, window) in enumerate(zip(first.tolist(), second.tolist(), corners.tolist(), strict=True)):
        y0, y1, x0, x1, v0, v1, u0, u1 = window
        both = np.logical_and(claims[i].evidence[y0:y1, x0:x1], claims[j].evidence[v0:v1, u0:u1])
        areas[pair] = np.count_nonzero(both)
    shared = areas > 0
    return Overlaps(first[shared], second[shared], areas[shared])


def log_odds(confidence: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return ``log(c / (1 - c))`` of confidences, which are first limited to .01 ... .99."""
    limited = np.clip(confidence.astype(np.float64), 0.01, 0.99)
    odds: NDArray[np.float64] = np.log(limited / (1 - limited))
    return odds


def specificity(areas_px: NDArray[np.int64], overlaps: Overlaps) -> NDArray[np.float64]:
    """Return how much each claim deserves to stand in front of the larger claims that it lies in.

    For claim ``i`` it is the largest value, over larger claims ``j``, of ``|i n j| / |i| * log(|j| / |i|)``: the part
    of ``i`` that lies in ``j`` times the logarithm of how much larger ``j`` is. Neighbours that merely touch get next
    to nothing.
    """
    result = np.zeros(len(areas_px))
    for inner, outer in ((overlaps.first, overlaps.second), (overlaps.second, overlaps.first)):
        gain = overlaps.areas_px / areas_px[inner] * np.log(areas_px[outer] / areas_px[inner])
        np.maximum.at(result, inner, gain)
    return result


def suppress_same_masks(areas_px: NDArray[np.int64], overlaps: Overlaps, iou_limit: float) -> NDArray[np.bool_]:
    """Tell which claims stay when of two nearly identical masks only the earlier one is kept.

    Parameters
    ----------
    areas_px : ndarray, shape (N,), int64
        Areas of the claims, which are ordered from the best to the worst.
    overlaps : Overlaps
        Their shared pixels.
    iou_limit : float
        Largest IoU of two masks that are both kept.
    """
    kept = np.ones(len(areas_px), bool)
    union = areas_px[overlaps.first] + areas_px[overlaps.second] - overlaps.areas_px
    for pair in np.nonzero(overlaps.areas_px > iou_limit * union)[0]:
        # Pairs come in lexical order, so whether the better claim itself was kept is known by now.
        if kept[overlaps.first[pair]]:
            kept[overlaps.second[pair]] = False
    return kept
