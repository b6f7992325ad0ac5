"""The baseline linker: the largest IoU first, one partner above and one below, no branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.pipeline.link_overlap import PairVerdict, WeighedPairs

if TYPE_CHECKING:
    from dendsam_deploy.pipeline.link import LinkOptions
    from dendsam_deploy.pipeline.link_overlap import Overlaps


def judge_by_iou(overlaps: Overlaps, skipped: int, options: LinkOptions) -> PairVerdict:
    """Chain the pairs of two slices in descending order of IoU; ties go to the lower rows.

    Parameters
    ----------
    overlaps : Overlaps
        Pairs of objects that are still without partner.
    skipped : int
        Slices between the two; they make no difference here.
    options : LinkOptions
        `min_iou` is read. The IoU itself serves as probability.
    """
    del skipped
    order = np.lexsort((overlaps.upper, overlaps.lower, -overlaps.iou))
    taken_lower: set[int] = set()
    taken_upper: set[int] = set()
    kept: list[int] = []
    for pair in order[overlaps.iou[order] >= options.min_iou].tolist():
        below, above = int(overlaps.lower[pair]), int(overlaps.upper[pair])
        if below not in taken_lower and above not in taken_upper:
            kept.append(pair)
            taken_lower.add(below)
            taken_upper.add(above)
    index = np.array(kept, np.intp)
    iou = np.clip(overlaps.iou[index], 1e-6, 1 - 1e-6)
    return PairVerdict(WeighedPairs(index, np.log(iou / (1 - iou))), WeighedPairs.none(), WeighedPairs.none())
