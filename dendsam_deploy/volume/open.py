"""The one place where a path becomes a volume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.volume.tiff import TiffReader
from dendsam_deploy.volume.voxel_size import check_voxel_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window
    from dendsam_deploy.volume.volume import VolumeInfo, VolumeReader

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_volume(path: Path | str, voxel_size_nm: tuple[float, float, float] | None = None) -> VolumeReader:
    """Open a TIFF stack for reading slice by slice.

    Parameters
    ----------
    path : Path or str
        The file.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)`` that replaces what the file records.

    Raises
    ------
    VolumeError
        Names the file, what was found and what was expected.
    InvalidArgumentError
        The voxel size is not positive.
    """
    path = Path(path)
    check_voxel_size(voxel_size_nm)
    if not path.exists():
        raise VolumeError(f"{path}: does not exist; check the spelling and whether the drive is mounted")
    return TiffReader(path, voxel_size_nm)


def open_labels(path: Path | str, voxel_size_nm: tuple[float, float, float] | None = None) -> VolumeReader:
    """Open a volume of instance labels; ``read`` gives uint32."""
    return _LabelReader(open_volume(path, voxel_size_nm))


class _LabelReader:
    """A volume whose values are checked to be labels as they are read."""

    def __init__(self, volume: VolumeReader) -> None:
        self._volume = volume

    @property
    def info(self) -> VolumeInfo:
        """The recorded facts."""
        return self._volume.info

    def read(self, z: int, window: Window | None = None) -> NDArray[np.uint32]:
        """Return labels."""
        return self._volume.read(z, window).astype(np.uint32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._volume.__exit__(kind, error, traceback)
