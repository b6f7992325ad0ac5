"""A volume that is already in memory, behind the same reader as one on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.volume.volume import VolumeInfo

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window


class ArrayVolume:
    """A reader of a numpy array.

    Parameters
    ----------
    array : ndarray, shape (Z, Y, X)
        The samples; not copied.
    voxel_size_nm : (float, float, float), optional
        Voxel size ``(z, y, x)``.
    """

    def __init__(self, array: NDArray[np.generic], voxel_size_nm: tuple[float, float, float] | None = None) -> None:
        if array.ndim != 3:
            raise InvalidArgumentError(f"an array of shape {array.shape} is no volume, expected (z, y, x)")
        depth, height, width = array.shape
        self._array = array
        self.info = VolumeInfo((depth, height, width), array.dtype, voxel_size_nm, "array", "array")

    def read(self, z: int, window: Window | None = None) -> NDArray[np.generic]:
        """Return slice `z` or a window of it, without copying."""
        plane: NDArray[np.generic] = self._array[z]
        return plane if window is None else plane[window.slices]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None
