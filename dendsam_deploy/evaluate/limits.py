"""How far a deployed graph may be from the weights it came from: the one table of limits, by metric and precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dendsam_deploy.bundle.manifest import Precision


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number means, and what is allowed.

    Parameters
    ----------
    meaning : str
        Definition in words.
    sense : str
        Whether the value must be ``at most`` or ``at least`` the limit.
    fp32, half, int8 : float or None
        Limit at a precision; `half` is that of fp16 and bf16. None: the number is reported without being judged,
        because it says little at that precision.
    """

    meaning: str
    sense: Literal["at most", "at least"]
    fp32: float | None
    half: float | None
    int8: float | None

    def judge(self, value: float, precision: Precision) -> tuple[float | None, bool]:
        """Return the limit and whether a value keeps it; a value that is not finite never does."""
        limit = {"fp32": self.fp32, "fp16": self.half, "bf16": self.half, "int8": self.int8}[precision]
        if not math.isfinite(value):
            return limit, False
        if limit is None:
            return None, True
        return limit, value <= limit if self.sense == "at most" else value >= limit


# "Reference" is what segment_anything and ultralytics themselves return for the same bytes.
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        # Level 1: preprocessing
        "bytes_differing": Metric(
            "bytes of a slice brought to 8 bits, or of a padded tile, that differ from the reference implementation",
            "at most", fp32=0, half=0, int8=0,
        ),
        "padded_tile_relative_max": Metric(
            "largest difference of a padded tile's embedding over the largest magnitude of the reference: shows "
            "normalisation and padding as the network sees them",
            "at most", fp32=1e-4, half=None, int8=None,
        ),
        # Level 2: tensors
        "embedding_relative_max": Metric(
            "largest difference of an embedding over the largest magnitude of the reference",
            "at most", fp32=1e-4, half=None, int8=None,
        ),
        "embedding_cosine": Metric(
            "cosine between a tile's embedding and the reference, the lowest of all tiles",
            "at least", fp32=0.999999, half=0.999, int8=0.99,
        ),
        "logits_max_over_std": Metric(
            "largest difference of mask logits, from reference embeddings, over the reference's standard deviation",
            "at most", fp32=1e-3, half=None, int8=None,
        ),
        "end_to_end_logits_max_over_std": Metric(
            "the same from the deployed encoder's own embeddings",
            "at most", fp32=2e-3, half=None, int8=None,
        ),
        "predicted_iou_max_difference": Metric(
            "largest difference of the predicted IoU",
            "at most", fp32=1e-4, half=0.02, int8=0.05,
        ),
        "origins_differing": Metric(
            "boxes whose region begins elsewhere than `geometry.region_origins` says",
            "at most", fp32=0, half=0, int8=0,
        ),
        "not_finite": Metric("outputs that are NaN or infinite", "at most", fp32=0, half=0, int8=0),
        "wrong_shapes": Metric("outputs of another shape than the contract's", "at most", fp32=0, half=0, int8=0),
        # Level 3: boxes
        "boxes_invalid": Metric(
            "candidates that are inverted, outside their tile, or scored outside 0 to 1",
            "at most", fp32=0, half=0, int8=0,
        ),
        "boxes_unmatched": Metric(
            "share of confident candidates, of either side, without a counterpart of IoU >= .5 on the other",
            "at most", fp32=0, half=0.01, int8=0.05,
        ),
        "box_iou_min": Metric(
            "lowest IoU of a confident candidate with its counterpart",
            "at least", fp32=0.999, half=0.9, int8=None,
        ),
        "box_score_max_difference": Metric(
            "largest difference of score between counterparts",
            "at most", fp32=1e-3, half=0.02, int8=0.1,
        ),
        # Level 4: masks, end to end, on the pixels of the tile
        "mask_iou_mean": Metric(
            "IoU of a box's mask with the reference mask inside the box's region, mean over all boxes; pixels within "
            "1e-4 standard deviations of the threshold are undecided and left out",
            "at least", fp32=0.9999, half=0.995, int8=0.98,
        ),
        "mask_iou_p1": Metric("first percentile of the same", "at least", fp32=0.999, half=0.98, int8=None),
        "mask_iou_min": Metric("lowest of the same", "at least", fp32=0.999, half=None, int8=None),
        "flipped_px": Metric(
            "share of the compared pixels that differ, by distance from the border of the reference mask",
            "at most", fp32=None, half=None, int8=None,
        ),
        "flipped_deep_px": Metric(
            "share of the compared pixels that differ more than 2 px from that border",
            "at most", fp32=1e-5, half=1e-3, int8=1e-2,
        ),
        "outside_region_px": Metric(
            "share of the reference masks' pixels that lie outside the regions that the decoder evaluates",
            "at most", fp32=None, half=None, int8=None,
        ),
    }
)  # fmt: skip
"""Every number that `verify` reports."""
