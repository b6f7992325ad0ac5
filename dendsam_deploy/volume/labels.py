"""Label volumes out: written under a temporary name, published by rename when they are whole."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dendsam_deploy.durable import storage_errors, sync
from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.volume.open import is_zarr
from dendsam_deploy.volume.tiff_labels import TiffLabelSink
from dendsam_deploy.volume.volume import LabelVolumeSpec, LabelWriter

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

__all__ = ["LabelVolumeSpec", "create_labels", "smallest_label_dtype"]

_MAX_LABEL: dict[np.dtype[np.generic], int] = {
    np.dtype(np.uint8): 2**8 - 1,
    np.dtype(np.uint16): 2**16 - 1,
    np.dtype(np.uint32): 2**32 - 1,
}
"""The types that labels are written in, smallest first, and the largest label of each."""


def smallest_label_dtype(max_label: int) -> np.dtype[np.generic]:
    """Return the smallest unsigned type that holds labels up to `max_label`.

    Raises
    ------
    InvalidArgumentError
        Negative, or more than 32 bits, which viewers do not show.
    """
    for dtype, limit in _MAX_LABEL.items():
        if 0 <= max_label <= limit:
            return dtype
    raise InvalidArgumentError(f"no label type holds {max_label}; labels lie between 0 and {2**32 - 1:,}")


def create_labels(path: Path | str, spec: LabelVolumeSpec) -> LabelWriter:
    """Begin a label volume.

    Parameters
    ----------
    path : Path or str
        Where the finished volume will be. What has that name is replaced when the new volume is whole, not before.
    spec : LabelVolumeSpec
        What it will be.

    Raises
    ------
    InvalidArgumentError
        A dtype or shape that no label volume can have, or a name that something else has.
    StorageError
        The place cannot be written to.
    """
    path = Path(path)
    if spec.dtype not in _MAX_LABEL:
        raise InvalidArgumentError(f"labels of type {spec.dtype} cannot be written; choose uint8, uint16 or uint32")
    if min(spec.shape_zyx) < 1:
        raise InvalidArgumentError(
            f"a label volume cannot have the shape {spec.shape_zyx}; expected 1 or more along z, y, x"
        )
    if path.is_dir() and not is_zarr(path):
        raise InvalidArgumentError(f"{path}: is a folder with other content; choose another name for the labels")
    return _Publisher(path, spec)


class _Sink(Protocol):
    """What a format does: append slices in order."""

    def append(self, labels: NDArray[np.generic]) -> None: ...

    def close(self) -> None: ...


def _create_sink(path: Path, spec: LabelVolumeSpec) -> _Sink:
    """Begin a file of the wanted format."""
    if spec.format == "tif":
        return TiffLabelSink(path, spec)
    # zarr takes as long to import as all the rest of this package; only those who need it wait.
    from dendsam_deploy.volume.ngff_labels import NgffLabelSink  # noqa: PLC0415 - see above

    return NgffLabelSink(path, spec)


class _Publisher:
    """Checks slices, hands them to the sink of the format, and renames the result on a clean exit; a `LabelWriter`."""

    def __init__(self, path: Path, spec: LabelVolumeSpec) -> None:
        self._path = path
        self._spec = spec
        self._partial = path.with_name(path.name + ".partial")
        self._next_z = 0
        with storage_errors(path):
            _remove(self._partial)
            self._sink = _create_sink(self._partial, spec)

    def write(self, z: int, labels: NDArray[np.uint32]) -> None:
        """Write the labels of slice `z`; see `LabelWriter`."""
        depth, height, width = self._spec.shape_zyx
        if z != self._next_z or z >= depth:
            raise InvalidArgumentError(f"{self._path}: got slice {z} of {depth}, expected slice {self._next_z}")
        if labels.shape != (height, width):
            raise InvalidArgumentError(
                f"{self._path}: slice {z} has the shape {labels.shape}, expected {(height, width)}"
            )
        if labels.min() < 0 or labels.max() > _MAX_LABEL[self._spec.dtype]:
            raise InvalidArgumentError(
                f"{self._path}: slice {z} holds labels from {labels.min()} to {labels.max()}, "
                f"expected 0 to {_MAX_LABEL[self._spec.dtype]} ({self._spec.dtype})"
            )
        with storage_errors(self._path):
            self._sink.append(labels.astype(self._spec.dtype, copy=False))
        self._next_z += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_whole = self._next_z == self._spec.shape_zyx[0]
        try:
            with storage_errors(self._path):
                self._sink.close()
                if kind is None and is_whole:
                    _publish(self._partial, self._path)
        finally:
            with suppress(OSError):
                _remove(self._partial)
        if kind is None and not is_whole:
            raise InvalidArgumentError(
                f"{self._path}: {self._next_z} of {self._spec.shape_zyx[0]} slices were written; nothing was published"
            )


def _publish(partial: Path, path: Path) -> None:
    """Give a finished file or folder its name, durably; what had the name before goes."""
    for parent, _, names in os.walk(partial):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
    if partial.is_file():
        sync(partial)
        partial.replace(path)
    else:
        # A folder cannot replace a folder in one step: the old one steps aside first.
        aside = path.with_name(path.name + ".old")
        _remove(aside)
        if path.exists():
            path.rename(aside)
        partial.rename(path)
        _remove(aside)
    sync(path.parent)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
