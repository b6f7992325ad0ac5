"""What every reader checks before it allocates or decodes anything."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.geometry import Window

if TYPE_CHECKING:
    import numpy as np

    from dendsam_deploy.volume.volume import VolumeInfo

MAX_EXPANSION = 10_000
"""Largest ratio of decoded to stored bytes. Deflate cannot exceed 1,032; what claims more than this is damaged or a bomb."""

MAX_SLICE_BYTES = 2**36
"""Largest slice in memory, 64 GiB: a section of 262,144 x 262,144 uint8 pixels."""


def check_shape(source: str, shape_zyx: tuple[int, int, int], dtype: np.dtype[np.generic]) -> None:
    """Refuse sample types that are no grey values, empty volumes and slices of absurd size.

    Raises
    ------
    VolumeError
        Names `source`, what was found and what was expected.
    """
    if dtype.kind not in "buif":
        kind = "complex numbers" if dtype.kind == "c" else f"samples of type {dtype}"
        raise VolumeError(f"{source}: holds {kind}, expected integers or real numbers; convert it to 8 or 16 bit")
    if min(shape_zyx) < 1:
        raise VolumeError(f"{source}: has the shape {shape_zyx} (z, y, x), expected at least one voxel along each axis")
    slice_bytes = shape_zyx[1] * shape_zyx[2] * dtype.itemsize
    if slice_bytes > MAX_SLICE_BYTES:
        raise VolumeError(
            f"{source}: claims slices of {shape_zyx[1]} x {shape_zyx[2]} px ({slice_bytes:,} bytes), expected at most "
            f"{MAX_SLICE_BYTES:,} bytes; the file is damaged or must be cut into parts"
        )


def check_expansion(source: str, decoded_bytes: int, stored_bytes: int) -> None:
    """Refuse data that would grow more than `MAX_EXPANSION` times when decoded."""
    if decoded_bytes > MAX_EXPANSION * stored_bytes:
        raise VolumeError(
            f"{source}: {stored_bytes:,} stored bytes claim to hold {decoded_bytes:,}, expected at most "
            f"{MAX_EXPANSION:,} times as many; the file is damaged or was made to exhaust memory"
        )


def check_read(info: VolumeInfo, z: int, window: Window | None) -> Window:
    """Return the window to read, the whole slice where none was given; both must lie inside the volume."""
    depth, height, width = info.shape_zyx
    if not 0 <= z < depth:
        raise InvalidArgumentError(f"{info.source}: has no slice {z}; its slices are 0 to {depth - 1}")
    if window is None:
        return Window(0, 0, height, width)
    if window != window.clipped((height, width)):
        raise InvalidArgumentError(f"{info.source}: {window} reaches out of its slices of {height} x {width} px")
    return window


def one_line(error: BaseException) -> str:
    """Return the message of a foreign exception as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def decoded_size(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    """Return the number of bytes of an array, in exact arithmetic."""
    return math.prod(int(length) for length in shape) * int(dtype.itemsize)
