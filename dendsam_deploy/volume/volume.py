"""What a volume is to the rest of the program: its facts, a reader of slices, a writer of label slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """The recorded facts of a volume.

    Parameters
    ----------
    shape_zyx : (int, int, int)
        Slices, rows, columns. A 2-D image has one slice.
    dtype : numpy.dtype
        Type of the samples on disk.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)``. None means that the file does not record it; it is never guessed.
    source : str
        The path as the user gave it, for messages.
    format : str
        ``tiff``, ``folder``, ``png``, ``ome-zarr`` or ``zarr``.
    detail : str
        What else is worth telling about the encoding, such as ``ImageJ, deflate``; for people, not for programs.
    """

    shape_zyx: tuple[int, int, int]
    dtype: np.dtype[np.generic]
    voxel_size_nm: tuple[float, float, float] | None
    source: str
    format: str
    detail: str = ""


class VolumeReader(Protocol):
    """A volume that is open for reading, slice by slice; a context manager.

    ``read`` may be called from one thread at a time.
    """

    @property
    def info(self) -> VolumeInfo:
        """The recorded facts."""
        ...

    def read(self, z: int, window: Window | None = None) -> NDArray[np.generic]:
        """Return slice `z`, or the part of it inside `window`, as ``(h, w)`` in the dtype on disk."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class LabelVolumeSpec:
    """What a label volume will be, known before its first slice is written.

    Parameters
    ----------
    shape_zyx : (int, int, int)
        Slices, rows, columns.
    dtype : numpy.dtype
        ``uint8``, ``uint16`` or ``uint32``; see `labels.smallest_label_dtype`.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)``, recorded in the file; None records none.
    format : str
        ``tif`` or ``ome-zarr``.
    """

    shape_zyx: tuple[int, int, int]
    dtype: np.dtype[np.generic]
    voxel_size_nm: tuple[float, float, float] | None = None
    format: Literal["tif", "ome-zarr"] = "tif"


class LabelWriter(Protocol):
    """A label volume that is being written; a context manager that publishes the result on a clean exit only.

    Slices are written in ascending order, each exactly once.
    """

    def write(self, z: int, labels: NDArray[np.uint32]) -> None:
        """Write the labels ``(Y, X)`` of slice `z`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
