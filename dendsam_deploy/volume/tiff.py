"""TIFF stacks, one plane at a time. The home of tifffile, together with `tiff_labels`."""

from __future__ import annotations

import logging
import math
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tifffile

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.volume.limits import check_expansion, check_read, check_shape, decoded_size, one_line
from dendsam_deploy.volume.volume import VolumeInfo
from dendsam_deploy.volume.voxel_size import (
    RecordedSize,
    size_from_imagej,
    size_from_named_nm,
    size_from_ome_xml,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window

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
)
"""What tifffile, imagecodecs and the XML parser raise on damaged files; the first four are their unguarded assumptions."""

_REMEDY = "save it again as a plain greyscale TIFF stack (Fiji: File > Save As > Tiff)"


@dataclass(frozen=True, slots=True)
class _Run:
    """Planes that lie one after another without directories of their own, as ImageJ stores stacks of more than 4 GB."""

    offset: int
    count: int
    dtype: np.dtype[np.generic]


class TiffReader:
    """A TIFF stack that is open for reading; see `VolumeReader`.

    A file is a volume if all its full-size pages are grey, of one size and one sample type, and if no axis but z is longer than one.

    Parameters
    ----------
    path : Path
        The file.
    voxel_size_nm : (float, float, float) or None
        Replaces the voxel size that the file records.

    Raises
    ------
    VolumeError
        Names the file, what was found and what was expected.
    """

    def __init__(self, path: Path, voxel_size_nm: tuple[float, float, float] | None = None) -> None:
        self._path = path
        check_page_chain(path)
        with _translated(path, "opening it"):
            self._file = tifffile.TiffFile(path)
        try:
            with _translated(path, "reading its directory"):
                self._planes = _find_planes(self._file, path)
                first = self._page(0)
                depth = self._planes.count if isinstance(self._planes, _Run) else len(self._planes)
                self.recorded_size = _recorded_size(self._file)
                self.info = VolumeInfo(
                    shape_zyx=(depth, first.imagelength, first.imagewidth),
                    dtype=np.dtype(first.dtype),
                    voxel_size_nm=voxel_size_nm
                    or (None if self.recorded_size is None else self.recorded_size.as_zyx(depth)),
                    source=str(path),
                    format="tiff",
                    detail=_describe(self._file, first),
                )
                self._check_planes()
        except VolumeError:
            self._file.close()
            raise

    def read(self, z: int, window: Window | None = None) -> NDArray[np.generic]:
        """Return slice `z` or a part of it; see `VolumeReader`."""
        window = check_read(self.info, z, window)
        whole = window.height == self.info.shape_zyx[1] and window.width == self.info.shape_zyx[2]
        with _translated(self._path, f"decoding slice {z}"):
            if isinstance(self._planes, _Run):
                plane_bytes = decoded_size(self.info.shape_zyx[1:], self.info.dtype)
                return self._read_rows(self._planes.offset + z * plane_bytes, self._planes.dtype, window)
            page = self._page(z)
            self._check_page(page, z)
            if page.is_contiguous:
                stored = np.dtype(self._file.byteorder + page.dtype.char)
                return self._read_rows(page.dataoffsets[0], stored, window)
            image: NDArray[np.generic] = page.asarray() if whole else _decode_window(page, window)
            return image.reshape(window.height, window.width)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _page(self, z: int) -> tifffile.TiffPage:
        """Parse the directory of slice `z`; nothing is kept, so that memory does not grow with the number of slices."""
        index = 0 if isinstance(self._planes, _Run) else self._planes[z]
        return self._file.pages.get(index, aspage=True)

    def _read_rows(self, offset: int, stored: np.dtype[np.generic], window: Window) -> NDArray[np.generic]:
        """Read the rows of a window from uncompressed samples that begin at `offset`."""
        width = self.info.shape_zyx[2]
        handle = self._file.filehandle
        handle.seek(offset + window.y0 * width * stored.itemsize)
        samples = handle.read_array(stored, window.height * width)
        columns = slice(window.x0, window.x0 + window.width)
        rows: NDArray[np.generic] = samples.reshape(window.height, width)[:, columns]
        return np.ascontiguousarray(rows, dtype=self.info.dtype)

    def _check_planes(self) -> None:
        """Check every plane before the first one is read: what is wrong with slice 900 should not appear after an hour."""
        check_shape(self.info.source, self.info.shape_zyx, self.info.dtype)
        if isinstance(self._planes, _Run):
            end = self._planes.offset + decoded_size(self.info.shape_zyx, self.info.dtype)
            self._check_end(end, self._planes.count - 1)
            return
        for z in range(len(self._planes)):
            self._check_page(self._page(z), z)

    def _check_page(self, page: tifffile.TiffPage, z: int) -> None:
        """Check the directory of one plane against the volume's and against the length of the file."""
        source, (_, height, width) = self.info.source, self.info.shape_zyx
        _check_grey(page, source)
        if (page.imagelength, page.imagewidth) != (height, width) or page.dtype != self.info.dtype:
            raise VolumeError(
                f"{source}: page {z} is {page.imagelength} x {page.imagewidth} px {page.dtype}, page 0 is "
                f"{height} x {width} px {self.info.dtype}; expected pages of one size and type, split the file"
            )
        try:
            tifffile.TIFF.DECOMPRESSORS[int(page.compression)]
        except KeyError:
            raise VolumeError(
                f"{source}: page {z} is compressed by method {int(page.compression)}, which is not known here; {_REMEDY}"
            ) from None
        count = math.prod(page.chunked)
        if len(page.dataoffsets) < count or len(page.databytecounts) < count or not all(page.databytecounts[:count]):
            raise VolumeError(
                f"{source}: slice {z} lacks image data ({len(page.dataoffsets)} of {count} strips or tiles are recorded); "
                "copy or export the file again"
            )
        ends = (start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=False))
        self._check_end(max(ends), z)
        check_expansion(source, page.nbytes, sum(page.databytecounts))

    def _check_end(self, end: int, z: int) -> None:
        """Raise if the data of slice `z` reach beyond the end of the file."""
        size = self._file.filehandle.size
        if end > size:
            raise VolumeError(
                f"{self.info.source}: is cut: slice {z} ends at byte {end:,}, the file at {size:,}; copy it again from its source"
            )


def check_page_chain(path: Path) -> None:
    """Follow the chain of page directories from the header to its end, before tifffile does.

    tifffile takes a chain that leads out of the file for its end, so a cut file would pass for a shorter stack; and a chain that
    leads back into itself would not end.

    Raises
    ------
    VolumeError
        No TIFF, cut, without pages, or with a circular chain.
    """
    with path.open("rb") as file:
        header = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(header[:2])
        magic = struct.unpack(f"{order}H", header[2:4])[0] if order and len(header) >= 4 else 0
        if magic not in (42, 43) or len(header) < 8 * (magic - 41):
            raise VolumeError(f"{path}: is no TIFF file (it begins with {header[:8]!r}); {_REMEDY}")
        count_format, offset_format, entry_size = ("H", "I", 12) if magic == 42 else ("Q", "Q", 20)
        pointer = 4 if magic == 42 else 8
        size = file.seek(0, 2)
        seen: set[int] = set()
        while True:
            file.seek(pointer)
            raw = file.read(struct.calcsize(offset_format))
            offset = (
                struct.unpack(order + offset_format, raw)[0] if len(raw) == struct.calcsize(offset_format) else size
            )
            if offset == 0:
                break
            if offset >= size:
                raise VolumeError(
                    f"{path}: is cut: the directory of page {len(seen)} should lie at byte {offset:,}, the file ends at "
                    f"{size:,}; copy it again from its source"
                )
            if offset in seen:
                raise VolumeError(f"{path}: is damaged: page {len(seen)} leads back to an earlier page; {_REMEDY}")
            seen.add(offset)
            file.seek(offset)
            raw = file.read(struct.calcsize(count_format))
            entries = struct.unpack(order + count_format, raw)[0] if len(raw) == struct.calcsize(count_format) else 0
            pointer = offset + len(raw) + entries * entry_size
    if not seen:
        raise VolumeError(f"{path}: is a TIFF file without pages, expected at least one image; {_REMEDY}")


def _find_planes(file: tifffile.TiffFile, path: Path) -> Sequence[int] | _Run:
    """Decide which pages of a file are the slices of its volume, in order of z."""
    _check_grey(file.pages.first, str(path))
    series = file.series
    if file.is_ome:
        return _ome_planes(series, path)
    if len(series) == 1:
        _check_axes(series[0], path)
        count = _plane_count(series[0])
        if series[0].dataoffset is not None and count > 1:
            return _Run(series[0].dataoffset, count, np.dtype(file.byteorder + series[0].dtype.char))
    # Otherwise the slices are the pages in the order of the file. Programs that write a stack page by page leave as many series as
    # pages; whether those agree in size and type is checked later, page by page, so that the message can name the page.
    planes: list[int] = []
    declared = 0
    for page in _pages(file):
        if not page.is_reduced or file.pages.first.is_reduced:
            planes.append(page.index)
            declared += _declared_planes(page)
    if declared > len(planes):
        raise VolumeError(
            f"{path}: its description speaks of {declared} images, the file holds {len(planes)}; it is cut or was not "
            "written to the end, copy or export it again"
        )
    return planes


def _pages(file: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    """Parse the pages of a file one by one without keeping them."""
    for index in range(len(file.pages)):
        yield file.pages.get(index, aspage=True)


def _ome_planes(series: Sequence[tifffile.TiffPageSeries], path: Path) -> list[int]:
    """Return the pages of an OME-TIFF in the order that its metadata give."""
    if not series or series[0].kind != "ome":
        raise VolumeError(f"{path}: its OME-XML does not fit its pages; the file is cut or damaged, export it again")
    if len(series) > 1:
        shapes = ", ".join(" x ".join(map(str, one.shape)) for one in series)
        raise VolumeError(
            f"{path}: holds {len(series)} images ({shapes}), expected one; export the one to use by itself"
        )
    _check_axes(series[0], path)
    pages = list(series[0].pages)
    count = _plane_count(series[0])
    for z in range(count):
        if z >= len(pages) or pages[z] is None:
            raise VolumeError(
                f"{path}: slice {z} of {count} in its OME-XML has no page; the file is cut, export it again"
            )
        if pages[z].parent is not series[0].parent:
            raise VolumeError(f"{path}: slice {z} lies in another file; export the volume into one file")
    return [page.index for page in pages]


def _check_axes(series: tifffile.TiffPageSeries, path: Path) -> None:
    """Refuse colour and any axis but z, y, x that is longer than one; unnamed axes of a stack count as z."""
    long = [
        (name, length)
        for name, length in zip(series.axes, series.shape, strict=True)
        if length > 1 and name not in "YX"
    ]
    if any(name == "S" for name, _ in long):
        raise VolumeError(
            f"{path}: holds colour (axes {series.axes}, shape {series.shape}), expected grey values; {_REMEDY}"
        )
    if len(long) > 1 or any(name not in "ZQI" for name, _ in long):
        raise VolumeError(
            f"{path}: has the axes {series.axes} of shape {series.shape}, expected one stack along z; keep one channel and one "
            "time point, or declare the axis as z (Fiji: Image > Properties)"
        )


def _plane_count(series: tifffile.TiffPageSeries) -> int:
    """Return the number of slices along all axes that are not within a slice."""
    return math.prod(length for name, length in zip(series.axes, series.shape, strict=True) if name not in "YXS")


def _declared_planes(page: tifffile.TiffPage) -> int:
    """Return the number of images that a page's description claims for the pages from there on, 0 where it claims nothing."""
    if page.imagej_description is not None:
        metadata = tifffile.tifffile.imagej_description_metadata(page.imagej_description)
        counts = [metadata.get(key, 1) for key in ("channels", "slices", "frames")]
        return max(metadata.get("images", 1), math.prod(counts))
    if page.shaped_description is not None:
        shape = tifffile.tifffile.shaped_description_metadata(page.shaped_description)["shape"]
        return math.prod(shape) // (page.imagelength * page.imagewidth)
    return 0


def _check_grey(page: tifffile.TiffPage, source: str) -> None:
    """Refuse a page that is no image of one sample per pixel."""
    if page.samplesperpixel > 1:
        colour = "RGB" if page.samplesperpixel == 3 else "colour or transparency"
        raise VolumeError(
            f"{source}: has {page.samplesperpixel} samples per pixel ({colour}), expected grey values; convert it (Fiji: Image > Type > 8-bit)"
        )
    if page.imagedepth > 1:
        raise VolumeError(
            f"{source}: stores volumes as one page of depth {page.imagedepth}, expected a page per slice; {_REMEDY}"
        )
    if page.dtype is None:
        raise VolumeError(
            f"{source}: has {page.bitspersample} bits per sample of format {page.sampleformat}, expected 8, 16 or 32; {_REMEDY}"
        )


def _recorded_size(file: tifffile.TiffFile) -> RecordedSize | None:
    """Return the voxel size that a file records in the way of OME, ImageJ or this program's data."""
    if file.is_ome:
        return size_from_ome_xml(file.ome_metadata)
    page = file.pages.first
    metadata: Mapping[str, object] = {}
    if page.imagej_description is not None:
        metadata = tifffile.tifffile.imagej_description_metadata(page.imagej_description)
    elif page.shaped_description is not None:
        metadata = tifffile.tifffile.shaped_description_metadata(page.shaped_description)
    per_unit_y, per_unit_x = (_rational(page, name) for name in ("YResolution", "XResolution"))
    return size_from_named_nm(metadata.get("voxel_size_nm_zyx")) or size_from_imagej(metadata, (per_unit_y, per_unit_x))


def _rational(page: tifffile.TiffPage, name: str) -> float | None:
    """Return the value of a rational tag, None where it is absent or has no value."""
    numerator, denominator = page.tags.valueof(name, (0, 0))
    return numerator / denominator if denominator else None


def _describe(file: tifffile.TiffFile, page: tifffile.TiffPage) -> str:
    """Return the flavour, the compression and the layout of a file in a few words."""
    flavour = "OME" if file.is_ome else "ImageJ" if file.is_imagej else "plain"
    compression = "uncompressed" if page.compression == 1 else tifffile.COMPRESSION(page.compression).name.lower()
    words = [flavour, "BigTIFF" if file.is_bigtiff else "", compression, "tiled" if page.is_tiled else ""]
    return ", ".join(word for word in words if word)


def _decode_window(page: tifffile.TiffPage, window: Window) -> NDArray[np.generic]:
    """Decode only those strips or tiles of a page that meet a window."""
    image = np.zeros((window.height, window.width), page.dtype)
    columns = page.chunked[-1]
    height, width = page.chunks[-2:]
    wanted = [
        row * columns + column
        for row in range(window.y0 // height, -(-window.y1 // height))
        for column in range(window.x0 // width, -(-window.x1 // width))
    ]
    handle = page.parent.filehandle
    for index in wanted:
        handle.seek(page.dataoffsets[index])
        encoded = handle.read(page.databytecounts[index])
        decoded, place, _ = page.decode(encoded, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        samples, y, x = decoded[0, :, :, 0], place[2], place[3]
        y0, x0 = max(y, window.y0), max(x, window.x0)
        y1, x1 = min(y + samples.shape[0], window.y1), min(x + samples.shape[1], window.x1)
        image[y0 - window.y0 : y1 - window.y0, x0 - window.x0 : x1 - window.x0] = samples[
            y0 - y : y1 - y, x0 - x : x1 - x
        ]
    return image


@contextmanager
def _translated(path: Path, doing: str) -> Iterator[None]:
    """Turn the exceptions of tifffile and its codecs into errors that name the file, and keep its log off the screen.

    tifffile reports much of what it finds wrong through `logging`; what matters of that is checked here, and a line on the
    screen beside our own message would only confuse.
    """
    logger = logging.getLogger("tifffile")
    silence = logging.NullHandler()
    logger.addHandler(silence)
    try:
        yield
    except _FOREIGN_ERRORS as error:
        raise VolumeError(
            f"{path}: {doing} failed ({one_line(error)}); the file is damaged or of a kind not known here, {_REMEDY}"
        ) from error
    finally:
        logger.removeHandler(silence)
