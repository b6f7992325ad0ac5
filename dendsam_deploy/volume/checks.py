"""What every reader checks before it allocates, and how exceptions of the libraries behind the readers become ours."""

from __future__ import annotations

import math
import struct
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dendsam_deploy.errors import DendsamError, InvalidArgumentError, VolumeError
from dendsam_deploy.geometry import Window

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from dendsam_deploy.volume.volume import VolumeInfo

MAX_EXPANSION = 10_000
"""Largest ratio of decoded to stored bytes; deflate cannot exceed 1,032. More is damage or a decompression bomb."""

MAX_SLICE_BYTES = 2**36
"""Largest slice in memory, 64 GiB: a section of 262,144 x 262,144 uint8 pixels."""

MAX_SLICES = 1_000_000
"""Largest number of slices; a millimetre of tissue has 25,000 sections of 40 nm."""

_FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What parsers and codecs raise on damaged files. Few guard their assumptions, so the list is long on purpose."""


@contextmanager
def translated(source: str, doing: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into a `VolumeError` that names the file; our own errors pass.

    Parameters
    ----------
    source : str
        The file.
    doing : str
        What failed, such as ``decoding slice 3``.
    remedy : str
        What to do about it.
    """
    try:
        yield
    except DendsamError:
        raise
    except _FOREIGN_ERRORS as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        cause = cause if len(cause) <= 160 else cause[:157] + "..."
        raise VolumeError(
            f"{source}: {doing} failed ({cause}); the file is damaged or of an unknown kind, {remedy}"
        ) from error


def check_shape(source: str, shape_zyx: tuple[int, int, int], dtype: np.dtype[np.generic]) -> None:
    """Refuse sample types that are no grey values, empty volumes and volumes of absurd size.

    Raises
    ------
    VolumeError
        Names `source`, what was found and what was expected.
    """
    if dtype.kind not in "buif":
        kind = "complex numbers" if dtype.kind == "c" else f"samples of type {dtype}"
        raise VolumeError(f"{source}: holds {kind}, expected integers or real numbers; convert it to 8 or 16 bit")
    if min(shape_zyx) < 1:
        raise VolumeError(f"{source}: is empty, its shape is {shape_zyx} (z, y, x); expected at least one voxel")
    if decoded_size(shape_zyx[1:], dtype) > MAX_SLICE_BYTES or shape_zyx[0] > MAX_SLICES:
        raise VolumeError(
            f"{source}: claims the shape {shape_zyx} (z, y, x) of {dtype}, expected at most {MAX_SLICES:,} slices of "
            f"{MAX_SLICE_BYTES >> 30} GiB; the file is damaged or must be cut into parts"
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


def decoded_size(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    """Return the number of bytes of an array, in exact arithmetic."""
    return math.prod(int(length) for length in shape) * int(dtype.itemsize)
