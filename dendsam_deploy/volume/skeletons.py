"""Skeletons from SWC files, the format in which tracing programs keep the centre lines of neurites."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InputFileError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_COLUMNS = 7
_LARGEST_BYTES = 2**30
_ROOT = -1


@dataclass(frozen=True, slots=True, eq=False)
class Skeletons:
    """Trees of nodes.

    Parameters
    ----------
    nodes_um_zyx : ndarray, shape (N, 3), float64
        Positions in micrometres from the volume's corner.
    skeleton : ndarray, shape (N,), int64
        The skeleton of each node.
    edges : ndarray, shape (E, 2), int64
        Child and parent.
    names : tuple of str
        Where each skeleton comes from.
    """

    nodes_um_zyx: NDArray[np.float64]
    skeleton: NDArray[np.int64]
    edges: NDArray[np.int64]
    names: tuple[str, ...]

    @property
    def lengths_um(self) -> NDArray[np.float64]:
        """Length of each edge, shape (E,)."""
        steps = self.nodes_um_zyx[self.edges[:, 0]] - self.nodes_um_zyx[self.edges[:, 1]]
        lengths: NDArray[np.float64] = np.linalg.norm(steps, axis=1)
        return lengths


def read_skeletons(path: Path) -> Skeletons:
    """Read one SWC file, or all of a folder.

    In a folder each file is one skeleton, in however many pieces it was traced. A single file holds one skeleton for
    each root.

    Parameters
    ----------
    path : Path
        ``FILE.swc`` with lines ``id type x y z radius parent``, in micrometres, or a folder of such files.

    Raises
    ------
    InputFileError
        The file is missing, damaged, or no SWC.
    """
    if path.is_dir():
        files = sorted(file for file in path.glob("*.swc") if not file.name.startswith("."))
        if not files:
            raise InputFileError(f"{path}: no .swc files in this folder; name a file or a folder of SWC files")
        trees = [_read_file(file) for file in files]
        pieces = [0 * _trees(parents, file) for (_, parents), file in zip(trees, files, strict=True)]
        names: list[str] = [file.name for file in files]
    else:
        nodes, parents = _read_file(path)
        trees, pieces = [(nodes, parents)], [_trees(parents, path)]
        names = [f"{path.name}, tree {number + 1}" for number in range(int(pieces[0].max()) + 1)]
    return _joined(trees, pieces, tuple(names))


def _joined(
    trees: list[tuple[NDArray[np.float64], NDArray[np.int64]]],
    pieces: list[NDArray[np.int64]],
    names: tuple[str, ...],
) -> Skeletons:
    """Put the nodes of several files one after the other."""
    skeleton, edges, first_node, first_skeleton = [], [], 0, 0
    for (nodes, parents), piece in zip(trees, pieces, strict=True):
        child = np.flatnonzero(parents >= 0)
        edges.append(np.stack([child, parents[child]], axis=1) + first_node)
        skeleton.append(piece + first_skeleton)
        first_node += len(nodes)
        first_skeleton += int(piece.max()) + 1
    return Skeletons(
        np.concatenate([nodes for nodes, _ in trees]), np.concatenate(skeleton), np.concatenate(edges), names
    )


def _read_file(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return positions ``(N, 3)`` along z, y, x and the row of each node's parent, -1 for roots."""
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise InputFileError(f"{path}: larger than 1 GiB, which no skeleton is; give the SWC file")
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error}); give an SWC file") from error
    rows: dict[int, int] = {}
    positions: list[tuple[float, float, float]] = []
    parents: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        identity, x, y, z, parent = _read_line(path, number, words)
        if identity in rows:
            raise InputFileError(f"{path}: line {number} repeats the node {identity}; number the nodes anew")
        rows[identity] = len(positions)
        positions.append((z, y, x))
        parents.append(parent)
    if not positions:
        raise InputFileError(f"{path}: holds no nodes, expected lines of id, type, x, y, z, radius, parent")
    if unknown := sorted({parent for parent in parents if parent != _ROOT} - rows.keys()):
        raise InputFileError(f"{path}: names the parent {unknown[0]}, which it does not hold; export the tracing again")
    return np.array(positions), np.array([rows.get(parent, -1) for parent in parents], np.int64)


def _read_line(path: Path, number: int, words: list[str]) -> tuple[int, float, float, float, int]:
    """Return id, x, y, z and parent of one node."""
    try:
        identity, parent = int(words[0]), int(words[6])
        x, y, z = (float(word) for word in words[2:5])
    except (ValueError, IndexError) as error:
        raise InputFileError(
            f"{path}: line {number} is {' '.join(words)[:60]!r}, expected {_COLUMNS} numbers: id, type, x, y, z, "
            "radius, parent; give an SWC file"
        ) from error
    if not all(map(math.isfinite, (x, y, z))):
        raise InputFileError(f"{path}: line {number} has a position that is not finite; repair it")
    return identity, x, y, z, parent


def _trees(parents: NDArray[np.int64], path: Path) -> NDArray[np.int64]:
    """Return the tree of each node; the trees of a file are numbered in the order of their roots."""
    root = np.where(parents < 0, np.arange(len(parents)), parents)
    # Every round doubles the distance that is looked ahead.
    for _ in range(len(parents).bit_length() + 1):
        root = root[root]
    if (parents[root] >= 0).any():
        raise InputFileError(f"{path}: the parents of some nodes form a ring, expected trees; export the tracing again")
    tree: NDArray[np.int64] = np.unique(root, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return tree
