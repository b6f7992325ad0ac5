"""Label volumes out: written under a temporary name, published by rename when they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, StorageError
from dendsam_deploy.volume.tiff_labels import TiffLabelSink
from dendsam_deploy.volume.volume import LabelVolumeSpec, LabelWriter

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

__all__ = ["LabelVolumeSpec", "create_labels", "smallest_label_dtype"]

_LABEL_DTYPES = tuple(np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32))


def smallest_label_dtype(max_label: int) -> np.dtype[np.generic]:
    """Return the smallest unsigned type that holds labels up to `max_label`.

    Raises
    ------
    InvalidArgumentError
        Negative, or more than 32 bits: viewers do not show those.
    """
    for dtype in _LABEL_DTYPES:
        if 0 <= max_label <= np.iinfo(dtype).max:
            return dtype
    raise InvalidArgumentError(f"no label type holds {max_label}; labels lie between 0 and {np.iinfo(np.uint32).max:,}")


def create_labels(path: Path | str, spec: LabelVolumeSpec) -> LabelWriter:
    """Begin a label volume.

    Parameters
    ----------
    path : Path or str
        Where the finished volume will be. A file of that name is replaced when the new one is whole, not before.
    spec : LabelVolumeSpec
        What it will be.

    Raises
    ------
    InvalidArgumentError
        A dtype or shape that no label volume can have.
    StorageError
        The place cannot be written to.
    """
    if spec.dtype not in _LABEL_DTYPES:
        raise InvalidArgumentError(f"labels of type {spec.dtype} cannot be written; choose uint8, uint16 or uint32")
    if min(spec.shape_zyx) < 1:
        raise InvalidArgumentError(f"a label volume cannot have the shape {spec.shape_zyx}")
    return _Publisher(Path(path), spec)


class _Sink(Protocol):
    """What a format does: append slices in order."""

    def append(self, labels: NDArray[np.generic]) -> None: ...

    def close(self) -> None: ...


class _Publisher:
    """Checks slices, hands them to the sink of the format, and renames the result on a clean exit; see `LabelWriter`."""

    def __init__(self, path: Path, spec: LabelVolumeSpec) -> None:
        self._path = path
        self._spec = spec
        self._partial = path.with_name(path.name + ".partial")
        self._next_z = 0
        self._sink = _open_sink(self._partial, spec)

    def write(self, z: int, labels: NDArray[np.uint32]) -> None:
        """Write the labels of slice `z`; see `LabelWriter`."""
        depth, *shape_hw = self._spec.shape_zyx
        if z != self._next_z or z >= depth:
            raise InvalidArgumentError(f"{self._path}: slice {z} of {depth} came where slice {self._next_z} was due")
        if labels.shape != tuple(shape_hw):
            raise InvalidArgumentError(
                f"{self._path}: slice {z} has the shape {labels.shape}, expected {tuple(shape_hw)}"
            )
        if labels.max() > np.iinfo(self._spec.dtype).max or labels.min() < 0:
            raise InvalidArgumentError(f"{self._path}: slice {z} holds labels that {self._spec.dtype} cannot hold")
        try:
            self._sink.append(labels.astype(self._spec.dtype, copy=False))
        except OSError as error:
            raise _storage_error(self._path, error) from error
        self._next_z += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._sink.close()
            if kind is None and self._next_z == self._spec.shape_zyx[0]:
                self._partial.replace(self._path)
                return
        except OSError as failure:
            raise _storage_error(self._path, failure) from failure
        self._partial.unlink(missing_ok=True)
        if kind is None:
            raise InvalidArgumentError(
                f"{self._path}: only {self._next_z} of {self._spec.shape_zyx[0]} slices were written"
            )


def _open_sink(path: Path, spec: LabelVolumeSpec) -> _Sink:
    """Create the file of a format under its temporary name."""
    try:
        return TiffLabelSink(path, spec)
    except OSError as error:
        raise _storage_error(path, error) from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    """Say which file could not be written and why."""
    return StorageError(
        f"{path}: cannot be written ({error.strerror or error}); free space there or choose another place"
    )
