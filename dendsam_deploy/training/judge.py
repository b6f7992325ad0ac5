"""Judges a model under training: IoU of its masks with held-out objects, prompted by their boxes or a point in each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.nn import functional

from dendsam_deploy.geometry import LOGIT_STRIDE_PX
from dendsam_deploy.training.prompted_decoder import PromptedDecoder
from dendsam_deploy.training.prompts import PromptSet, thickest_pixel
from dendsam_deploy.training.samples import (
    MIN_OBJECT_PX,
    LabelledVolume,
    Tile,
    TileObjects,
    TileRecipe,
    boxes_by_region,
    deployed_tiles,
    jittered_boxes,
    spread_slices,
    tile_objects,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from dendsam_deploy.models.box_decoder import BoxDecoderGraph
    from dendsam_deploy.models.image_encoder import ImageEncoderGraph

BOXES_AT_ONCE = 16

JUDGED_JITTER = (0.05, 0.15)
"""Error of the boxes that stand for a detector's, as fractions of their sides."""

PromptKind = Literal["box", "jittered", "point"]
PROMPT_KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
"""Exact boxes; boxes as wrong as a detector's; one point each where the object is thickest."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a training stands after some steps and seconds.

    Parameters
    ----------
    step : int
        Optimiser steps so far.
    elapsed_s : float
        Seconds so far.
    held_out_iou : float
        Mean IoU with exact boxes on held-out slices.
    loss, iou : float or None
        Running means over the training batches; None before the first step.
    learning_rate : float or None
        Of the last step.
    """

    step: int
    elapsed_s: float
    held_out_iou: float
    loss: float | None = None
    iou: float | None = None
    learning_rate: float | None = None


class JudgedTile(NamedTuple):
    """A tile of a held-out slice `z` and those of its objects that are large enough to count."""

    tile: Tile
    objects: TileObjects
    z: int = 0


class TileMasks(NamedTuple):
    """What a model makes of the prompted objects of a tile: masks of windows, their corners, and IoU with the truth.

    `windows` are n bool arrays, `corners_yx` (n, 2) their first pixels in the tile, `scores` (n,).
    """

    windows: list[NDArray[np.bool_]]
    corners_yx: NDArray[np.int64]
    scores: NDArray[np.float64]


def judged_tiles(
    volume: LabelledVolume, recipe: TileRecipe, slices: int, min_object_px: float = MIN_OBJECT_PX
) -> list[JudgedTile]:
    """Choose what to judge by: of each of up to `slices` evenly spaced slices one tile with objects.

    The tiles are those of deployment, and of one slice after the other they lie ever further down. Where the spaced
    slices show nothing, all slices are searched. The list is empty only where no tile shows a whole object of
    `min_object_px`, slice px.
    """
    spread = spread_slices(volume, slices)
    chosen: list[JudgedTile] = []
    for turn, z in enumerate(spread):
        shown = _tiles_with_objects(volume, z, recipe, min_object_px)
        chosen += shown[turn * len(shown) // len(spread) :][:1]
    if not chosen:
        every = (_tiles_with_objects(volume, z, recipe, min_object_px) for z in volume.slices)
        chosen = next((shown for shown in every if shown), [])
    return chosen


def _tiles_with_objects(volume: LabelledVolume, z: int, recipe: TileRecipe, min_object_px: float) -> list[JudgedTile]:
    """Return the tiles of a slice that show objects worth judging."""
    tiles = deployed_tiles(volume[z], recipe)
    judged = [JudgedTile(tile, tile_objects(tile, max(min_object_px * recipe.zoom**2, 1)), z) for tile in tiles]
    return [entry for entry in judged if len(entry.objects.numbers)]


def box_prompt_iou(
    encoder: ImageEncoderGraph, decoder: BoxDecoderGraph, judged: Iterable[JudgedTile]
) -> NDArray[np.float64]:
    """Return the IoU of each object's mask with the object; masks are upsampled bilinearly and cut at logit 0.

    Returns
    -------
    ndarray, shape (N,), float64
    """
    return prompted_iou(encoder, decoder, judged, ("box",))["box"]


@torch.no_grad()
def prompted_iou(
    encoder: ImageEncoderGraph,
    decoder: BoxDecoderGraph,
    judged: Iterable[JudgedTile],
    kinds: Iterable[PromptKind] = PROMPT_KINDS,
) -> dict[PromptKind, NDArray[np.float64]]:
    """Return the IoU of each object's mask with the object for several kinds of prompts; nothing in it is random.

    A box is answered by SAM's single mask on the box's region, as deployed; a point by the mask that the model itself
    thinks best of, on the whole tile.

    Returns
    -------
    dict of ndarray, shape (N,), float64
        By kind, the objects in the same order.
    """
    encoder.eval()
    decoder.eval()
    scores: dict[PromptKind, list[NDArray[np.float64]]] = {kind: [] for kind in kinds}
    for turn, entry in enumerate(judged):
        embeddings = encode_tile(encoder, decoder, entry.tile)
        for kind, found in scores.items():
            if kind == "point":
                found.append(_point_scores(decoder, embeddings, entry))
                continue
            boxes = entry.objects.boxes_xyxy
            if kind == "jittered":
                boxes = jittered_boxes(boxes, JUDGED_JITTER, 0.0, np.random.default_rng(turn))
            found.append(box_masks(decoder, embeddings, entry, boxes).scores)
    return {kind: np.concatenate([np.zeros(0), *found]) for kind, found in scores.items()}


def encode_tile(encoder: ImageEncoderGraph, decoder: BoxDecoderGraph, tile: Tile) -> Tensor:
    """Return the embedding of a tile, ``(1, 256, S/16, S/16)`` float32, on the decoder's device."""
    device = decoder.image_position.device
    image = torch.from_numpy(tile.image)[None].to(device)
    embeddings: Tensor = encoder(image, torch.tensor([tile.size_hw], device=device)).float()
    return embeddings


@torch.no_grad()
def box_masks(
    decoder: BoxDecoderGraph, embeddings: Tensor, judged: JudgedTile, boxes_xyxy: NDArray[np.float32]
) -> TileMasks:
    """Decode boxes ``(n, 4)``, one for each object of a tile, and compare the masks with the whole objects."""
    tile, objects = judged.tile, judged.objects
    windows: dict[int, NDArray[np.bool_]] = {}
    corners = np.zeros((len(boxes_xyxy), 2), np.int64)
    for region, rows in boxes_by_region(boxes_xyxy, decoder.grid):
        for some in np.array_split(rows, math.ceil(len(rows) / BOXES_AT_ONCE)):
            for row, mask, corner in _region_masks(decoder, embeddings, boxes_xyxy, some, region):
                y, x = corner
                windows[row] = mask[: max(tile.size_hw[0] - y, 0), : max(tile.size_hw[1] - x, 0)]
                corners[row] = corner
    ordered = [windows[row] for row in range(len(boxes_xyxy))]
    scores = []
    for mask, (y, x), number, area in zip(ordered, corners, objects.numbers, objects.areas_px, strict=True):
        true = tile.objects[y : y + mask.shape[0], x : x + mask.shape[1]] == number
        overlap = int((mask & true).sum())
        scores.append(overlap / (int(mask.sum()) + int(area) - overlap))
    return TileMasks(ordered, corners, np.array(scores, np.float64))


def _region_masks(
    decoder: BoxDecoderGraph, embeddings: Tensor, boxes_xyxy: NDArray[np.float32], rows: NDArray[np.intp], region: int
) -> Iterator[tuple[int, NDArray[np.bool_], tuple[int, int]]]:
    """Decode some boxes on regions of one size; yield row, mask of the region, and its first pixel ``(y, x)``."""
    device = embeddings.device
    boxes = torch.from_numpy(boxes_xyxy[rows]).to(device)
    index = torch.zeros(len(boxes), dtype=torch.int64, device=device)
    logits, origin, _ = decoder(embeddings, boxes, index, torch.tensor([region], device=device))
    masks = functional.interpolate(logits[None], scale_factor=LOGIT_STRIDE_PX, mode="bilinear")[0] > 0
    corners = origin.cpu().numpy() * LOGIT_STRIDE_PX
    for row, mask, (y, x) in zip(rows, masks.cpu().numpy(), corners, strict=True):
        yield int(row), mask, (int(y), int(x))


def _point_scores(decoder: BoxDecoderGraph, embeddings: Tensor, judged: JudgedTile) -> NDArray[np.float64]:
    """Prompt each object of a tile by one point and return the masks' IoU with the objects."""
    (tile, objects, _), device = judged, embeddings.device
    height, width = tile.size_hw
    points = np.zeros((len(objects.numbers), 1, 2), np.float32)
    for row, (number, box) in enumerate(zip(objects.numbers, objects.boxes_xyxy.astype(int), strict=True)):
        x0, y0, x1, y1 = box
        y, x = thickest_pixel(tile.objects[y0:y1, x0:x1] == number)
        points[row, 0] = x0 + x, y0 + y
    scores = []
    for some in np.array_split(np.arange(len(points)), math.ceil(len(points) / BOXES_AT_ONCE)):
        labels = torch.ones(len(some), 1, dtype=torch.int64, device=device)
        prompts = PromptSet(torch.from_numpy(points[some]).to(device), labels)
        index = torch.zeros(len(some), dtype=torch.int64, device=device)
        answer = PromptedDecoder(decoder)(embeddings, index, prompts, multimask=True)
        logits = answer.likeliest(answer.logits)
        masks = functional.interpolate(logits[None], scale_factor=LOGIT_STRIDE_PX, mode="bilinear")[0] > 0
        for mask, number in zip(masks.cpu().numpy(), objects.numbers[some], strict=True):
            found, true = mask[:height, :width], tile.objects[:height, :width] == number
            scores.append((found & true).sum() / (found | true).sum())
    return np.array(scores, np.float64)
