"""The page of a training: how it went, how good the result is, on what it learnt, and what it still gets wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.durable import make_folder, published
from dendsam_deploy.instances import box_iou
from dendsam_deploy.report.figures import Curve, count_histogram, course_chart, size_histogram
from dendsam_deploy.report.overlays import outlines
from dendsam_deploy.report.page import render_page
from dendsam_deploy.volume.raster import encode_png

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.training.story import HistoryRow, SamplePrediction, TrainingStory, VolumeStory

_PARTNER_IOU = 0.5
"""A true object and a predicted one of at least that IoU belong together."""

_TRUTH_RGB, _PREDICTION_RGB = (86, 180, 233), (255, 176, 0)
"""Blue and orange tell apart for colour-blind eyes too, and both stand out from grey."""

_FILL_ALPHA = 110

_AXES = ("epoch", "step")
"""Columns of a history that count."""

_SCORE_COLUMNS = ("held_out_", "train_")
"""Beginnings of the names of columns that hold scores from 0 to 1."""


@dataclass(frozen=True, slots=True)
class BoxMark:
    """A box to draw on a picture, px of it."""

    x: float
    y: float
    width: float
    height: float
    is_truth: bool
    has_partner: bool


@dataclass(frozen=True, slots=True)
class SamplePicture:
    """A held-out tile with truth and prediction over it; either a layer of outlines or boxes."""

    caption: str
    score: float
    score_name: str
    width_px: int
    height_px: int
    image_png: bytes
    layer_png: bytes | None
    boxes: tuple[BoxMark, ...]
    missed: int
    wrong: int


@dataclass(frozen=True, slots=True)
class SplitBlock:
    """A block of slices of a volume and what it served: ``train``, ``held out`` or ``unused``."""

    first: int
    stop: int
    use: str


def write_training_report(folder: Path, story: TrainingStory) -> Path:
    """Write ``report.html`` of a training, whole or not at all.

    Parameters
    ----------
    folder : Path
        Where it goes, usually `training.logbook.logbook_folder`; made where it is missing.
    story : TrainingStory
        What there is to tell.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    make_folder(folder)
    path = folder / "report.html"
    with published(path) as stream:
        stream.write(render_training_report(story).encode())
    return path


def render_training_report(story: TrainingStory) -> str:
    """Return the page of a training."""
    axis = _axis(story.history)
    gain = story.best_score - story.first_score
    content = {
        "story": story,
        "axis": axis,
        "length": max((row[axis] for row in story.history), default=0.0),
        "gain": gain,
        "charts": _charts(story, axis),
        "splits": [split_blocks(volume) for volume in story.volumes],
        "samples": [draw_sample(sample) for sample in sorted(story.samples, key=lambda sample: sample.score)],
        "size_scores": list(dict.fromkeys(name for entry in story.per_size for name in entry.scores)),
        "size_objects": sum(entry.objects for entry in story.per_size),
        "partner_iou": _PARTNER_IOU,
    }
    return render_page("training.html.jinja", content)


def split_blocks(volume: VolumeStory) -> tuple[SplitBlock, ...]:
    """Return what every slice of a volume served, as blocks from the first slice to the last."""
    known = [
        *(SplitBlock(first, stop, "train") for first, stop in volume.train_blocks),
        *(SplitBlock(first, stop, "held out") for first, stop in volume.held_out_blocks),
    ]
    blocks, reached = [], 0
    for block in sorted(known, key=lambda block: block.first):
        if block.first > reached:
            blocks.append(SplitBlock(reached, block.first, "unused"))
        blocks.append(block)
        reached = block.stop
    if reached < volume.depth:
        blocks.append(SplitBlock(reached, volume.depth, "unused"))
    return tuple(blocks)


def draw_sample(sample: SamplePrediction) -> SamplePicture:
    """Draw a held-out tile; what has no partner on the other side is filled."""
    height, width = sample.image.shape
    layer: bytes | None = None
    boxes: tuple[BoxMark, ...] = ()
    missed = wrong = 0
    if sample.truth_boxes_xyxy is not None and sample.predicted_boxes_xyxy is not None:
        overlap = box_iou(sample.truth_boxes_xyxy, sample.predicted_boxes_xyxy)
        is_found, is_right = (overlap.max(axis=axis, initial=0) >= _PARTNER_IOU for axis in (1, 0))
        boxes = (
            *_marks(sample.truth_boxes_xyxy, is_found, is_truth=True),
            *_marks(sample.predicted_boxes_xyxy, is_right, is_truth=False),
        )
        missed, wrong = int((~is_found).sum()), int((~is_right).sum())
    elif sample.truth_labels is not None and sample.predicted_labels is not None:
        truth, predicted = (
            np.ascontiguousarray(labels).astype(np.uint32) for labels in (sample.truth_labels, sample.predicted_labels)
        )
        lost, extra = _without_partner(truth, predicted)
        layer = encode_png(_outline_layer(truth, predicted, lost, extra))
        missed, wrong = len(lost), len(extra)
    return SamplePicture(
        caption=sample.caption,
        score=sample.score,
        score_name=sample.score_name,
        width_px=width,
        height_px=height,
        image_png=encode_png(np.ascontiguousarray(sample.image)),
        layer_png=layer,
        boxes=boxes,
        missed=missed,
        wrong=wrong,
    )


def _marks(boxes_xyxy: NDArray[np.float32], has_partner: NDArray[np.bool_], *, is_truth: bool) -> tuple[BoxMark, ...]:
    return tuple(
        BoxMark(x0, y0, x1 - x0, y1 - y0, is_truth, bool(partner))
        for (x0, y0, x1, y1), partner in zip(boxes_xyxy.tolist(), has_partner, strict=True)
    )


def _without_partner(
    truth: NDArray[np.uint32], predicted: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the true and the predicted labels that overlap none of the other side by `_PARTNER_IOU`."""
    pairs, overlap = np.unique(np.stack([truth.ravel(), predicted.ravel()]), axis=1, return_counts=True)
    sizes = [dict(zip(*np.unique(labels, return_counts=True), strict=True)) for labels in (truth, predicted)]
    union = np.array([sizes[0][t] + sizes[1][p] for t, p in pairs.T]) - overlap
    partners = (pairs > 0).all(axis=0) & (overlap >= _PARTNER_IOU * union)
    lost, extra = (
        np.setdiff1d(labels[labels > 0], pairs[side, partners]) for side, labels in enumerate((truth, predicted))
    )
    return lost, extra


def _outline_layer(
    truth: NDArray[np.uint32], predicted: NDArray[np.uint32], lost: NDArray[np.uint32], extra: NDArray[np.uint32]
) -> NDArray[np.uint8]:
    """Return a layer ``(h, w, 4)``: outlines of both, and areas of what has no partner."""
    layer = np.zeros((*truth.shape, 4), np.uint8)
    layer[np.isin(truth, lost)] = (*_TRUTH_RGB, _FILL_ALPHA)
    layer[np.isin(predicted, extra)] = (*_PREDICTION_RGB, _FILL_ALPHA)
    layer[outlines(truth)] = (*_TRUTH_RGB, 255)
    layer[outlines(predicted)] = (*_PREDICTION_RGB, 255)
    return layer


def _charts(story: TrainingStory, axis: str) -> dict[str, str]:
    """Draw the charts of the page; those without anything to show are left out."""
    charts = {}
    best_at = None if math.isnan(story.best_at) else story.best_at
    names = list(dict.fromkeys(name for row in story.history for name in row))
    losses = [name for name in names if name == "loss" or name.startswith("loss_")]
    scores = [name for name in names if name.startswith(_SCORE_COLUMNS)]
    rates = [name for name in names if name.startswith("learning_rate")]
    if curves := _curves(story.history, axis, losses):
        charts["loss"] = course_chart(curves, axis, "loss on training tiles", best_at, "count")
    if curves := _curves(story.history, axis, scores):
        charts["score"] = course_chart(curves, axis, "score", best_at, "fraction")
    if curves := _curves(story.history, axis, rates):
        charts["rate"] = course_chart(curves, axis, "learning rate", None, "log")
    if story.boxes is not None and len(story.boxes.short_side_px):
        boxes = story.boxes
        charts["crowd"] = count_histogram(
            boxes.objects_per_tile[boxes.objects_per_tile > 0], "objects on a training tile", boxes.most_objects
        )
        side = boxes.short_side_px.astype(np.float64)
        charts["side"] = size_histogram(side[side > 0], "shorter side of a box, px", boxes.finest_cell_px)
        charts["aspect"] = size_histogram(boxes.aspect.astype(np.float64), "longer by shorter side of a box")
    return charts


def _curves(history: Sequence[HistoryRow], axis: str, names: Sequence[str]) -> list[Curve]:
    """Return the columns of a history that have a value anywhere; of more than six the first ones."""
    x = np.array([row[axis] for row in history], np.float64)
    curves = []
    for name in names:
        y = np.array([row.get(name, math.nan) for row in history], np.float64)
        if name.startswith("learning_rate"):
            y = np.where(y > 0, y, math.nan)  # its axis is logarithmic
        if np.isfinite(y).any():
            curves.append(Curve(_label(name), x, y))
    return curves[:6]


def _label(name: str) -> str:
    """Return the name of a column as it is to be read."""
    for code, word in (("held_out_", "held-out "), ("map50_95", "AP50-95"), ("map50", "AP50"), ("iou", "IoU")):
        name = name.replace(code, word)
    return name.replace("_", " ")


def _axis(history: Sequence[HistoryRow]) -> str:
    """Return the column that counts."""
    return next((name for name in _AXES if history and name in history[0]), _AXES[-1])
