"""Single images: PNG files and resampling. The home of Pillow."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, PngImagePlugin

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.volume.checks import check_expansion, check_shape, translated

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PNG_MAGIC = b"\x89PNG"
"""How PNG files begin."""

_REMEDY = "save it again as 8- or 16-bit grey PNG"

_GREY_DTYPES = {"1": np.bool_, "L": np.uint8, "I;16": np.uint16, "I": np.uint16}
"""Pillow's modes for grey PNG files of 1, up to 8 and 16 bits. Older versions say ``I`` for 16 bits."""


def png_header(path: Path) -> tuple[tuple[int, int], np.dtype[np.generic]]:
    """Return the shape ``(H, W)`` and the dtype of a grey PNG without decoding it.

    Raises
    ------
    VolumeError
        No PNG, or a PNG in colour or of absurd size.
    """
    with translated(str(path), "reading the PNG", _REMEDY), path.open("rb") as file:
        image = _open_png(file, path)
        return (image.height, image.width), np.dtype(_GREY_DTYPES[image.mode])


def decode_png(path: Path) -> NDArray[np.generic]:
    """Decode a grey PNG of 1, 8 or 16 bits.

    Returns
    -------
    ndarray, shape (H, W), bool, uint8 or uint16
        The grey values.

    Raises
    ------
    VolumeError
        No PNG, a PNG in colour or of absurd size, or cut or damaged.
    """
    with translated(str(path), "decoding the PNG", _REMEDY), path.open("rb") as file:
        image = _open_png(file, path)
        image.load()
        return np.asarray(image).astype(_GREY_DTYPES[image.mode], copy=False)


def _open_png(file: io.BufferedReader, path: Path) -> Image.Image:
    """Read the header of a PNG and refuse what is not grey or of absurd size.

    The PNG plugin is called directly: `Image.open` guesses among dozens of formats, and a global limit makes it refuse
    large sections.
    """
    image = PngImagePlugin.PngImageFile(file)
    if image.mode not in _GREY_DTYPES:
        raise VolumeError(
            f"{path}: is in colour (mode {image.mode}), expected grey values; convert it to 8-bit greyscale"
        )
    dtype = np.dtype(_GREY_DTYPES[image.mode])
    check_shape(str(path), (1, image.height, image.width), dtype)
    check_expansion(str(path), image.height * image.width * dtype.itemsize, path.stat().st_size)
    return image


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Return a grey ``(H, W)`` or RGB ``(H, W, 3)`` image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def resize_bilinear(image: NDArray[np.uint8], shape_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resample an image with a triangle filter that widens when it shrinks (antialiasing), the way SAM's own code does.

    Parameters
    ----------
    image : ndarray, shape (H, W), uint8
        Grey values.
    shape_hw : (int, int)
        Wanted shape.

    Returns
    -------
    ndarray, shape `shape_hw`, uint8
        `image` itself where the shape is the same.

    References
    ----------
    https://github.com/facebookresearch/segment-anything, ``segment_anything/utils/transforms.py``,
    ``ResizeLongestSide``
    """
    if image.shape == shape_hw:
        return image
    resized = Image.fromarray(image).resize((shape_hw[1], shape_hw[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized)
