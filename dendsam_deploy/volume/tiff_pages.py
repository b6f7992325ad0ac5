"""Which pages of a TIFF file are the slices of its volume. Part of the home of tifffile, see `tiff`."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from xml.etree import ElementTree

import numpy as np
import tifffile

from dendsam_deploy.errors import VolumeError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFF files begin: little and big endian, classic and BigTIFF."""

REMEDY = "save it again as a plain greyscale TIFF stack (Fiji: File > Save As > Tiff)"

_REDUCED_OR_MASK = 0b101
"""Bits of the tag NewSubfileType that mark a page as a thumbnail or a transparency mask."""


@dataclass(frozen=True, slots=True)
class PlaneRun:
    """Planes that lie one after another without directories of their own, as ImageJ stores stacks of more than 4 GB.

    Parameters
    ----------
    offset : int
        Byte at which the first plane begins.
    count : int
        Number of planes.
    dtype : numpy.dtype
        Type of the samples in the byte order of the file.
    """

    offset: int
    count: int
    dtype: np.dtype[np.generic]


def page_at(file: tifffile.TiffFile, index: int) -> tifffile.TiffPage:
    """Parse the directory of a page. Nothing is kept, so that memory does not grow with the number of pages."""
    return cast("tifffile.TiffPage", file.pages.get(index, aspage=True))


def check_page_chain(path: Path) -> None:
    """Follow the chain of page directories from the header to its end, before tifffile does.

    tifffile takes a chain that leads out of the file for its end, so that a cut file would pass for a shorter stack; a
    chain that leads back into itself it follows for a very long time.

    Raises
    ------
    VolumeError
        No TIFF, cut, without pages, or with a circular chain.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        if magic not in TIFF_MAGIC:
            raise VolumeError(f"{path}: is no TIFF file (it begins with {magic!r}); {REMEDY}")
        order = "<" if magic.startswith(b"II") else ">"
        is_big = b"+" in magic
        pointer, count_format, offset_format, entry_size = (8, "Q", "Q", 20) if is_big else (4, "H", "I", 12)
        size = file.seek(0, 2)
        seen: set[int] = set()
        while offset := _number_at(file, pointer, order + offset_format, beyond=size):
            if offset >= size:
                raise VolumeError(
                    f"{path}: is cut: the directory of page {len(seen)} is due at byte {offset:,}, the file ends at "
                    f"{size:,}; copy it again from its source"
                )
            if offset in seen:
                raise VolumeError(f"{path}: is damaged: page {len(seen)} leads back to an earlier page; {REMEDY}")
            seen.add(offset)
            entries = _number_at(file, offset, order + count_format, beyond=size)
            pointer = offset + struct.calcsize(count_format) + entries * entry_size
    if not seen:
        raise VolumeError(f"{path}: is a TIFF file without pages, expected at least one image; {REMEDY}")


def _number_at(file: BinaryIO, position: int, number_format: str, beyond: int) -> int:
    """Read one integer; where the file ends before it, return `beyond`."""
    file.seek(min(position, beyond))
    raw = file.read(struct.calcsize(number_format))
    return int(struct.unpack(number_format, raw)[0]) if len(raw) == struct.calcsize(number_format) else beyond


def find_planes(file: tifffile.TiffFile, path: Path) -> list[int] | PlaneRun:
    """Decide which pages of a file are the slices of its volume.

    Returns
    -------
    list of int or PlaneRun
        Indices of pages in order of z, or the place of slices that have no pages.

    Raises
    ------
    VolumeError
        Colour, several images or sizes, axes other than z, or fewer pages than the description claims.
    """
    first = page_at(file, 0)
    check_page(first, first, str(path))
    if file.is_ome:
        return _ome_planes(file, path)
    planes, declared = _full_size_pages(file, first, path)
    series = file.series
    if len(series) == 1:
        _check_axes(series[0], file, path)
        count = _plane_count(series[0])
        if len(file.pages) == 1 and series[0].dataoffset is not None and count > 1:
            return PlaneRun(series[0].dataoffset, count, stored_dtype(first))
    if declared > len(planes):
        raise VolumeError(
            f"{path}: its description speaks of {declared} images, the file holds {len(planes)}; it is cut or was not "
            "written to the end, copy or export it again"
        )
    return planes


def _full_size_pages(file: tifffile.TiffFile, first: tifffile.TiffPage, path: Path) -> tuple[list[int], int]:
    """Return the pages that are neither thumbnails nor masks, and the number of images that their descriptions claim.

    The order of the file is the order of the slices. tifffile's series are not asked here: programs that write a stack
    page by page leave as many series as pages.
    """
    planes: list[int] = []
    declared = 0
    for index in range(len(file.pages)):
        page = page_at(file, index)
        if index == 0 or not page.subfiletype & _REDUCED_OR_MASK:
            check_page(page, first, str(path))
            planes.append(index)
            declared += _declared_planes(page, file)
    return planes, declared


def stored_dtype(page: tifffile.TiffPage) -> np.dtype[np.generic]:
    """Return the type of a page's samples in the byte order of the file."""
    return np.dtype(page.dtype).newbyteorder(page.parent.byteorder)


def check_page(page: tifffile.TiffPage, first: tifffile.TiffPage, source: str) -> None:
    """Refuse a page that is no grey plane of a known compression, or of another size or type than the first one."""
    if page.samplesperpixel > 1:
        raise VolumeError(
            f"{source}: has {page.samplesperpixel} samples per pixel (RGB or other colour), expected grey values; "
            "convert it (Fiji: Image > Type > 8-bit); slices written by tifffile need photometric='minisblack'"
        )
    if page.imagedepth > 1:
        raise VolumeError(f"{source}: has pages of depth {page.imagedepth}, expected a page per slice; {REMEDY}")
    if page.dtype is None:
        raise VolumeError(f"{source}: has {page.bitspersample} bits per sample, expected 8, 16 or 32; {REMEDY}")
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise VolumeError(f"{source}: page {page.index} has the unknown compression {int(page.compression)}; {REMEDY}")
    if (page.imagelength, page.imagewidth, page.dtype) != (first.imagelength, first.imagewidth, first.dtype):
        raise VolumeError(
            f"{source}: page {page.index} is {page.imagelength} x {page.imagewidth} px {page.dtype}, the first one is "
            f"{first.imagelength} x {first.imagewidth} px {first.dtype}; expected one size and type, split the file"
        )


def _ome_planes(file: tifffile.TiffFile, path: Path) -> list[int]:
    """Return the pages of an OME-TIFF in the order that its metadata give."""
    series = file.series
    if not series or series[0].kind != "ome":
        raise VolumeError(f"{path}: its OME-XML does not fit its pages; the file is cut or damaged, export it again")
    if len(series) > 1:
        shapes = ", ".join(" x ".join(map(str, one.shape)) for one in series)
        raise VolumeError(f"{path}: holds {len(series)} images ({shapes}), expected one; export the one to use alone")
    _check_axes(series[0], file, path)
    count = _plane_count(series[0])
    pages = [page for page in series[0].pages if page is not None]
    if len(pages) != count:
        z = next((z for z, page in enumerate(series[0].pages) if page is None), len(pages))
        raise VolumeError(f"{path}: slice {z} of {count} in its OME-XML has no page; the file is cut, export it again")
    for z, page in enumerate(pages):
        if page.parent is not file:
            raise VolumeError(f"{path}: slice {z} lies in another file, expected one; export the volume into one file")
        check_page(page_at(file, page.index), page_at(file, pages[0].index), str(path))
    return [page.index for page in pages]


def _check_axes(series: tifffile.TiffPageSeries, file: tifffile.TiffFile, path: Path) -> None:
    """Refuse any axis but z, y, x that is longer than one; the unnamed axis of a stack counts as z."""
    axes = zip(series.axes, series.shape, strict=True)
    stacked = [name for name, length in axes if length > 1 and name not in "YX"]
    is_stack = set(stacked) <= set("ZQI") or (stacked == ["C"] and _channels_are_anonymous(file))
    if len(stacked) > 1 or not is_stack:
        raise VolumeError(
            f"{path}: has the axes {series.axes} of shape {series.shape}, expected one stack along z; keep one channel "
            "and one time point, or declare the axis as z (Fiji: Image > Properties)"
        )


def _channels_are_anonymous(file: tifffile.TiffFile) -> bool:
    """Tell whether the channels of a file have neither names nor colours.

    Programs that are not told the axes of a grey stack, tifffile among them, record its slices as such channels.
    """
    if file.is_ome:
        elements = ElementTree.fromstring(file.ome_metadata or "").iter()
        channels = [element.attrib.keys() for element in elements if element.tag.endswith("}Channel")]
        return not any({"Name", "Color", "Fluor", "EmissionWavelength"} & keys for keys in channels)
    metadata = file.imagej_metadata or {}
    return metadata.get("mode") == "grayscale" and "LUTs" not in metadata


def _plane_count(series: tifffile.TiffPageSeries) -> int:
    """Return the number of slices along all axes that are not within a slice."""
    axes = zip(series.axes, series.shape, strict=True)
    return math.prod(int(length) for name, length in axes if name not in "YXS")


def _declared_planes(page: tifffile.TiffPage, file: tifffile.TiffFile) -> int:
    """Return how many images a page's description claims for the pages from there on, 0 where it claims nothing.

    ImageJ tells it on the first page, tifffile on the first page of each series.
    """
    if page.index == 0 and file.imagej_metadata:
        metadata = file.imagej_metadata
        counts = [int(metadata.get(key, 1)) for key in ("channels", "slices", "frames")]
        return max(int(metadata.get("images", 1)), math.prod(counts))
    description = page.shaped_description
    if description is not None and description.startswith("{"):
        shape = [int(length) for length in json.loads(description)["shape"]]
        return math.prod(shape) // max(1, page.imagelength * page.imagewidth)
    return 0
