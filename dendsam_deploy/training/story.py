"""What a training has to tell: its data, its course, its result and a few pictures; plain values, without torch.

Both trainings fill a `TrainingStory`; `report.training_report` makes a page of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dendsam_deploy.training.boxes import slice_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.training.source import TrainingSource

HistoryRow = Mapping[str, float]
"""One judgement or epoch. Names say what a value is and where it is drawn:

``step`` or ``epoch`` (the first that is there is the axis), ``elapsed_s``;
``loss`` and ``loss_*``: one chart of losses; ``held_out_*``: one chart of scores from 0 to 1;
``learning_rate``: a chart with a logarithmic axis. Other names are kept in the CSV and not drawn.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeStory:
    """One labelled volume of a training.

    Parameters
    ----------
    name, labels : str
        File names.
    depth : int
        Slices of the volume.
    train_blocks, held_out_blocks : tuple of (int, int)
        Half-open ranges of slices.
    gap : int
        Least number of slices between both.
    zoom : float
        Model px per slice px.
    model_pixel_size_nm : float or None
        Size of a model pixel, where it is known.
    weight : float
        How often it was drawn from, relative to the others.
    is_pseudo : bool
        Whether a model made its labels.
    """

    name: str
    labels: str
    depth: int
    train_blocks: tuple[tuple[int, int], ...]
    held_out_blocks: tuple[tuple[int, int], ...]
    gap: int
    zoom: float
    model_pixel_size_nm: float | None = None
    weight: float = 1.0
    is_pseudo: bool = False


@dataclass(frozen=True, slots=True)
class SizeScores:
    """Scores of held-out objects of one class of sizes, such as ``small, below 24 px``; NaN where there is none."""

    label: str
    objects: int
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrediction:
    """A held-out tile, what is true there and what the model says.

    Parameters
    ----------
    caption : str
        Where the tile is from, such as ``raw.tif, slice 17, tile 3``.
    image : ndarray, shape (h, w), uint8
        The micrograph in model px.
    score : float
        How good the prediction is, 0 to 1, on the scale that `score_name` names; the worst are shown first.
    score_name : str
        Such as ``mean IoU``.
    truth_labels, predicted_labels : ndarray, shape (h, w), int or None
        Instance labels, 0 elsewhere, for models that draw masks.
    truth_boxes_xyxy, predicted_boxes_xyxy : ndarray, shape (n, 4), float32 or None
        Boxes, px of `image`, for models that draw boxes.
    """

    caption: str
    image: NDArray[np.uint8]
    score: float
    score_name: str
    truth_labels: NDArray[np.integer] | None = None
    predicted_labels: NDArray[np.integer] | None = None
    truth_boxes_xyxy: NDArray[np.float32] | None = None
    predicted_boxes_xyxy: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxStory:
    """What the training tiles hold, beside the limits of a detector.

    Parameters
    ----------
    objects_per_tile : ndarray, shape (tiles,), int64
        Boxes on each tile.
    short_side_px, aspect : ndarray, shape (boxes,), float32
        Shorter side, tile px, and longer by shorter side of each box.
    most_objects : int
        Objects on one tile that the deployed graph can return.
    finest_cell_px : int
        Side of the finest cells of the detector's grid, tile px.
    """

    objects_per_tile: NDArray[np.int64]
    short_side_px: NDArray[np.float32]
    aspect: NDArray[np.float32]
    most_objects: int
    finest_cell_px: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStory:
    """Everything that the page of a training tells.

    Parameters
    ----------
    kind : str
        ``sam`` or ``detector``.
    model : str
        Architecture, such as ``vit_b`` or ``yolo11n``.
    out : str
        Name of the checkpoint.
    score_name : str
        What the best weights were chosen by, such as ``held-out IoU``.
    first_score, best_score : float
        Its value before the training (NaN where it was not judged then) and of the written weights.
    best_at : float
        Step or epoch of the written weights, on the axis of `history`.
    volumes : tuple of VolumeStory
        The data.
    history : tuple of HistoryRow
        The course, one row for each judgement or epoch.
    seconds : float
        Time of this run and, if it was resumed, of the earlier ones.
    settings, environment : mapping
        Names and values, as they are to be read.
    metrics : mapping
        Further scores of the written weights on the held-out slices, by name.
    per_size : tuple of SizeScores
        The same by the size of objects.
    boxes : BoxStory or None
        For detectors.
    samples : tuple of SamplePrediction
        Held-out tiles with predictions.
    notes : tuple of str
        What a careful reader has to know: stopped early, resumed, never improved, limits of the data.
    """

    kind: Literal["sam", "detector"]
    model: str
    out: str
    score_name: str
    first_score: float
    best_score: float
    best_at: float
    volumes: tuple[VolumeStory, ...]
    history: tuple[HistoryRow, ...]
    seconds: float
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    per_size: tuple[SizeScores, ...] = ()
    boxes: BoxStory | None = None
    samples: tuple[SamplePrediction, ...] = ()
    notes: tuple[str, ...] = ()


def volume_stories(sources: Sequence[TrainingSource], gap: int) -> tuple[VolumeStory, ...]:
    """Tell what the volumes of a training are.

    Parameters
    ----------
    sources : sequence of TrainingSource
        The volumes.
    gap : int
        Least number of slices between those that train and those that judge.
    """
    return tuple(
        VolumeStory(
            name=source.name or Path(source.train.source).name,
            labels=Path(source.train.labels_source).name,
            depth=source.train.depth,
            train_blocks=slice_blocks(source.train.slices),
            held_out_blocks=() if source.held_out is None else slice_blocks(source.held_out.slices),
            gap=gap,
            zoom=source.recipe.zoom,
            model_pixel_size_nm=source.model_pixel_size_nm,
            weight=source.weight,
        )
        for source in sources
    )
