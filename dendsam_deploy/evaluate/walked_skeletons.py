"""Skeletons laid into the slices of a segmentation, for the expected run length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from dendsam_deploy.errors import InputFileError, InvalidArgumentError
from dendsam_deploy.evaluate.score_report import SkeletonScores
from dendsam_deploy.metrics.run_length import expected_run_length
from dendsam_deploy.volume.skeletons import Skeletons, read_skeletons

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_ROUNDING = 1e-6
"""Positions that are whole multiples of the voxel size must not fall into the voxel before by rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class SkeletonWalk:
    """The nodes of skeletons, and the segments that they were found in so far.

    Parameters
    ----------
    skeletons : Skeletons
        The trees.
    voxels_zyx : ndarray, shape (N, 3), int64
        The voxel of each node.
    segments : ndarray, shape (N,), int64
        The segment at each node, 0 for background; -1 where its slice was not visited.
    """

    skeletons: Skeletons
    voxels_zyx: NDArray[np.int64]
    segments: NDArray[np.int64]

    @classmethod
    def begin(
        cls, path: Path, voxel_size_nm: tuple[float, float, float] | None, shape_zyx: tuple[int, int, int]
    ) -> Self:
        """Read skeletons and find the voxels of their nodes.

        Parameters
        ----------
        path : Path
            SWC file or folder.
        voxel_size_nm : (float, float, float) or None
            Voxel size ``(z, y, x)``.
        shape_zyx : (int, int, int)
            Shape of the truth.

        Raises
        ------
        InputFileError
            The skeletons cannot be read, or no node of theirs lies in the volume.
        InvalidArgumentError
            The voxel size is not known.
        """
        if voxel_size_nm is None:
            raise InvalidArgumentError(
                f"{path}: skeletons are in micrometres, but the volumes record no voxel size; give --voxel-size Z,Y,X"
            )
        skeletons = read_skeletons(path)
        voxels = np.floor(skeletons.nodes_um_zyx * 1000 / np.array(voxel_size_nm) + _ROUNDING).astype(np.int64)
        if not ((voxels >= 0) & (voxels < shape_zyx)).all(axis=1).any():
            least, most = skeletons.nodes_um_zyx.min(axis=0), skeletons.nodes_um_zyx.max(axis=0)
            raise InputFileError(
                f"{path}: no node lies in the volume of {' x '.join(map(str, shape_zyx))} voxels (z, y, x) of "
                f"{voxel_size_nm} nm; they reach from {least.round(2).tolist()} to {most.round(2).tolist()} um (z, y, "
                "x); are they in another unit, or from another corner?"
            )
        return cls(skeletons, voxels, np.full(len(voxels), -1, np.int64))

    def visit(self, z: int, labels: NDArray[np.uint32]) -> None:
        """Note the segments of the nodes in one slice ``(Y, X)``."""
        inside = (self.voxels_zyx[:, 1:] >= 0).all(axis=1) & (self.voxels_zyx[:, 1:] < labels.shape).all(axis=1)
        here = np.flatnonzero(inside & (self.voxels_zyx[:, 0] == z))
        self.segments[here] = labels[self.voxels_zyx[here, 1], self.voxels_zyx[here, 2]]

    def scores(self) -> SkeletonScores:
        """Score what was visited; edges that leave it are left out."""
        seen = self.segments >= 0
        edges = self.skeletons.edges
        inside = seen[edges].all(axis=1)
        # Nodes that were not visited lie in no segment, and no edge asks for them.
        segments = np.maximum(self.segments, 0)
        length = expected_run_length(
            self.skeletons.skeleton, segments, edges[inside], self.skeletons.lengths_um[inside]
        )
        visited = np.unique(self.skeletons.skeleton[seen])
        return SkeletonScores(length, len(visited), int(np.count_nonzero(seen)), int(np.count_nonzero(~seen)))
