"""Where prompts come from: the truth's boxes, clicks into the truth, the detector, or a grid of points.

Whatever the prompts, every source ends in a label map that is painted in the same way, so that one scorer compares all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from dendsam_deploy.evaluate.point_grid import GridCounts, GridOptions, find_grid_masks
from dendsam_deploy.evaluate.point_prompts import (
    correcting_click,
    decode_clicks,
    first_clicks,
    mask_boxes,
    mask_of,
    reachable_embeddings,
)
from dendsam_deploy.instances import Detections, Masks
from dendsam_deploy.pipeline.decode import BoxDecoder, Embeddings, boxes_in_tiles, decode_masks, encode_tiles
from dendsam_deploy.pipeline.detect import clip_to_slice, detect_objects
from dendsam_deploy.pipeline.paint import paint_masks
from dendsam_deploy.pipeline.prepare import PreparedSlice, prepare_slice
from dendsam_deploy.pipeline.segment import require_detector
from dendsam_deploy.volume.label_objects import label_components

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.point_prompts import Clicks
    from dendsam_deploy.geometry import Window
    from dendsam_deploy.pipeline.segment import SliceRecipe
    from dendsam_deploy.runtimes.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class TrueSlice:
    """A slice of the truth as objects that can be prompted: the 8-connected pieces of its labels.

    Parameters
    ----------
    z : int
        The slice.
    image : ndarray, shape (Y, X), uint8
        Its micrograph.
    components : ndarray, shape (Y, X), int32
        Numbered pieces, 0 for background.
    boxes_xyxy : mapping
        Number -> tight box, pixel edges, of the pieces that are judged.
    void : frozenset of int
        Numbers of pieces that are not: labels to be ignored, and pieces that are too small to be prompted.
    """

    z: int
    image: NDArray[np.uint8]
    components: NDArray[np.int32]
    boxes_xyxy: Mapping[int, tuple[int, int, int, int]]
    void: frozenset[int]

    @property
    def boxes(self) -> NDArray[np.float32]:
        """The boxes of the judged pieces, shape (N, 4), float32."""
        return np.array(list(self.boxes_xyxy.values()), np.float32).reshape(-1, 4)


def read_true_slice(
    z: int, image: NDArray[np.uint8], labels: NDArray[np.uint32], ignore_labels: tuple[int, ...], least_px: float
) -> TrueSlice:
    """Take a label slice apart into the pieces that are prompted and judged.

    Parameters
    ----------
    z : int
        The slice.
    image : ndarray, shape (Y, X), uint8
        Its micrograph.
    labels : ndarray, shape (Y, X), uint32
        Its truth.
    ignore_labels : tuple of int
        Labels that are not judged; 0 among them leaves unlabelled tissue out.
    least_px : float
        Pieces of fewer pixels are not judged.
    """
    components, ids = label_components(labels)
    areas_px = np.bincount(components.ravel(), minlength=len(ids) + 1)
    boxes: dict[int, tuple[int, int, int, int]] = {}
    void: set[int] = {0} if 0 in ignore_labels else set()
    for number, (rows, columns) in enumerate(ndimage.find_objects(components, len(ids)), start=1):
        if int(ids[number - 1]) in ignore_labels or areas_px[number] < least_px:
            void.add(number)
        else:
            boxes[number] = columns.start, rows.start, columns.stop, rows.stop
    return TrueSlice(z, image, components, MappingProxyType(boxes), frozenset(void))


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """One slice on one bundle: encoded once for all sources.

    Parameters
    ----------
    session : Session
        Open.
    recipe : SliceRecipe
        How slices are cut, decoded and painted.
    truth : TrueSlice
        The slice.
    prepared : PreparedSlice
        Its tiles.
    embeddings : Embeddings
        All of them, encoded.
    """

    session: Session
    recipe: SliceRecipe
    truth: TrueSlice
    prepared: PreparedSlice
    embeddings: Embeddings

    @classmethod
    def of_slice(cls, session: Session, recipe: SliceRecipe, truth: TrueSlice) -> Bench:
        """Encode a slice."""
        prepared = prepare_slice(truth.image, recipe.plan)
        tiles = np.arange(len(recipe.plan.tiles), dtype=np.int64)
        embeddings = encode_tiles(prepared, tiles, session.encoder, session.decoder)
        return cls(session, recipe, truth, prepared, embeddings)

    def paint_boxes(self, detections: Detections) -> NDArray[np.uint32]:
        """Decode and paint boxes in slice px."""
        plan = self.recipe.plan
        inside = clip_to_slice(detections, plan)
        if not len(inside):
            return np.zeros(plan.frame.slice_hw, np.uint32)
        box_index, tile_index = plan.views(inside.boxes_xyxy)
        boxes = boxes_in_tiles(inside.boxes_xyxy[box_index], tile_index, plan)
        decoder = BoxDecoder(self.session.decoder, self.recipe.decode)
        masks = decode_masks(boxes, box_index, tile_index, self.embeddings, decoder)
        return self.paint(inside, masks)

    def paint(self, detections: Detections, masks: Masks) -> NDArray[np.uint32]:
        """Let masks compete for the pixels of the slice."""
        labels, _ = paint_masks(detections, masks, self.recipe.plan, self.recipe.paint)
        return labels

    @property
    def clicked(self) -> Embeddings:
        """The embeddings where the decoder for points can read them."""
        assert self.session.points is not None, "who asks for clicks has looked"
        return reachable_embeddings(self.embeddings, self.session.encoder, self.session.points)


@dataclass(frozen=True, slots=True, eq=False)
class SourceResult:
    """The label map that a source ends in.

    Parameters
    ----------
    labels : ndarray, shape (Y, X), uint32
        Painted objects.
    seconds : float
        What it took, without the encoder.
    detections : Detections or None
        The detector's boxes, where it was asked.
    grid : GridCounts or None
        How the masks of a grid were chosen.
    """

    labels: NDArray[np.uint32]
    seconds: float
    detections: Detections | None = None
    grid: GridCounts | None = None


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How prompts are made.

    Parameters
    ----------
    points : int
        Clicks on each object in the row of several points: the first far inside, each further one where the last mask
        is most wrong.
    grid : GridOptions
        The grid of points.
    """

    points: int = 3
    grid: GridOptions = field(default_factory=GridOptions)


def truth_boxes(bench: Bench, options: SourceOptions) -> SourceResult:
    """Prompt with the tight box of every piece of the truth."""
    start, boxes = perf_counter(), bench.truth.boxes
    labels = bench.paint_boxes(Detections(boxes, np.ones(len(boxes), np.float32)))
    return SourceResult(labels, perf_counter() - start)


def truth_point(bench: Bench, options: SourceOptions) -> SourceResult:
    """Click once on every piece of the truth, as far inside as can be."""
    return _clicked(bench, 1)


def truth_points(bench: Bench, options: SourceOptions) -> SourceResult:
    """Click several times, in the object or beside it, each time where the last mask is most wrong."""
    return _clicked(bench, options.points)


def detector_boxes(bench: Bench, options: SourceOptions) -> SourceResult:
    """Prompt with what the bundle's own detector finds, at its own thresholds."""
    start = perf_counter()
    found = detect_objects(bench.prepared, require_detector(bench.session), bench.recipe.detect)
    labels = bench.paint_boxes(found)
    return SourceResult(labels, perf_counter() - start, detections=found)


def point_grid(bench: Bench, options: SourceOptions) -> SourceResult:
    """Click everywhere and keep what is convincing."""
    decoder = bench.session.points
    assert decoder is not None, "who asks for clicks has looked"
    start, paint = perf_counter(), bench.recipe.paint
    found = find_grid_masks(bench.clicked, decoder, bench.recipe.plan, paint.mask_logit, options.grid)
    labels = bench.paint(found.detections, found.masks)
    return SourceResult(labels, perf_counter() - start, grid=found.counts)


SOURCES: Mapping[str, Callable[[Bench, SourceOptions], SourceResult]] = MappingProxyType(
    {
        "truth_box": truth_boxes,
        "truth_point": truth_point,
        "truth_points": truth_points,
        "detector_box": detector_boxes,
        "point_grid": point_grid,
    }
)
"""The rows of a comparison by name, in their order. A new source is one function and one row."""

NEEDS = MappingProxyType(
    {"truth_point": "points", "truth_points": "points", "point_grid": "points", "detector_box": "detector"}
)
"""The runner of a session that a source needs beside encoder and decoder."""


def _clicked(bench: Bench, rounds: int) -> SourceResult:
    """Click on every object, and correct its mask until nothing is wrong or all clicks are used up."""
    start, plan, threshold = perf_counter(), bench.recipe.plan, bench.recipe.paint.mask_logit
    numbers = list(bench.truth.boxes_xyxy)
    decoder, embeddings = bench.session.points, bench.clicked
    assert decoder is not None, "who asks for clicks has looked"
    clicks = first_clicks(bench.truth.components, numbers, plan)
    masks = decode_clicks(clicks, embeddings, decoder, plan)
    open_rows = np.arange(len(numbers))
    for _ in range(rounds - 1):
        rows, clicks = _corrected(bench, clicks, masks, open_rows)
        if not len(rows):
            break
        masks = _replaced(masks, decode_clicks(clicks, embeddings, decoder, plan), rows)
        open_rows = rows
    boxes = mask_boxes(masks, plan, threshold)
    labels = bench.paint(Detections(boxes, np.ones(len(boxes), np.float32)), masks)
    return SourceResult(labels, perf_counter() - start)


def _corrected(bench: Bench, clicks: Clicks, masks: Masks, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], Clicks]:
    """Add a click to each of some objects whose mask is wrong; return which they are, and their clicks."""
    plan, numbers = bench.recipe.plan, list(bench.truth.boxes_xyxy)
    kept, pixels, labels = [], [], []
    for place, row in enumerate(rows.tolist()):
        window: Window = plan.frame.window_to_slice(plan.tiles[int(masks.tile_index[row])].read)
        wanted = bench.truth.components[window.slices] == numbers[row]
        found = mask_of(masks, row, plan, bench.recipe.paint.mask_logit)[window.slices]
        click = correcting_click(wanted, found)
        if click is not None:
            (y, x), label = click
            kept.append(place)
            pixels.append((y + window.y0, x + window.x0))
            labels.append(label)
    places = np.array(kept, np.intp)
    return rows[places], clicks.take(places).with_more(pixels, labels)


def _replaced(masks: Masks, better: Masks, rows: NDArray[np.intp]) -> Masks:
    """Put masks of the whole grid in the place of others."""
    logits, predicted_iou = list(masks.logits), masks.predicted_iou.copy()
    for place, row in enumerate(rows.tolist()):
        logits[row] = better.logits[place]
    predicted_iou[rows] = better.predicted_iou
    return Masks(tuple(logits), masks.origins_yx, masks.tile_index, predicted_iou, masks.box_index)
