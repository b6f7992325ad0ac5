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
        "drawn_objects_lost": Metric(
            "rectangles drawn on a slice that the pipeline does not paint where they were, or paints too many of, with "
            "graphs that find what is bright",
            "at most", fp32=0, half=0, int8=0,
        ),
        "drawn_objects_shift_px": Metric(
            "model px by which such rectangles are painted beside where they were drawn, mean of all",
            "at most", fp32=0.1, half=0.1, int8=0.1,
        ),
        # Level 2: tensors
        "calls_refused": Metric(
            "calls with inputs of the contract that a graph refuses, or answers with other types",
            "at most", fp32=0, half=0, int8=0,
        ),
        "embedding_relative_max": Metric(
            "largest difference of an embedding over the largest magnitude of the reference",
            "at most", fp32=1e-4, half=None, int8=None,
        ),
        "embedding_relative_rms": Metric(
            "root mean square of the difference of an embedding over that of the reference, the highest of all tiles",
            "at most", fp32=2e-5, half=0.03, int8=0.1,
        ),
        "embedding_cosine": Metric(
            "cosine between a tile's embedding and the reference, the lowest of all tiles",
            "at least", fp32=0.999999, half=0.999, int8=0.99,
        ),
        "logits_max_over_std": Metric(
            "largest difference of mask logits, from reference embeddings, over the reference's standard deviation",
            "at most", fp32=1e-3, half=None, int8=None,
        ),
        "logits_rms_over_std": Metric(
            "root mean square of the same difference, over the same standard deviation",
            "at most", fp32=3e-5, half=0.03, int8=0.1,
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
        "candidates_missing": Metric(
            "candidates of a tile that the detector returned when the bundle was exported and no longer does",
            "at most", fp32=0, half=0, int8=0,
        ),
        "detections_unmatched": Metric(
            "share of the objects that are left after non-maximum suppression, of either side, without a counterpart "
            "of IoU >= .5, one to one",
            "at most", fp32=0, half=0.1, int8=0.2,
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
        "cut_by_region": Metric(
            "share of a reference mask that lies outside its region, the highest of all masks that lie to four fifths "
            "in their boxes",
            "at most", fp32=0.01, half=0.01, int8=0.01,
        ),
        # Level 5: instances, painted on the pixels of each tile
        "instances_compared": Metric(
            "objects painted from the reference's masks of the reference's boxes",
            "at least", fp32=None, half=None, int8=None,
        ),
        "instances_pq50": Metric(
            "panoptic quality at IoU .5 of the deployed chain's labels, those of the reference taken for the truth",
            "at least", fp32=0.999, half=0.97, int8=0.95,
        ),
        "instances_pq90": Metric("the same at IoU .9", "at least", fp32=0.999, half=0.9, int8=0.85),
        "instances_vi_split": Metric(
            "variation of information between the two, bits: objects that the deployed chain cuts",
            "at most", fp32=0.01, half=0.1, int8=0.15,
        ),
        "instances_vi_merge": Metric("the same: objects that it joins", "at most", fp32=0.01, half=0.1, int8=0.15),
        "detected_compared": Metric(
            "objects painted from the reference's masks of what the reference's detector is sure of",
            "at least", fp32=None, half=None, int8=None,
        ),
        "detected_pq50": Metric(
            "as `instances_pq50`, from each side's own detections", "at least", fp32=0.999, half=0.9, int8=0.85
        ),
        "detected_pq90": Metric("as `instances_pq90`, likewise", "at least", fp32=0.999, half=0.85, int8=0.8),
        "detected_vi_split": Metric("as `instances_vi_split`, likewise", "at most", fp32=0.01, half=0.2, int8=0.3),
        "detected_vi_merge": Metric("as `instances_vi_merge`, likewise", "at most", fp32=0.01, half=0.2, int8=0.3),
        # Level 5 where ground truth is given
        "truth_pq": Metric(
            "panoptic quality of the deployed chain's labels against the ground truth, mean over slices",
            "at least", fp32=None, half=None, int8=None,
        ),
        "truth_pq_loss": Metric(
            "by how much that is less than the reference chain's", "at most", fp32=2e-3, half=0.01, int8=0.02
        ),
        "truth_pq_loss_low": Metric(
            "lower end of the interval that holds this loss in 95 of 100 cases, by resampling slices",
            "at most", fp32=None, half=None, int8=None,
        ),
        "truth_pq_loss_high": Metric("its upper end", "at most", fp32=None, half=None, int8=None),
        "truth_box_iou": Metric(
            "mean IoU of objects with the masks that their exact boxes prompt, mean over slices",
            "at least", fp32=None, half=None, int8=None,
        ),
        "truth_box_iou_loss": Metric(
            "by how much that is less than the reference chain's", "at most", fp32=5e-4, half=5e-3, int8=0.01
        ),
        "truth_box_iou_loss_low": Metric(
            "lower end of the interval of this loss", "at most", fp32=None, half=None, int8=None
        ),
        "truth_box_iou_loss_high": Metric("its upper end", "at most", fp32=None, half=None, int8=None),
    }
)  # fmt: skip
"""Every number that `verify` reports."""
