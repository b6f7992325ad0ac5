"""Compares the boxes of a training set with what a YOLO head can return and see, and names remedies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.geometry import default_overlap_px
from dendsam_deploy.instances import box_iou
from dendsam_deploy.models.detector_graph import candidate_count

if TYPE_CHECKING:
    from dendsam_deploy.models.detector import YoloDetector
    from dendsam_deploy.training.detector_tiles import TileBoxes

CANDIDATES_PER_OBJECT = 7
"""Overlapping boxes that YOLO draws around one object, roughly."""

NMS_IOU = 0.6
"""Two boxes that overlap more are taken for one object, unless the bundle says otherwise."""

_MOST_ASPECT = 6.0
"""The box of a longer object that lies askew holds mostly its neighbours."""

_MOST_TWINS = 0.02
"""Part of the boxes that may be lost to others that overlap them, without a word."""

_ENLARGED = 1.05
"""Remedies that name a zoom go a little beyond the limit."""


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """What a YOLO network can return and see of a tile.

    Parameters
    ----------
    tile_size_px : int
        Side of the tiles, at which the network sees them.
    strides_px : tuple of int
        Sides of the cells of its grids, finest first.
    candidates : int
        Boxes that the deployed graph returns for a tile, before duplicates are removed.
    reach_px : float or None
        Longest side of a box that its distances can express; None where there is no bound.
    overlap_px : int
        Overlap of neighbouring tiles at deployment.
    """

    tile_size_px: int
    strides_px: tuple[int, ...]
    candidates: int
    reach_px: float | None
    overlap_px: int

    @property
    def most_objects(self) -> int:
        """Objects of one tile that the candidates suffice for."""
        return self.candidates // CANDIDATES_PER_OBJECT


@dataclass(frozen=True, slots=True)
class LimitCheck:
    """One comparison of the training boxes with a limit of the detector.

    Parameters
    ----------
    name : str
        ``objects_per_tile``, ``smallest_side_px``, ``longest_side_px``, ``largest_side_px``, ``aspect_ratio`` or
        ``overlapping_boxes``.
    found, limit : float
        What the training tiles hold, and what is well served.
    passed : bool
        Whether it is.
    meaning : str
        What was compared, in words.
    is_least : bool
        Whether `limit` is the least that is well served, and not the most.
    remedy : str
        What to do; empty where it passed.
    """

    name: str
    found: float
    limit: float
    passed: bool
    meaning: str
    is_least: bool = False
    remedy: str = ""

    def describe(self) -> str:
        """Say what is wrong and what helps, in a line."""
        served = "from" if self.is_least else "up to"
        return f"{self.meaning}: {self.found:.3g}, well served {served} {self.limit:.3g}; {self.remedy}"


def head_facts(detector: YoloDetector, tile_size_px: int) -> HeadFacts:
    """Read off a network what it can return and see.

    Parameters
    ----------
    detector : YoloDetector
        The network that is trained.
    tile_size_px : int
        Side of the tiles.
    """
    network: Any = detector.network
    head = network.model[-1]
    strides = tuple(sorted(int(stride) for stride in head.stride))
    anchors = sum((tile_size_px // stride) ** 2 for stride in strides)
    bins = int(getattr(head, "reg_max", 1))
    # A side is a distance of up to bins - 1 cells either way; without bins any distance can be said.
    reach = 2.0 * (bins - 1) * strides[-1] if bins > 1 else None
    candidates = candidate_count(tile_size_px, anchors)
    return HeadFacts(tile_size_px, strides, candidates, reach, default_overlap_px(tile_size_px))


def check_limits(boxes: TileBoxes, head: HeadFacts, zoom: float) -> tuple[LimitCheck, ...]:
    """Compare the boxes of the training tiles with what a network can return and see.

    Parameters
    ----------
    boxes : TileBoxes
        What the training tiles hold.
    head : HeadFacts
        The network.
    zoom : float
        Model px per slice px of the heaviest volume, for remedies.
    """
    if not boxes.objects:
        return ()
    short, long, aspect = boxes.short_side_px, boxes.long_side_px, boxes.aspect
    most, narrow = float(boxes.objects_per_tile.max()), float(np.percentile(short, 5))
    wide, finest = float(np.percentile(long, 95)), float(head.strides_px[0])
    crowding = zoom * (most / max(head.most_objects, 1)) ** 0.5 * _ENLARGED
    checks = [
        _at_most(
            "objects_per_tile",
            most,
            head.most_objects,
            f"objects on the fullest tile (the deployed graph returns {head.candidates} candidates, about "
            f"{CANDIDATES_PER_OBJECT} around each object)",
            f"a larger zoom puts fewer on a tile: --zoom {crowding:.3g} (now {zoom:.3g})",
        ),
        LimitCheck(
            "smallest_side_px",
            narrow,
            finest,
            narrow >= finest,
            "shorter side, px, below which 1 box in 20 lies (limit: the detector's finest cells)",
            is_least=True,
            remedy=""
            if narrow >= finest
            else f"such objects are found less surely; a larger zoom helps: --zoom {zoom * finest / narrow:.3g} "
            f"(now {zoom:.3g}), or an architecture with a finer grid (--start yolov8n-p2.yaml)",
        ),
        _at_most(
            "longest_side_px",
            wide,
            head.overlap_px,
            "longer side, px, above which 1 box in 20 lies (limit: the overlap of neighbouring tiles)",
            "where a tile ends, no tile sees such objects whole; a smaller zoom or larger tiles (--image-size) help",
        ),
        _at_most(
            "aspect_ratio",
            float(np.percentile(aspect, 95)),
            _MOST_ASPECT,
            "longer by shorter side, above which 1 box in 20 lies",
            "boxes of long objects that lie askew hold mostly their neighbours; judge the masks, not the boxes alone",
        ),
        _at_most(
            "overlapping_boxes",
            _twin_fraction(boxes),
            _MOST_TWINS,
            f"part of the boxes that overlap a larger one by an IoU above {NMS_IOU:g}",
            "one of each pair is taken for a duplicate; allow more overlap when the bundle is used (--nms)",
        ),
    ]
    if head.reach_px is not None:
        remedy = "longer boxes cannot be drawn; choose a smaller zoom"
        checks.append(
            _at_most("largest_side_px", float(long.max()), head.reach_px, "longest side of any box, px", remedy)
        )
    return tuple(checks)


def _at_most(name: str, found: float, limit: float, meaning: str, remedy: str) -> LimitCheck:
    passed = found <= limit
    return LimitCheck(name, found, float(limit), passed, meaning, remedy="" if passed else remedy)


def _twin_fraction(boxes: TileBoxes) -> float:
    """Return the part of all boxes that non-maximum suppression would drop even if all were found exactly."""
    lost = 0
    for tile in boxes.per_tile:
        overlap = np.triu(box_iou(tile, tile), 1)
        lost += int((overlap > NMS_IOU).any(axis=0).sum())
    return lost / boxes.objects
