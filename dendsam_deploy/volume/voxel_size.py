"""Voxel sizes as the formats spell them, in nanometres. What a file does not record is None, never a guess."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NM_PER_UNIT = {
    **dict.fromkeys(("pm", "picometer", "picometre"), 1e-3),
    **dict.fromkeys(("å", "angstrom", "ångström"), 0.1),
    **dict.fromkeys(("nm", "nanometer", "nanometre", "nanometers", "nanometres"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometre"), 1e3),
    **dict.fromkeys(("micrometers", "micrometres", "\\u00b5m", "\\u03bcm"), 1e3),
    **dict.fromkeys(("mm", "millimeter", "millimetre", "millimeters", "millimetres"), 1e6),
    **dict.fromkeys(("cm", "centimeter", "centimetre", "centimeters", "centimetres"), 1e7),
    **dict.fromkeys(("in", "inch", "inches"), 2.54e7),
    **dict.fromkeys(("m", "meter", "metre", "meters", "metres"), 1e9),
}


@dataclass(frozen=True, slots=True)
class RecordedSize:
    """What a file says about the size of its voxels, in nm; `z` is None where it records the size of pixels only."""

    z: float | None
    y: float
    x: float

    def as_zyx(self, slice_count: int) -> tuple[float, float, float] | None:
        """Return the size ``(z, y, x)`` of the voxels of a volume of so many slices, or None where it is incomplete.

        A single slice without a recorded thickness takes its row spacing instead: nothing is measured across slices
        there, and dropping the size of the pixels would lose what the file does record.
        """
        if self.z is None:
            return (self.y, self.y, self.x) if slice_count == 1 else None
        return self.z, self.y, self.x


def nm_per_unit(unit: object) -> float | None:
    r"""Return the length of a unit in nm, or None where the word is no unit of length (such as ``pixel``).

    Examples
    --------
    >>> nm_per_unit("micron"), nm_per_unit("\\u00B5m"), nm_per_unit("pixel")
    (1000.0, 1000.0, None)
    """
    return _NM_PER_UNIT.get(str(unit).strip().lower())


def size_from_imagej(
    metadata: Mapping[str, object], units_per_pixel_yx: tuple[float | None, float | None]
) -> RecordedSize | None:
    """Return the voxel size that ImageJ's description and the resolution tags of the first page tell together.

    ImageJ keeps pixels per unit in the tags, the unit and the spacing of slices in the description. The tags alone are
    no voxel size: every scanner and paint program writes dots per inch there.

    Parameters
    ----------
    metadata : mapping
        The ``key=value`` lines of the description: ``unit``, ``yunit``, ``zunit``, ``spacing``.
    units_per_pixel_yx : (float or None, float or None)
        Reciprocals of the vertical and horizontal resolution; None where the tag is absent.

    References
    ----------
    https://github.com/imagej/ImageJ, ``ij/io/FileSaver.java`` and ``ij/io/FileOpener.java``
    """
    unit = metadata.get("unit")
    scale_x = nm_per_unit(unit)
    scale_y = nm_per_unit(metadata.get("yunit", unit))
    scale_z = nm_per_unit(metadata.get("zunit", unit))
    y, x = (_length(scale, units) for scale, units in zip((scale_y, scale_x), units_per_pixel_yx, strict=True))
    if y is None or x is None:
        return None
    return RecordedSize(_length(scale_z, metadata.get("spacing")), y, x)


def size_from_ome_xml(text: str) -> RecordedSize | None:
    """Return the physical size in the first ``Pixels`` element of OME-XML; the unit is µm where none is given.

    Raises
    ------
    ValueError
        Not XML, or XML that declares entities.

    References
    ----------
    https://docs.openmicroscopy.org/ome-model
    """
    if "<!ENTITY" in text:
        raise ValueError("OME-XML that declares entities")
    root = ElementTree.fromstring(text)
    pixels = next((element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return None
    z, y, x = (
        _length(nm_per_unit(pixels.get(f"PhysicalSize{axis}Unit", "um")), pixels.get(f"PhysicalSize{axis}"))
        for axis in "ZYX"
    )
    return None if y is None or x is None else RecordedSize(z, y, x)


def size_from_named_nm(values: object) -> RecordedSize | None:
    """Return the size in an entry ``voxel_size_nm_zyx: [z, y, x]``, the way this program and its data name it."""
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        return None
    z, y, x = (_length(1.0, value) for value in values)
    return None if y is None or x is None else RecordedSize(z, y, x)


def size_from_scales(names: Sequence[str], units: Sequence[object], scales: Sequence[object]) -> RecordedSize | None:
    """Return the size that the axes and the scale of an OME-Zarr image tell together."""
    sizes = {name: _length(nm_per_unit(unit), scale) for name, unit, scale in zip(names, units, scales, strict=True)}
    y, x = sizes.get("y"), sizes.get("x")
    return None if y is None or x is None else RecordedSize(sizes.get("z"), y, x)


def check_voxel_size(voxel_size_nm: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
    """Return a voxel size given by the user unchanged, or say what is wrong with it."""
    if voxel_size_nm is not None and (
        len(voxel_size_nm) != 3 or not all(math.isfinite(size) and size > 0 for size in voxel_size_nm)
    ):
        raise InvalidArgumentError(
            f"the voxel size {voxel_size_nm} is not three positive lengths; give z, y, x in nm, such as 40,15,15"
        )
    return voxel_size_nm


def _length(scale: float | None, value: object) -> float | None:
    """Return a length in nm, or None where unit or number is absent, zero, negative or no number."""
    if scale is None or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        length = float(value) * scale
    except ValueError:
        return None
    return length if math.isfinite(length) and length > 0 else None
