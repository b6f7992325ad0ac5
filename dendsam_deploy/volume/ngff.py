"""OME-Zarr images and plain Zarr arrays. The home of zarr, together with `ngff_labels`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from dendsam_deploy.errors import UnsafeFileError, VolumeError
from dendsam_deploy.volume.checks import (
    MAX_EXPANSION,
    check_expansion,
    check_read,
    check_shape,
    decoded_size,
    translated,
)
from dendsam_deploy.volume.volume import VolumeInfo
from dendsam_deploy.volume.voxel_size import RecordedSize, size_from_scales

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window

_SLAB_BYTES = 2**28
"""Decoded slices that are kept where a chunk spans several of them, so that it is not decoded anew for each."""

_SUSPICIOUS_BYTES = 2**30
"""Size of a slice or chunk from which on stored bytes must make it plausible; absent chunks cost nothing to claim."""

_REMEDY = "write it again, or convert it to a TIFF stack"

COMPLETE_KEY = "dendsam_deploy_complete"
"""Attribute of label volumes of this program: every chunk exists, empty ones too, so that an absent one is an error."""


class ZarrReader:
    """Level 0 of an OME-Zarr image, or a plain Zarr array; see `VolumeReader`.

    Parameters
    ----------
    path : Path
        The group or array.
    voxel_size_nm : (float, float, float) or None
        Replaces the recorded voxel size.
    prefer_labels : bool
        Of an image with a labels group, read the labels.

    Raises
    ------
    VolumeError
        Names the file, what was found and what was expected.
    UnsafeFileError
        The metadata lead out of the folder.
    """

    def __init__(
        self, path: Path, voxel_size_nm: tuple[float, float, float] | None = None, prefer_labels: bool = False
    ) -> None:
        source = str(path)
        with translated(source, "reading its metadata", _REMEDY):
            node = zarr.open(LocalStore(path, read_only=True), mode="r")
            group = _choose_group(node, source, prefer_labels) if isinstance(node, zarr.Group) else None
            array, axes, size = (
                _choose_array(group, source) if group is not None else (_as_array(node, source), None, None)
            )
            self._array = array
            self._prefix = _leading_index(array.shape, axes, source)
            self._is_stack = len(array.shape) - len(self._prefix) == 3
            self.info = VolumeInfo(
                shape_zyx=(array.shape[-3] if self._is_stack else 1, array.shape[-2], array.shape[-1]),
                dtype=np.dtype(array.dtype).newbyteorder("="),
                voxel_size_nm=voxel_size_nm,
                source=source,
                format="zarr" if axes is None else "ome-zarr",
                detail=f"Zarr {array.metadata.zarr_format}, chunks {' x '.join(map(str, array.chunks))}",
            )
            if voxel_size_nm is None and size is not None:
                self.info = replace(self.info, voxel_size_nm=size.as_zyx(self.info.shape_zyx[0]))
            check_shape(source, self.info.shape_zyx, self.info.dtype)
            self._folder = path / array.path
            self._check_plausible()
            self._is_complete = group is not None and group.attrs.get(COMPLETE_KEY) is True
        self._slab: NDArray[np.generic] = np.empty((0, *self.info.shape_zyx[1:]), self.info.dtype)
        self._slab_z0 = 0

    def read(self, z: int, window: Window | None = None) -> NDArray[np.generic]:
        """Return slice `z` or a part of it; see `VolumeReader`."""
        window = check_read(self.info, z, window)
        if self._is_complete:
            self._check_chunks(z)
        with translated(self.info.source, f"decoding slice {z}", _REMEDY):
            is_whole = (window.height, window.width) == self.info.shape_zyx[1:]
            if self._is_stack and self._array.chunks[-3] > 1 and is_whole:
                return self._read_through_slab(z)
            return self._fetch((z,) if self._is_stack else (), window.slices)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._slab = self._slab[:0]

    def _read_through_slab(self, z: int) -> NDArray[np.generic]:
        """Return a slice of an array whose chunks span several; those after it are decoded along with it and kept."""
        if not self._slab_z0 <= z < self._slab_z0 + len(self._slab):
            depth, height, width = self.info.shape_zyx
            affordable = max(1, _SLAB_BYTES // decoded_size((height, width), self.info.dtype))
            chunk_end = (z // self._array.chunks[-3] + 1) * self._array.chunks[-3]
            self._slab = self._fetch((slice(z, min(z + affordable, chunk_end, depth)),), (slice(height), slice(width)))
            self._slab_z0 = z
        image: NDArray[np.generic] = self._slab[z - self._slab_z0].copy()
        return image

    def _fetch(self, z_index: tuple[int | slice, ...], slices: tuple[slice, slice]) -> NDArray[np.generic]:
        """Read a part of the array in native byte order."""
        samples: NDArray[np.generic] = np.asarray(self._array[(*self._prefix, *z_index, *slices)])
        return samples.astype(self.info.dtype, copy=False)

    def _check_plausible(self) -> None:
        """Refuse slices and chunks of a size that what is stored cannot account for."""
        slice_bytes = decoded_size(self.info.shape_zyx[1:], self.info.dtype)
        largest = max(slice_bytes, decoded_size(self._array.chunks, self.info.dtype))
        if largest > _SUSPICIOUS_BYTES:
            check_expansion(self.info.source, largest, _stored_bytes(self._folder, largest // MAX_EXPANSION + 1))

    def _check_chunks(self, z: int) -> None:
        """Raise if a chunk of slice `z` is absent: Zarr would read it as zeros, that is as a slice without objects."""
        stored = self._array.shards or self._array.chunks
        rows, columns = (-(-length // side) for length, side in zip(self._array.shape[-2:], stored[-2:], strict=True))
        for row in range(rows):
            for column in range(columns):
                chunk = self._folder / f"c/{z}/{row}/{column}"
                if not chunk.is_file():
                    raise VolumeError(f"{chunk}: slice {z} is incomplete, this part is absent; write the labels again")


def _choose_group(root: zarr.Group, source: str, prefer_labels: bool) -> zarr.Group:
    """Return the group of the image (or of its labels) in what may be a collection of images."""
    metadata = _ome(root)
    if prefer_labels and "labels" in root:
        names = _ome(_group(root, "labels", source)).get("labels", [])
        if len(names) != 1:
            raise VolumeError(
                f"{source}: has {len(names)} label images {names}, expected one; name one, as in {source}/labels/NAME"
            )
        return _group(root, f"labels/{names[0]}", source)
    if "plate" in metadata or "well" in metadata:
        raise VolumeError(f"{source}: is a multi-well plate, expected one image; give the path of one field in it")
    if "bioformats2raw.layout" in metadata:
        series = sorted(name for name, _ in root.groups() if name.isdigit())
        if len(series) != 1:
            raise VolumeError(
                f"{source}: holds {len(series)} images, expected one; give the path of one, as in {source}/0"
            )
        return _group(root, series[0], source)
    return root


def _choose_array(
    group: zarr.Group, source: str
) -> tuple[zarr.Array[Any], tuple[str, ...] | None, RecordedSize | None]:
    """Return level 0 of an image with the names of its axes and its voxel size, or the only array of a plain group."""
    multiscales = _ome(group).get("multiscales")
    if not multiscales:
        arrays = sorted(name for name, _ in group.arrays())
        if len(arrays) != 1:
            raise VolumeError(
                f"{source}: is a Zarr group of {len(arrays)} arrays {arrays}; give the path of one of them"
            )
        return _as_array(_child(group, arrays[0], source), source), None, None
    image = multiscales[0]
    level = image["datasets"][0]
    # Version 0.3 names axes by plain strings; 0.1 and 0.2 have none, they are always these five.
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in image.get("axes", "tczyx")]
    names = tuple(str(axis["name"]) for axis in axes)
    array = _as_array(_child(group, level["path"], source), source)
    if len(names) != array.ndim:
        raise VolumeError(f"{source}: names {len(names)} axes {names} of an array of shape {array.shape}; {_REMEDY}")
    scales = np.ones(len(axes))
    has_scale = False
    for step in (*level.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])):
        if step["type"] == "scale":
            scales = scales * np.asarray(step["scale"], float)
            has_scale = True
    units = [axis.get("unit") if has_scale else None for axis in axes]
    return array, names, size_from_scales(names, units, scales.tolist())


def _leading_index(shape: tuple[int, ...], axes: tuple[str, ...] | None, source: str) -> tuple[int, ...]:
    """Return the index that drops the leading axes of length one (time, channel), so that (z,) y, x remain.

    Raises
    ------
    VolumeError
        An axis other than z, y, x that is longer than one, or another order of axes.
    """
    names = axes if axes is not None else (*"?" * (len(shape) - 3), *"zyx"[-len(shape) :])
    spatial = next((names[-n:] for n in (3, 2) if names[-n:] == tuple("zyx"[-n:])), None)
    if spatial is None or "z" in names[: -len(spatial)]:
        raise VolumeError(f"{source}: has the axes {', '.join(names)}, expected them to end with z, y, x; {_REMEDY}")
    leading = len(shape) - len(spatial)
    for name, length in zip(names[:leading], shape, strict=False):
        if length != 1:
            raise VolumeError(
                f"{source}: axis {name} of shape {shape} has length {length}, expected 1; save one of them alone"
            )
    return (0,) * leading


def _ome(group: zarr.Group) -> dict[str, Any]:
    """Return the OME metadata of a group: under ``ome`` since version 0.5, at the top before."""
    attributes = dict(group.attrs)
    nested = attributes.get("ome", attributes)
    return nested if isinstance(nested, dict) else {}


def _child(group: zarr.Group, path: object, source: str) -> zarr.Group | zarr.Array[Any]:
    """Return what metadata point to, provided that it lies inside the group."""
    if not isinstance(path, str) or path.startswith("/") or ".." in path.split("/"):
        raise UnsafeFileError(
            f"{source}: its metadata point to {path!r}, expected a path inside it; do not use this file"
        )
    if path not in group:
        raise VolumeError(f"{source}: lacks the array {path!r} that its metadata name; copy it again from its source")
    return group[path]


def _group(parent: zarr.Group, path: object, source: str) -> zarr.Group:
    """Return a child that must be a group."""
    child = _child(parent, path, source)
    if not isinstance(child, zarr.Group):
        raise VolumeError(f"{source}: {path} is an array, expected a group; {_REMEDY}")
    return child


def _as_array(node: zarr.Group | zarr.Array[Any], source: str) -> zarr.Array[Any]:
    """Return a node that must be an array."""
    if not isinstance(node, zarr.Array):
        raise VolumeError(f"{source}: {node.path} is a group, expected an array; {_REMEDY}")
    return node


def _stored_bytes(folder: Path, enough: int) -> int:
    """Add up the sizes of the files of a folder until they are enough."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            total += Path(parent, name).stat().st_size
            if total >= enough:
                return total
    return total
