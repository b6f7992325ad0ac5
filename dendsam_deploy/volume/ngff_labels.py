"""Label volumes as OME-Zarr 0.5 with a pyramid. The home of zarr, together with `ngff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import zarr

from dendsam_deploy.volume.ngff import COMPLETE_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.volume.volume import LabelVolumeSpec

_CHUNK_SIDE = 1024
"""Side of a chunk. A larger slice becomes one shard of such chunks, so that there is one file per slice and level."""

_COARSEST_SIDE = 256
"""The pyramid ends where a slice is no larger than this."""


class NgffLabelSink:
    """Appends label slices to all levels of an OME-Zarr image.

    Levels are halved along y and x only: sections are thick, and so each slice can be written alone. Empty chunks are
    written too: an absent chunk would read as a slice without objects.

    References
    ----------
    https://ngff.openmicroscopy.org/0.5
    """

    def __init__(self, path: Path, spec: LabelVolumeSpec) -> None:
        depth, height, width = spec.shape_zyx
        shapes = [(height, width)]
        while max(shapes[-1]) > _COARSEST_SIDE:
            shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
        group = zarr.create_group(
            store=zarr.storage.LocalStore(path), zarr_format=3, attributes=_attributes(spec, len(shapes))
        )
        self._levels = [
            group.create_array(
                str(level),
                shape=(depth, *shape_hw),
                dtype=spec.dtype,
                chunks=(1, *(min(_CHUNK_SIDE, length) for length in shape_hw)),
                shards=_shard(shape_hw),
                dimension_names=("z", "y", "x"),
                config={"write_empty_chunks": True},
            )
            for level, shape_hw in enumerate(shapes)
        ]
        self._next_z = 0

    def append(self, labels: NDArray[np.generic]) -> None:
        """Write the next slice, ``(Y, X)`` in the dtype of the file, to every level."""
        for level in self._levels:
            level[self._next_z] = labels
            labels = halve_labels(labels)
        self._next_z += 1

    def close(self) -> None:
        """Nothing is outstanding: every chunk is written when its slice is."""


def halve_labels(labels: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return labels at half the resolution: the most frequent of each 2 x 2 pixels, of equals the first.

    Parameters
    ----------
    labels : ndarray, shape (H, W)
        Integer labels. An odd row or column is repeated.

    Returns
    -------
    ndarray, shape (ceil(H / 2), ceil(W / 2)), dtype of `labels`
        No value that was not there before.
    """
    even = np.pad(labels, [(0, length % 2) for length in labels.shape], mode="edge")
    a, b, c, d = even[::2, ::2], even[::2, 1::2], even[1::2, ::2], even[1::2, 1::2]
    # The first pixel wins unless it stands alone against a pair. A pair without it contains b or is (c, d).
    a_is_alone = (a != b) & (a != c) & (a != d)
    return np.where(a_is_alone & ((b == c) | (b == d)), b, np.where(a_is_alone & (c == d), c, a))


def _shard(shape_hw: tuple[int, int]) -> tuple[int, int, int] | None:
    """Return the shape of a shard that holds a whole slice, None where one chunk does."""
    if max(shape_hw) <= _CHUNK_SIDE:
        return None
    height, width = (-(-length // chunk) * chunk for length in shape_hw if (chunk := min(_CHUNK_SIDE, length)))
    return 1, height, width


def _attributes(spec: LabelVolumeSpec, level_count: int) -> dict[str, object]:
    """Return the OME metadata of a label image; level k has voxels of 2^k rows and columns of level 0."""
    unit = {} if spec.voxel_size_nm is None else {"unit": "nanometer"}
    z, y, x = spec.voxel_size_nm or (1.0, 1.0, 1.0)
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [z, y * 2**level, x * 2**level]},
                # Coordinates refer to centres of voxels; that of a larger voxel lies further from the corner.
                {"type": "translation", "translation": [0.0, y * (2**level - 1) / 2, x * (2**level - 1) / 2]},
            ],
        }
        for level in range(level_count)
    ]
    multiscale = {
        "name": "labels",
        "type": "mode",
        "axes": [{"name": name, "type": "space", **unit} for name in "zyx"],
        "datasets": datasets,
    }
    return {COMPLETE_KEY: True, "ome": {"version": "0.5", "multiscales": [multiscale], "image-label": {}}}
