"""A labelled volume that is written in a moment, bright discs on dark ground; work for other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tifffile

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path


def write_discs(folder: Path) -> None:
    """Write ``raw.tif`` and ``labels.tif``: eight slices of 72 x 80 px with four discs each."""
    y, x = np.mgrid[0:72, 0:80]
    labels = np.zeros((8, 72, 80), np.uint16)
    for number, (row, column) in enumerate(((18, 20), (18, 58), (50, 20), (50, 58)), start=1):
        labels[:, (y - row) ** 2 + (x - column) ** 2 < 13**2] = number
    raw = np.where(labels > 0, 200, 60) + np.random.default_rng(0).normal(0, 8, labels.shape)
    tifffile.imwrite(folder / "raw.tif", raw.astype(np.uint8))
    tifffile.imwrite(folder / "labels.tif", labels)


def failing_work(team, progress, place):
    """Fail as a training fails whose volume cannot be used."""
    raise VolumeError(f"{place}: found by process {team.rank} of {team.size}")


def large_work(team, progress, megabytes):
    """Return more than fits into a pipe."""
    progress(Progress("train", 1, 1))
    return np.full((megabytes, 1 << 20), team.size, np.uint8)
