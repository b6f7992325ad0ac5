"""Clicks on objects as a careful person sets them, and the masks that they prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from scipy import ndimage

from dendsam_deploy.geometry import LOGIT_STRIDE_PX
from dendsam_deploy.instances import Masks
from dendsam_deploy.pipeline.infer import infer, on_host
from dendsam_deploy.pipeline.upsample import upsample_masks
from dendsam_deploy.runtimes.runner import keeps_tensors, share_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window
    from dendsam_deploy.pipeline.decode import Embeddings
    from dendsam_deploy.pipeline.prepare import TilePlan
    from dendsam_deploy.runtimes.runner import Runner

PROMPTS_PER_CALL = 16
"""On a CPU. A prompt costs ViT-B's decoder 20 MB while the call lasts, and larger batches are not faster."""

FIRST_ALTERNATIVE = 1
"""From this mask on the decoder's masks answer a single click; the one before answers several."""

OBJECT, BESIDE = 1, 0
"""Labels of points, as in the contract of the graph."""

_EIGHT_CONNECTED = np.ones((3, 3), bool)


@dataclass(frozen=True, slots=True, eq=False)
class Clicks:
    """Points of several objects; all have the same number, for padding would change what the model answers.

    Parameters
    ----------
    points_xy : ndarray, shape (N, P, 2), float32
        Positions ``(x, y)`` in slice px, pixel edges.
    labels : ndarray, shape (N, P), int64
        1 in the object, 0 beside it.
    tile_index : ndarray, shape (N,), int64
        The tile that looks at the object.
    """

    points_xy: NDArray[np.float32]
    labels: NDArray[np.int64]
    tile_index: NDArray[np.int64]

    def take(self, index: NDArray[np.intp]) -> Clicks:
        """Return the clicks on some objects."""
        return Clicks(self.points_xy[index], self.labels[index], self.tile_index[index])

    def with_more(self, pixels_yx: Sequence[tuple[int, int]], labels: Sequence[int]) -> Clicks:
        """Return the clicks with one more on each object, in the middle of a pixel."""
        points = np.array([[(x + 0.5, y + 0.5)] for y, x in pixels_yx], np.float32).reshape(-1, 1, 2)
        return replace(
            self,
            points_xy=np.concatenate([self.points_xy, points], axis=1),
            labels=np.concatenate([self.labels, np.array(labels, np.int64).reshape(-1, 1)], axis=1),
        )


def first_clicks(components: NDArray[np.int32], numbers: Sequence[int], plan: TilePlan) -> Clicks:
    """Click once on each object, as far inside as can be; the tile that owns that point looks at the object.

    Parameters
    ----------
    components : ndarray, shape (Y, X), int32
        Numbered objects.
    numbers : sequence of int
        The objects to click on.
    plan : TilePlan
        How the slice is cut.
    """
    places = ndimage.find_objects(components)
    points = np.zeros((len(numbers), 1, 2), np.float32)
    for row, number in enumerate(numbers):
        rows, columns = places[number - 1]
        y, x = innermost_pixel(components[rows, columns] == number)
        points[row, 0] = columns.start + x + 0.5, rows.start + y + 0.5
    owners = plan.owners(np.concatenate([points[:, 0], points[:, 0]], axis=1))
    return Clicks(points, np.ones((len(numbers), 1), np.int64), owners)


def correcting_click(wanted: NDArray[np.bool_], found: NDArray[np.bool_]) -> tuple[tuple[int, int], int] | None:
    """Click where a mask is most wrong: in the middle of the largest connected error.

    Parameters
    ----------
    wanted, found : ndarray, shape (Y, X), bool
        The object, and its mask.

    Returns
    -------
    (pixel, label) or None
        Row and column, and 1 where the mask lacks something, 0 where it has too much. None where nothing is wrong.

    References
    ----------
    The rule by which interactive segmentation is judged, for example by K. Sofiiuk et al., arXiv:2102.06583.
    """
    best: tuple[int, tuple[int, int], int] | None = None
    rows, columns = (np.flatnonzero((wanted | found).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    wanted, found = (mask[top : rows[-1] + 1, left : columns[-1] + 1] for mask in (wanted, found))
    for label, errors in ((OBJECT, wanted & ~found), (BESIDE, found & ~wanted)):
        pieces, count = ndimage.label(errors, structure=_EIGHT_CONNECTED)
        if not count:
            continue
        areas = np.bincount(pieces.ravel())[1:]
        largest = int(areas.argmax())
        if best is None or areas[largest] > best[0]:
            rows, columns = ndimage.find_objects(pieces)[largest]
            y, x = innermost_pixel(pieces[rows, columns] == largest + 1)
            best = int(areas[largest]), (top + rows.start + y, left + columns.start + x), label
    return None if best is None else best[1:]


def innermost_pixel(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return row and column of the pixel that is farthest from the border of a mask, the first of equals."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = divmod(int(np.argmax(distance)), mask.shape[1])
    return y, x


def decode_clicks(clicks: Clicks, embeddings: Embeddings, decoder: Runner, plan: TilePlan) -> Masks:
    """Decode clicks: several by the mask that is meant for them, one by the most confident of the other three.

    Parameters
    ----------
    clicks : Clicks
        The points.
    embeddings : Embeddings
        The tiles of the slice, encoded.
    decoder : Runner
        The decoder for points, open.
    plan : TilePlan
        How the slice is cut.

    Returns
    -------
    Masks
        One for each object, in their order, on the whole grid of its tile.
    """
    count = len(clicks.tile_index)
    logits: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * count
    predicted_iou = np.zeros(count, np.float32)
    order = np.argsort(clicks.tile_index, kind="stable")
    for start in range(0, count, prompts_per_call(decoder)):
        some = order[start : start + prompts_per_call(decoder)]
        points = points_in_tiles(clicks.points_xy[some], clicks.tile_index[some], plan)
        outputs = run_points(decoder, embeddings, points, clicks.labels[some], clicks.tile_index[some])
        best = np.zeros(len(some), np.intp)
        if clicks.points_xy.shape[1] == 1:
            best = FIRST_ALTERNATIVE + outputs.iou[:, FIRST_ALTERNATIVE:].argmax(axis=1)
        for row, index in enumerate(some.tolist()):
            logits[index] = outputs.logits[row, best[row]].copy()
        predicted_iou[some] = outputs.iou[np.arange(len(some)), best]
    origins, box_index = np.zeros((count, 2), np.int64), np.arange(count, dtype=np.int64)
    return Masks(tuple(logits), origins, clicks.tile_index, predicted_iou, box_index)


@dataclass(frozen=True, slots=True, eq=False)
class PointOutputs:
    """What the decoder for points returns: logits float32 (n, 4, S/4, S/4) and predicted IoU float32 (n, 4)."""

    logits: NDArray[np.float32]
    iou: NDArray[np.float32]


def run_points(
    decoder: Runner,
    embeddings: Embeddings,
    points: NDArray[np.float32],
    labels: NDArray[np.int64],
    tile_index: NDArray[np.int64],
) -> PointOutputs:
    """Run the decoder for points once; `points` (n, p, 2) are in tile px as the graph wants them."""
    values, rows = embeddings.of_tiles(tile_index)
    outputs = infer(decoder, {"embeddings": values, "points": points, "labels": labels, "tile_index": rows})
    return PointOutputs(cast("NDArray[np.float32]", outputs["logits"]), cast("NDArray[np.float32]", outputs["iou"]))


def reachable_embeddings(embeddings: Embeddings, encoder: Runner, decoder: Runner) -> Embeddings:
    """Return embeddings where the decoder for points, which may run on another engine, can read them."""
    return embeddings if share_memory(encoder, decoder) else replace(embeddings, values=on_host(embeddings.values))


def prompts_per_call(decoder: Runner) -> int:
    """Return how many prompts keep the decoder for points busy."""
    return decoder.rows_per_call if keeps_tensors(decoder) else PROMPTS_PER_CALL


def points_in_tiles(
    points_xy: NDArray[np.float32], tile_index: NDArray[np.int64], plan: TilePlan
) -> NDArray[np.float32]:
    """Convert points ``(N, P, 2)`` from slice px, edges, to the graph's tile px, where centres are whole numbers."""
    scale_y, scale_x = plan.frame.scale_yx
    corners = np.array([(tile.read.x0, tile.read.y0) for tile in plan.tiles], np.float32)[tile_index]
    points: NDArray[np.float32] = points_xy * np.array([scale_x, scale_y], np.float32) - corners[:, None] - 0.5
    return points.astype(np.float32, copy=False)


def mask_of(masks: Masks, index: int, plan: TilePlan, mask_logit: float) -> NDArray[np.bool_]:
    """Return one mask on the pixels of the whole slice."""
    height, width = plan.frame.slice_hw
    whole = np.zeros((height, width), bool)
    one = slice(index, index + 1)  # by itself: all masks would be looked at for each
    alone = Masks(
        masks.logits[one], masks.origins_yx[one], masks.tile_index[one], masks.predicted_iou[one], masks.box_index[one]
    )
    (patch,) = upsample_masks(alone, plan, mask_logit)
    whole[patch.window.slices] = patch.logits > mask_logit
    return whole


def mask_boxes(masks: Masks, plan: TilePlan, mask_logit: float) -> NDArray[np.float32]:
    """Return the boxes ``(N, 4)`` of masks in slice px, exact to a cell of their grid; of an empty mask the tile."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for index, logits in enumerate(masks.logits):
        window: Window = plan.tiles[int(masks.tile_index[index])].read
        rows, columns = (np.flatnonzero((logits > mask_logit).any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            boxes[index] = window.x0, window.y0, window.x1, window.y1
            continue
        y, x = masks.origins_yx[index].tolist()
        cells = np.array([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1], np.float32)
        boxes[index] = cells * LOGIT_STRIDE_PX + np.array([window.x0, window.y0] * 2, np.float32)
    return plan.frame.boxes_to_slice(boxes)
