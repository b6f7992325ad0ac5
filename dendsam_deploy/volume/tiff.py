"""TIFF stacks, one plane at a time. The home of tifffile, together with `tiff_pages` and `tiff_labels`."""

from __future__ import annotations

import json
import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import tifffile

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.volume.checks import check_expansion, check_read, check_shape, decoded_size, translated
from dendsam_deploy.volume.tiff_pages import (
    REMEDY,
    PlaneRun,
    check_page_chain,
    find_planes,
    page_at,
    stored_dtype,
)
from dendsam_deploy.volume.volume import VolumeInfo
from dendsam_deploy.volume.voxel_size import (
    RecordedSize,
    size_from_imagej,
    size_from_named_nm,
    size_from_ome_xml,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window


class TiffReader:
    """A TIFF stack that is open for reading; see `VolumeReader`.

    A file is a volume if all its full-size pages are grey, of one size and one type, and if no axis but z is longer
    than one.

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
        with _translated(path, "opening it"):
            check_page_chain(path)
            self._file = tifffile.TiffFile(path)
        try:
            with _translated(path, "reading its directory"):
                self._planes = find_planes(self._file, path)
                first = page_at(self._file, 0 if isinstance(self._planes, PlaneRun) else self._planes[0])
                depth = self._planes.count if isinstance(self._planes, PlaneRun) else len(self._planes)
                self.recorded_size = _recorded_size(self._file)
                recorded_nm = None if self.recorded_size is None else self.recorded_size.as_zyx(depth)
                self.info = VolumeInfo(
                    shape_zyx=(depth, first.imagelength, first.imagewidth),
                    dtype=np.dtype(first.dtype),
                    voxel_size_nm=voxel_size_nm or recorded_nm,
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
        with _translated(self._path, f"decoding slice {z}"):
            if isinstance(self._planes, PlaneRun):
                offset = self._planes.offset + z * decoded_size(self.info.shape_zyx[1:], self.info.dtype)
                return self._read_rows(offset, self._planes.dtype, window)
            page = page_at(self._file, self._planes[z])
            self._check_data(page, z)
            if page.is_contiguous:
                return self._read_rows(page.dataoffsets[0], stored_dtype(page), window)
            if (window.height, window.width) == self.info.shape_zyx[1:]:
                return page.asarray().reshape(window.height, window.width)
            return _decode_window(page, window)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _read_rows(self, offset: int, stored: np.dtype[np.generic], window: Window) -> NDArray[np.generic]:
        """Read the rows of a window from uncompressed samples of a plane that begins at `offset`."""
        width = self.info.shape_zyx[2]
        handle = self._file.filehandle
        handle.seek(offset + window.y0 * width * stored.itemsize)
        rows = handle.read_array(stored, window.height * width).reshape(window.height, width)
        return np.ascontiguousarray(rows[:, window.x0 : window.x1], dtype=self.info.dtype)

    def _check_planes(self) -> None:
        """Check every plane now: what is wrong with slice 900 should not appear after an hour of work."""
        check_shape(self.info.source, self.info.shape_zyx, self.info.dtype)
        if isinstance(self._planes, PlaneRun):
            end = self._planes.offset + decoded_size(self.info.shape_zyx, self.info.dtype)
            self._check_end(end, self._planes.count - 1)
            return
        for z, index in enumerate(self._planes):
            self._check_data(page_at(self._file, index), z)

    def _check_data(self, page: tifffile.TiffPage, z: int) -> None:
        """Check that the samples of one plane are recorded completely and lie inside the file."""
        source = self.info.source
        count = math.prod(page.chunked)
        offsets, sizes = page.dataoffsets[:count], page.databytecounts[:count]
        stored_bytes = sum(sizes)
        lacks_samples = page.is_contiguous and stored_bytes < page.nbytes
        if min(len(offsets), len(sizes)) < count or not all(sizes) or lacks_samples:
            raise VolumeError(
                f"{source}: slice {z} lacks image data, {stored_bytes:,} bytes in {len(offsets)} of {count} strips or "
                "tiles are recorded; copy or export the file again"
            )
        self._check_end(max(offset + size for offset, size in zip(offsets, sizes, strict=True)), z)
        check_expansion(source, page.nbytes, stored_bytes)

    def _check_end(self, end: int, z: int) -> None:
        """Raise if the data of slice `z` reach beyond the end of the file."""
        size = self._file.filehandle.size
        if end > size:
            raise VolumeError(
                f"{self.info.source}: is cut: slice {z} ends at byte {end:,}, the file at {size:,}; "
                "copy it again from its source"
            )


def _decode_window(page: tifffile.TiffPage, window: Window) -> NDArray[np.generic]:
    """Decode only those strips or tiles of a page that meet a window."""
    image = np.zeros((window.height, window.width), page.dtype)
    per_row = page.chunked[-1]
    height, width = page.chunks[-2:]
    handle = page.parent.filehandle
    for row in range(window.y0 // height, -(-window.y1 // height)):
        for column in range(window.x0 // width, -(-window.x1 // width)):
            index = row * per_row + column
            handle.seek(page.dataoffsets[index])
            encoded = handle.read(page.databytecounts[index])
            decoded, _, _ = page.decode(encoded, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
            samples, y, x = np.asarray(decoded)[0, :, :, 0], row * height, column * width
            y0, x0 = max(y, window.y0), max(x, window.x0)
            y1, x1 = min(y + samples.shape[0], window.y1), min(x + samples.shape[1], window.x1)
            part = samples[y0 - y : y1 - y, x0 - x : x1 - x]
            image[y0 - window.y0 : y1 - window.y0, x0 - window.x0 : x1 - window.x0] = part
    return image


def _recorded_size(file: tifffile.TiffFile) -> RecordedSize | None:
    """Return the voxel size that a file records in the way of OME, of ImageJ or of this program's data."""
    if file.is_ome:
        return size_from_ome_xml(file.ome_metadata or "")
    page = page_at(file, 0)
    metadata: Mapping[str, object] = file.imagej_metadata or {}
    if page.shaped_description is not None and page.shaped_description.startswith("{"):
        metadata = json.loads(page.shaped_description)
    units_yx = _units_per_pixel(page, "YResolution"), _units_per_pixel(page, "XResolution")
    return size_from_named_nm(metadata.get("voxel_size_nm_zyx")) or size_from_imagej(metadata, units_yx)


def _units_per_pixel(page: tifffile.TiffPage, name: str) -> float | None:
    """Return the reciprocal of a resolution tag, None where it is absent, zero or a placeholder.

    The tag is mandatory in TIFF. tifffile writes 1/1 where it is told no resolution; ImageJ writes a measured 1 in
    millionths.
    """
    numerator, denominator = page.tags.valueof(name, (0, 0))
    return None if numerator == 0 or numerator == denominator == 1 else denominator / numerator


def _describe(file: tifffile.TiffFile, page: tifffile.TiffPage) -> str:
    """Return the flavour, the compression and the layout of a file in a few words."""
    flavour = "OME" if file.is_ome else "ImageJ" if file.is_imagej else "plain"
    compression = "uncompressed" if page.compression == 1 else tifffile.COMPRESSION(page.compression).name.lower()
    words = [flavour, "BigTIFF" if file.is_bigtiff else "", compression, "tiled" if page.is_tiled else ""]
    return ", ".join(word for word in words if word)


@contextmanager
def _translated(path: Path, doing: str) -> Iterator[None]:
    """Translate exceptions, and keep tifffile's log off the screen.

    tifffile reports much of what it finds wrong through `logging`. What matters of that is checked here; a line on the
    screen beside our own message would only confuse.
    """
    logger = logging.getLogger("tifffile")
    silence = logging.NullHandler()
    logger.addHandler(silence)
    try:
        with translated(str(path), doing, REMEDY):
            yield
    finally:
        logger.removeHandler(silence)
