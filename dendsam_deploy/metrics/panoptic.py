"""Panoptic quality: how many objects were found, and how well those that were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from dendsam_deploy.metrics.overlaps import ObjectOverlaps


@dataclass(frozen=True, slots=True)
class PanopticQuality:
    """Segmentation quality, detection quality ("recognition quality" in the reference), and their product.

    Parameters
    ----------
    sq : float
        Mean IoU of the matched pairs; 0 without any.
    dq : float
        F1 score of finding objects, TP / (TP + FP/2 + FN/2).
    """

    sq: float
    dq: float

    @property
    def pq(self) -> float:
        """Panoptic quality."""
        return self.sq * self.dq


def panoptic_quality(overlaps: ObjectOverlaps, iou_threshold: float = 0.5) -> PanopticQuality:
    """Compute the panoptic quality of the one class "object".

    All values are 1 where neither side has an object.

    Parameters
    ----------
    overlaps : ObjectOverlaps
        The pairs that meet.
    iou_threshold : float
        At least .5. A pair matches if its IoU is *larger*, as in the reference; such pairs are one to one by nature.

    Raises
    ------
    InvalidArgumentError
        The threshold is below .5.

    References
    ----------
    A. Kirillov et al., "Panoptic Segmentation", CVPR 2019, doi:10.1109/CVPR.2019.00963
    """
    if iou_threshold < 0.5:
        raise InvalidArgumentError(f"panoptic quality is defined for IoU thresholds from 0.5 on, not {iou_threshold}")
    objects = len(overlaps.truth_ids) + len(overlaps.segment_ids)
    if not objects:
        return PanopticQuality(1.0, 1.0)
    iou = overlaps.iou
    matched_iou = iou[iou > iou_threshold]
    sq = float(matched_iou.mean()) if len(matched_iou) else 0.0
    return PanopticQuality(sq=sq, dq=2 * len(matched_iou) / objects)
