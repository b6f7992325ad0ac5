"""Judges a detector on held-out tiles by the graph that is deployed, and picks tiles that show what it gets wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dendsam_deploy.instances import Detections, suppress_duplicates
from dendsam_deploy.models.detector_graph import DetectorGraph
from dendsam_deploy.training.detector_limits import NMS_IOU
from dendsam_deploy.training.detector_scores import JudgedBoxes, tile_f1
from dendsam_deploy.training.story import SamplePrediction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dendsam_deploy.models.detector import YoloDetector
    from dendsam_deploy.training.detector_tiles import TileAt

_LEAST_SCORE = 0.001
"""Average precision looks at all detections that are more than noise."""

_SHOWN_WORST, _SHOWN_OTHERS = 4, 2


def judge_tiles(
    detector: YoloDetector, tiles: Sequence[TileAt], tile_size_px: int, device: str
) -> tuple[JudgedBoxes, ...]:
    """Detect on tiles as deployment does: the exported graph at the size of the tiles, then suppression of duplicates.

    Parameters
    ----------
    detector : YoloDetector
        What to judge.
    tiles : sequence of TileAt
        Held-out tiles.
    tile_size_px : int
        Their side.
    device : str
        ``cpu`` or ``cuda[:N]``.
    """
    graph = DetectorGraph(detector, tile_size_px, tile_size_px).to(device).eval()
    judged = []
    with torch.inference_mode():
        for entry in tiles:
            boxes, scores = graph(torch.from_numpy(entry.tile.image)[None].to(device))
            height, width = entry.tile.size_hw
            corners = boxes[0].cpu().numpy().clip(0, np.array([width, height, width, height], np.float32))
            sides = corners[:, 2:] - corners[:, :2]
            sure = (scores[0].cpu().numpy() >= _LEAST_SCORE) & (sides >= 1).all(axis=1)
            found = Detections(corners[sure], scores[0].cpu().numpy()[sure])
            judged.append(JudgedBoxes(entry.boxes_xyxy, found.take(suppress_duplicates(found, NMS_IOU))))
    return tuple(judged)


def sample_predictions(
    tiles: Sequence[TileAt], judged: Sequence[JudgedBoxes], threshold: float
) -> tuple[SamplePrediction, ...]:
    """Pick the tiles with the worst boxes and, to compare, a middling one and the best.

    Parameters
    ----------
    tiles : sequence of TileAt
        Held-out tiles.
    judged : sequence of JudgedBoxes
        What was found on each.
    threshold : float
        Detections of lower scores are not shown.
    """
    scores = [tile_f1(entry, threshold) for entry in judged]
    order = sorted(range(len(scores)), key=lambda row: (scores[row], row))
    order = [row for row in order if len(judged[row].truth_xyxy) or len(judged[row].found)]
    rest = order[_SHOWN_WORST:]
    shown = order[:_SHOWN_WORST] + [rest[len(rest) // 2], rest[-1]][: min(_SHOWN_OTHERS, len(rest))] if rest else order
    samples = []
    for row in dict.fromkeys(shown):
        height, width = tiles[row].tile.size_hw
        found = judged[row].found
        samples.append(
            SamplePrediction(
                caption=tiles[row].place,
                image=tiles[row].tile.image[:height, :width],
                score=scores[row],
                score_name="F1 at IoU .5",
                truth_boxes_xyxy=judged[row].truth_xyxy,
                predicted_boxes_xyxy=found.boxes_xyxy[found.scores >= threshold],
            )
        )
    return tuple(samples)
