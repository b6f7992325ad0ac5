"""Masks as ROIs of ImageJ and Fiji. The home of roifile."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from roifile import ROI_TYPE, ImagejRoi

from dendsam_deploy.durable import published
from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.volume.outlines import trace_outlines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.instances import RunLengths
    from dendsam_deploy.volume.exported_masks import SliceMasks

LONGEST_SIDE_PX = 32767
"""Bounds of a ROI are signed 16-bit numbers."""

_MOVE, _LINE, _CLOSE = 0.0, 1.0, 4.0
"""Commands of a path: java.awt.geom.PathIterator."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time stamp of the members, so that equal masks give equal files."""


@dataclass(frozen=True, slots=True)
class NamedMask:
    """A mask of slice `z` that has pixels, under the name that the ROI Manager is to show."""

    name: str
    z: int
    mask: RunLengths


def write_rois(path: Path, slices: Iterable[SliceMasks]) -> int:
    """Write masks as a zip that the ROI Manager opens, whole or not at all.

    A ROI runs along the edges of the pixels, on whole numbers, so ImageJ selects exactly the pixels of the mask and
    measures its area. One with several pieces or with holes is a composite ROI. It lies on the slice ``z + 1`` of the
    stack, as ImageJ counts, and is called ``z<z>-<id>`` with our ``z``; further masks of one object get ``-2`` and so
    on behind that.

    Parameters
    ----------
    path : Path
        File to write.
    slices : iterable of SliceMasks
        What is written.

    Returns
    -------
    int
        Number of ROIs.

    Raises
    ------
    InvalidArgumentError
        A mask lies farther out than ImageJ's ROIs reach.
    StorageError
        Where the file system refuses.

    References
    ----------
    https://github.com/imagej/ImageJ, ``ij/io/RoiEncoder.java``
    """
    return write_named_rois(path, (mask for found in slices for mask in _named(found)))


def write_named_rois(path: Path, masks: Iterable[NamedMask]) -> int:
    """Write masks, which have different names, in the order in which they come; see `write_rois`."""
    count = 0
    with published(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for named in masks:
            if max(named.mask.window.y1, named.mask.window.x1) > LONGEST_SIDE_PX:
                raise InvalidArgumentError(
                    f"{named.name}: a mask at {named.mask.window}: the ROIs of ImageJ reach {LONGEST_SIDE_PX} px; "
                    "choose another format"
                )
            roi = make_roi(named.mask, named.name, named.z)
            archive.writestr(zipfile.ZipInfo(f"{named.name}.roi", _EPOCH), roi.tobytes(), zipfile.ZIP_DEFLATED)
            count += 1
    return count


def _named(found: SliceMasks) -> Iterator[NamedMask]:
    """Name the masks of a slice after their objects."""
    times: dict[int, int] = {}
    for mask, number in zip(found.masks, found.ids.tolist(), strict=True):
        times[number] = times.get(number, 0) + 1
        again = f"-{times[number]}" if times[number] > 1 else ""
        yield NamedMask(f"z{found.z:04d}-{number:05d}{again}", found.z, mask)


def make_roi(mask: RunLengths, name: str, z: int) -> ImagejRoi:
    """Return a mask, which has pixels, as a polygon or, with holes or several pieces, as a composite ROI."""
    outlines = trace_outlines(mask)
    if len(outlines) == 1:
        roi = ImagejRoi.frompoints(outlines[0].astype(np.int32), name=name, position=z)
        # Corners of pixels, as the wand of ImageJ makes them.
        roi.roitype = ROI_TYPE.TRACED
    else:
        roi = ImagejRoi()
        roi.name, roi.position, roi.roitype = name, z + 1, ROI_TYPE.RECT
        roi.multi_coordinates = _path(outlines)
        roi.shape_roi_size = len(roi.multi_coordinates)
    corners = np.concatenate(outlines)
    (roi.left, roi.top), (roi.right, roi.bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return roi


def _path(outlines: list[NDArray[np.int64]]) -> NDArray[np.float32]:
    """Return polygons as commands, each followed by its point."""
    commands: list[float] = []
    for outline in outlines:
        for index, (x, y) in enumerate(outline.tolist()):
            commands += [_LINE if index else _MOVE, x, y]
        commands.append(_CLOSE)
    return np.array(commands, np.float32)
