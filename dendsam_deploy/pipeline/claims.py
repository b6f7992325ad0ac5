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
    y0, x0 = min(c.window.y0 for c in filled), min(c.window.x0 for c in filled)
    y1, x1 = max(c.window.y1 for c in filled), max(c.window.x1 for c in filled)
    whole = Claim(Window(y0, x0, y1 - y0, x1 - x0), np.zeros((y1 - y0, x1 - x0), np.uint8))
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
    share = np.minimum(excess / np.median(excess[inside]), 1)
    evidence = np.where(inside, 1 + np.floor(share * (FULL_EVIDENCE - 1)), 0)
    return Claim(patch.window, evidence.astype(np.uint8))


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
    rows: list[tuple[int, int, int]] = []
    for index, claim in enumerate(claims):
        later = edges[index + 1 :]
        meets = (later[:, :2] < edges[index, 2:]).all(axis=1) & (later[:, 2:] > edges[index, :2]).all(axis=1)
        for other in (np.nonzero(meets)[0] + index + 1).tolist():
            common = intersection(claim.window, claims[other].window)
            both = (claim.part(common) > 0) & (claims[other].part(common) > 0)
            if shared := int(np.count_nonzero(both)):
                rows.append((index, other, shared))
    first, second, areas = np.array(rows, np.int64).reshape(-1, 3).T
    return Overlaps(first, second, areas)


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
