"""Label volumes in memory, and their scores."""

from __future__ import annotations

import numpy as np

from dendsam_deploy.evaluate.score_report import EvaluateOptions, ScoreReport
from dendsam_deploy.evaluate.scores import score_volumes
from dendsam_deploy.volume.volume import VolumeInfo


class ArrayReader:
    """A volume in memory that is read like one on disk."""

    def __init__(self, name: str, labels: np.ndarray, voxel_size_nm=None) -> None:
        self._labels = labels.astype(np.uint32)
        self.info = VolumeInfo(labels.shape, np.dtype(np.uint32), voxel_size_nm, name, "array")

    def read(self, z, window=None):
        return self._labels[z] if window is None else self._labels[z][window.slices]

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        return None


def score(labels: np.ndarray, truth: np.ndarray, **options) -> ScoreReport:
    return score_volumes(ArrayReader("labels", labels), ArrayReader("truth", truth), EvaluateOptions(**options))


def blocks(seed: int, shape: tuple[int, int, int] = (4, 6, 5)) -> np.ndarray:
    """A volume of random labels, constant in blocks of 2 x 4 x 4 voxels."""
    labels = np.random.default_rng(seed).integers(0, 9, shape)
    return np.kron(labels, np.ones((2, 4, 4), int))
