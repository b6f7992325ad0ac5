"""Label volumes as TIFF, written in one pass. The home of tifffile, together with `tiff`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

import tifffile

from dendsam_deploy.volume.checks import decoded_size

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.volume.volume import LabelVolumeSpec

_CLASSIC_LIMIT = 2**32 - 2**25
"""Bytes of image data up to which a classic TIFF is written: its offsets have 32 bits, and directories need room."""

_STRIP_BYTES = 2**18
"""Uncompressed size of a strip: small enough that a window costs little, large enough to compress well."""


class TiffLabelSink:
    """Appends label slices to a TIFF file.

    uint8 and uint16 volumes below 4 GB get ImageJ's description, all others OME-XML: ImageJ has neither 32-bit integers
    nor BigTIFF. Pages are compressed with deflate, under which labels shrink ten to a hundred times. ImageJ reads
    compressed stacks page by page; only of uncompressed ones does it expect a single run of samples.

    Neither a date nor a unique identifier is written: equal labels give equal bytes.

    References
    ----------
    https://github.com/imagej/ImageJ, ``ij/io/TiffDecoder.java``, ``saveImageDescription``
    """

    def __init__(self, path: Path, spec: LabelVolumeSpec) -> None:
        self._spec = spec
        stack_bytes = decoded_size(spec.shape_zyx, spec.dtype)
        self._is_imagej = spec.dtype.itemsize <= 2 and stack_bytes < _CLASSIC_LIMIT
        self._writer = tifffile.TiffWriter(path, bigtiff=stack_bytes >= _CLASSIC_LIMIT)
        self._is_first = True

    def append(self, labels: NDArray[np.generic]) -> None:
        """Write the next slice, ``(Y, X)`` in the dtype of the file."""
        spec = self._spec
        describe = _imagej_description if self._is_imagej else _ome_xml
        resolution = None
        if self._is_imagej and spec.voxel_size_nm is not None:
            # A plain 1/1 would say "no resolution"; ImageJ spells a measured 1 like this.
            y, x = ((10**6, 10**6) if size == 1 else 1 / size for size in spec.voxel_size_nm[1:])
            resolution = (x, y)
        self._writer.write(
            labels,
            photometric="minisblack",
            compression="zlib",
            compressionargs={"level": 1},  # half the time of the default; labels shrink as well
            predictor=False,
            rowsperstrip=max(1, _STRIP_BYTES // (spec.shape_zyx[2] * spec.dtype.itemsize)),
            description=describe(spec) if self._is_first else None,
            resolution=resolution,
            resolutionunit=None if resolution is None else "NONE",
            software=False,
            metadata=None,
        )
        self._is_first = False

    def close(self) -> None:
        """Write what is outstanding and close the file."""
        self._writer.close()


def _imagej_description(spec: LabelVolumeSpec) -> str:
    """Return the description by which ImageJ knows a stack and its calibration."""
    depth = spec.shape_zyx[0]
    # Without "images": by that key ImageJ versions differ in whether they look for compressed slices in their pages.
    lines = ["ImageJ=1.54f", f"slices={depth}", "loop=false"]
    if spec.voxel_size_nm is not None:
        lines += ["unit=nm", f"spacing={spec.voxel_size_nm[0]!r}"]
    return "\n".join(lines) + "\n"


def _ome_xml(spec: LabelVolumeSpec) -> str:
    """Return minimal OME-XML for one stack whose planes are the pages of the file in order."""
    depth, height, width = spec.shape_zyx
    attributes = {
        "ID": "Pixels:0",
        "DimensionOrder": "XYZCT",
        "Type": spec.dtype.name,
        "SizeX": width,
        "SizeY": height,
        "SizeZ": depth,
        "SizeC": 1,
        "SizeT": 1,
    }
    if spec.voxel_size_nm is not None:
        for axis, size in zip("ZYX", spec.voxel_size_nm, strict=True):
            attributes |= {f"PhysicalSize{axis}": repr(size), f"PhysicalSize{axis}Unit": "nm"}
    pixels = " ".join(f"{name}={quoteattr(str(value))}" for name, value in attributes.items())
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0" Name="labels">'
        f'<Pixels {pixels}><Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
        f'<TiffData IFD="0" PlaneCount="{depth}"/></Pixels></Image></OME>'
    )
