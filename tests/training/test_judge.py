"""The judge of a training, fed by decoders whose score is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dendsam_deploy.training.judge import box_prompt_iou, judged_tiles
from dendsam_deploy.training.samples import LabelledVolume, TileRecipe
from dendsam_deploy.volume.array import ArrayVolume

SIDE = 192

CORNERS = 0.01
"""Upsampling the logits takes one pixel from each corner of a mask."""


class Encoder(torch.nn.Module):
    """Hands the image on as its own embedding."""

    def forward(self, tiles: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(tiles[:, None].float(), 4)


class FillingDecoder(torch.nn.Module):
    """Answers a box with the box, or with what is bright in it, enlarged by a few mask cells on every side."""

    image_position = torch.zeros(1)
    grid = SIDE // 16

    def __init__(self, *, bright_only: bool = False, margin_cells: int = 0) -> None:
        super().__init__()
        self.bright_only, self.margin_cells = bright_only, margin_cells

    def forward(self, embeddings, boxes, tile_index, region):
        side = int(region) * 4
        centre = (boxes[:, :2] + boxes[:, 2:]).flip(1) / 8 - side / 2
        origin = centre.round().long().clamp(0, SIDE // 4 - side)
        logits = torch.full((len(boxes), side, side), -1.0)
        for mask, (y, x), (x0, y0, x1, y1) in zip(logits, origin, boxes / 4, strict=True):
            cells = torch.arange(side)
            rows = ((cells + y + self.margin_cells >= y0) & (cells + y < y1 + self.margin_cells))[:, None]
            columns = (cells + x + self.margin_cells >= x0) & (cells + x < x1 + self.margin_cells)
            bright = embeddings[0, 0, y : y + side, x : x + side] > 100
            mask[rows & columns & (bright | (not self.bright_only))] = 1
        return logits, origin, torch.ones(len(boxes))


def volume_of(labels: np.ndarray, slices: range | None = None) -> LabelledVolume:
    image = np.where(labels > 0, 200, 0).astype(np.uint8)
    return LabelledVolume(ArrayVolume(image), ArrayVolume(labels.astype(np.uint32)), slices or range(len(labels)))


def judged(decoder: FillingDecoder, volume: LabelledVolume, recipe: TileRecipe, slices: int) -> np.ndarray:
    return box_prompt_iou(Encoder(), decoder, judged_tiles(volume, recipe, slices))


@pytest.fixture
def labels() -> np.ndarray:
    """One slice with a square, an L, an object at the border and a speck; all edges lie on mask cells."""
    labels = np.zeros((1, SIDE, SIDE), int)
    labels[0, 16:48, 16:48] = 1
    labels[0, 64:128, 100:116] = labels[0, 112:128, 100:164] = 2
    labels[0, 180:192, 160:192] = 3
    labels[0, 150:154, 20:24] = 4
    return labels


def test_filled_boxes_score_the_part_that_the_object_fills(labels):
    scores = judged(FillingDecoder(), volume_of(labels), TileRecipe(SIDE, 1.0), 1)
    fill_of_the_l = (64 * 16 + 48 * 16) / 64**2
    assert sorted(scores) == pytest.approx([fill_of_the_l, 1, 1], abs=CORNERS)  # the speck is too small to count


def test_right_masks_score_one(labels):
    decoder = FillingDecoder(bright_only=True)
    scores = judged(decoder, volume_of(labels), TileRecipe(SIDE, 1.0), 1)
    assert scores == pytest.approx([1, 1, 1], abs=CORNERS)


def test_too_large_masks_score_less(labels):
    decoder = FillingDecoder(margin_cells=1)
    scores = judged(decoder, volume_of(labels[:, :60]), TileRecipe(SIDE, 1.0), 1)
    assert scores == pytest.approx([32**2 / 40**2], abs=CORNERS)


def test_what_is_painted_beyond_the_slice_does_not_count(labels):
    """The slice ends at row 40, inside the object, so its mask is cut off below."""
    decoder = FillingDecoder(margin_cells=1)
    scores = judged(decoder, volume_of(labels[:, :40]), TileRecipe(SIDE, 1.0), 1)
    assert scores == pytest.approx([32 * 24 / (40 * 28)], abs=CORNERS)


def test_objects_are_judged_at_the_zoom_of_deployment(labels):
    half = labels[:, ::2, ::2]
    scores = judged(FillingDecoder(bright_only=True), volume_of(half), TileRecipe(SIDE, 2.0), 1)
    assert (scores > 0.9).all()
    assert len(scores) == 3


@pytest.mark.parametrize(("most", "expected"), [(1, [4]), (2, [4, 12]), (3, [4, 8, 12]), (50, list(range(4, 13)))])
def test_slices_are_spread_over_the_held_out_block(most, expected):
    """Each slice shows as many objects as its number says, so the count of scores tells which were judged."""
    labels = np.zeros((15, SIDE, SIDE), int)
    for z in range(15):
        for number in range(z):
            labels[z, 8 * number + 8 : 8 * number + 14, 8:24] = number + 1
    scores = judged(FillingDecoder(), volume_of(labels, range(4, 13)), TileRecipe(SIDE, 1.0), most)
    assert len(scores) == sum(expected)


FAR = 2 * SIDE - 48


def test_one_tile_of_each_slice_is_judged_and_all_places_have_their_turn():
    labels = np.zeros((4, 2 * SIDE, 2 * SIDE), int)
    for number, (y, x) in enumerate([(16, 16), (16, FAR), (FAR, 16), (FAR, FAR)], start=1):
        labels[:, y : y + 8 * number, x : x + 32] = number
    entries = judged_tiles(volume_of(labels), TileRecipe(SIDE, 1.0), 4)
    assert [entry.objects.areas_px.tolist() for entry in entries] == [[256], [512], [768], [1024]]


@pytest.mark.parametrize("corner", [(0, 16, 16), (9, FAR, FAR)])
def test_a_lonely_object_is_found_wherever_it_lies(corner):
    z, y, x = corner
    labels = np.zeros((10, 2 * SIDE, 2 * SIDE), int)
    labels[z, y : y + 20, x : x + 20] = 1
    (entry,) = judged_tiles(volume_of(labels), TileRecipe(SIDE, 1.0), 3)
    assert entry.objects.areas_px.tolist() == [400]


def test_slices_without_objects_give_no_score():
    empty = volume_of(np.zeros((2, SIDE, SIDE), int))
    assert len(judged(FillingDecoder(), empty, TileRecipe(SIDE, 1.0), 2)) == 0
