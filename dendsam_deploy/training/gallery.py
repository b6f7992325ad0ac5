"""Pictures of what a model makes of held-out tiles, for the report of its training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dendsam_deploy.training.judge import box_masks, encode_tile
from dendsam_deploy.training.story import SamplePrediction

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dendsam_deploy.models.box_decoder import BoxDecoderGraph
    from dendsam_deploy.models.image_encoder import ImageEncoderGraph
    from dendsam_deploy.training.judge import JudgedTile

MOST_PICTURES = 6


@torch.no_grad()
def sample_predictions(
    encoder: ImageEncoderGraph, decoder: BoxDecoderGraph, judged: Iterable[tuple[str, JudgedTile]]
) -> tuple[SamplePrediction, ...]:
    """Segment tiles by the exact boxes of their objects.

    Parameters
    ----------
    encoder, decoder : graphs
        The model.
    judged : iterable of (str, JudgedTile)
        Name of a volume and a tile of it; the first `MOST_PICTURES` are shown.

    Returns
    -------
    tuple of SamplePrediction
        Where masks overlap, the smaller one is on top.
    """
    encoder.eval()
    decoder.eval()
    pictures = []
    for (name, entry), _ in zip(judged, range(MOST_PICTURES), strict=False):
        embeddings = encode_tile(encoder, decoder, entry.tile)
        found = box_masks(decoder, embeddings, entry, entry.objects.boxes_xyxy)
        predicted = np.zeros_like(entry.tile.objects)
        for row in np.argsort([-window.sum() for window in found.windows], kind="stable"):
            window, (y, x) = found.windows[row], found.corners_yx[row]
            part = predicted[y : y + window.shape[0], x : x + window.shape[1]]
            part[window] = entry.objects.numbers[row]
        height, width = entry.tile.size_hw
        truth = np.where(np.isin(entry.tile.objects, entry.objects.numbers), entry.tile.objects, 0)
        pictures.append(
            SamplePrediction(
                caption=f"{name}, slice {entry.z}" if name else f"slice {entry.z}",
                image=entry.tile.image[:height, :width],
                score=float(found.scores.mean()),
                score_name="mean IoU with exact boxes",
                truth_labels=truth[:height, :width],
                predicted_labels=predicted[:height, :width],
            )
        )
    return tuple(pictures)
