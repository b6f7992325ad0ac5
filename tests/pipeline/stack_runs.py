"""A small stack for runs over a whole volume, and what such runs leave behind."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import numpy as np
from synthetic_session import draw_discs

from dendsam_deploy.instances import Detections

if TYPE_CHECKING:
    from pathlib import Path


DEPTH = 6


RESULT_FILES = ("labels.tif", "instances.csv", "detections.csv")


def draw_stack(depth: int = DEPTH) -> np.ndarray:
    """Two dendrites along z, one of which ends early, and an empty slice at the end."""
    slices = [draw_discs((96, 110), [(24, 20 + z, 9), (70, 80 - z, 11)][: 2 if z < 4 else 1]) for z in range(depth - 1)]
    return np.stack([*slices, np.zeros_like(slices[0])])


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def content_of(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on how a run came about."""
    pieces = sorted((out / "slices").iterdir())
    return {path.name: path.read_bytes() for path in [*(out / name for name in RESULT_FILES), *pieces]}


class FixedBoxes:
    """The same two boxes in every slice."""

    def __init__(self, score: float = 0.1) -> None:
        self.score = score

    def for_slice(self, z: int) -> Detections:
        boxes = np.array([[10, 10, 30, 30], [60, 60, 90, 85]], np.float32)
        return Detections(boxes, np.full(2, self.score, np.float32))
