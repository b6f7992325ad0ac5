"""A volume that tells what was read from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dendsam_deploy.volume.array import ArrayVolume

if TYPE_CHECKING:
    import numpy as np


class SpyVolume(ArrayVolume):
    """Remembers which slices were read."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array)
        self.seen: set[int] = set()

    def read(self, z, window=None):
        self.seen.add(z)
        return super().read(z, window)
