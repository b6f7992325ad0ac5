"""Voxel sizes as ImageJ, OME and this project's data record them, and what must not pass for one."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import tifffile

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.volume import voxel_size
from dendsam_deploy.volume.open import open_volume
from dendsam_deploy.volume.voxel_size import nm_per_unit, size_from_ome_xml

STACK = np.zeros((4, 6, 5), np.uint8)


def size_of(path, **options):
    data = options.pop("data", STACK)
    tifffile.imwrite(path, data, photometric="minisblack", **options)
    with open_volume(path) as volume:
        return volume.info.voxel_size_nm


def test_examples_in_the_docstrings():
    assert doctest.testmod(voxel_size).failed == 0


@pytest.mark.parametrize(
    ("unit", "nm"),
    [
        *[(word, 1.0) for word in ("nm", "nanometer", "nanometre", "NM", " nm ")],
        *[(word, 1000.0) for word in ("um", "µm", "μm", "micron", "microns", "micrometer", "\\u00B5m", "Micron")],
        *[("mm", 1e6), ("cm", 1e7), ("inch", 2.54e7), ("m", 1e9), ("Å", 0.1), ("angstrom", 0.1), ("pm", 1e-3)],
        *[(word, None) for word in ("pixel", "pixels", "", "reference frame", None, 3, "sec")],
    ],
)
def test_spellings_of_units(unit, nm):
    assert nm_per_unit(unit) == nm


@pytest.mark.parametrize(("unit", "scale"), [("nm", 1), ("um", 1000), ("micron", 1000), ("\\u00B5m", 1000)])
def test_imagej(unit, scale, tmp_path):
    size = size_of(
        tmp_path / "v.tif",
        imagej=True,
        resolution=(scale / 8, scale / 10),
        metadata={"axes": "ZYX", "unit": unit, "spacing": 40 / scale},
    )
    assert size == pytest.approx((40, 10, 8))


IMAGEJ_WITHOUT_SIZE = {
    "no unit": {"resolution": (0.1, 0.1), "metadata": {"axes": "ZYX", "spacing": 40}},
    "unit is pixel": {"resolution": (1, 1), "metadata": {"axes": "ZYX", "unit": "pixel", "spacing": 1}},
    "no resolution": {"metadata": {"axes": "ZYX", "unit": "nm", "spacing": 40}},
    "no spacing": {"resolution": (0.1, 0.1), "metadata": {"axes": "ZYX", "unit": "nm"}},
    "spacing of zero": {"resolution": (0.1, 0.1), "metadata": {"axes": "ZYX", "unit": "nm", "spacing": 0}},
}


@pytest.mark.parametrize("case", IMAGEJ_WITHOUT_SIZE)
def test_imagej_without_a_whole_size_has_none(case, tmp_path):
    assert size_of(tmp_path / "v.tif", imagej=True, **IMAGEJ_WITHOUT_SIZE[case]) is None


def test_single_slice_keeps_the_size_of_its_pixels(tmp_path):
    size = size_of(tmp_path / "v.tif", data=STACK[0], imagej=True, resolution=(0.125, 0.1), metadata={"unit": "nm"})
    assert size == pytest.approx((10, 10, 8))


@pytest.mark.parametrize("unit", ["INCH", "CENTIMETER", "NONE"])
def test_resolution_tags_alone_are_no_voxel_size(unit, tmp_path):
    assert size_of(tmp_path / "v.tif", resolution=(72, 72), resolutionunit=unit) is None


def test_entry_that_names_its_own_unit(tmp_path):
    assert size_of(tmp_path / "v.tif", metadata={"axes": "ZYX", "voxel_size_nm_zyx": [50, 4, 4]}) == (50, 4, 4)
    assert size_of(tmp_path / "v.tif", metadata={"axes": "ZYX", "voxel_size_nm_zyx": [50, 4]}) is None
    assert size_of(tmp_path / "v.tif", metadata={"axes": "ZYX", "voxel_size_nm_zyx": [50, -4, 4]}) is None


def test_ome_in_several_units(tmp_path):
    metadata = {
        "axes": "ZYX",
        **{"PhysicalSizeZ": 0.04, "PhysicalSizeY": 100, "PhysicalSizeX": 8},
        **{"PhysicalSizeZUnit": "µm", "PhysicalSizeYUnit": "Å", "PhysicalSizeXUnit": "nm"},
    }
    assert size_of(tmp_path / "v.ome.tif", metadata=metadata) == pytest.approx((40, 10, 8))


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('PhysicalSizeX="0.008" PhysicalSizeY="0.01" PhysicalSizeZ="0.04"', (40, 10, 8)),
        ('PhysicalSizeX="8" PhysicalSizeY="10" PhysicalSizeXUnit="nm" PhysicalSizeYUnit="nm"', None),
        ('PhysicalSizeX="1" PhysicalSizeY="1" PhysicalSizeZ="1" PhysicalSizeXUnit="pixel"', None),
        ('PhysicalSizeX="INF" PhysicalSizeY="1" PhysicalSizeZ="1"', None),
        ('PhysicalSizeX="many" PhysicalSizeY="1" PhysicalSizeZ="1"', None),
        ("", None),
    ],
)
def test_ome_xml(attributes, expected):
    xml = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels {attributes}/></Image></OME>'
    size = size_from_ome_xml(xml)
    assert (size and size.as_zyx(7)) == (expected and pytest.approx(expected))


def test_ome_xml_that_declares_entities_is_refused():
    with pytest.raises(ValueError, match="entities"):
        size_from_ome_xml('<!DOCTYPE a [<!ENTITY b "bbbb">]><OME>&b;</OME>')


def test_size_given_by_the_user_wins(tmp_path):
    tifffile.imwrite(tmp_path / "v.tif", STACK, metadata={"voxel_size_nm_zyx": [50, 4, 4]}, photometric="minisblack")
    with open_volume(tmp_path / "v.tif", (30.0, 5.0, 5.0)) as volume:
        assert volume.info.voxel_size_nm == (30.0, 5.0, 5.0)


@pytest.mark.parametrize("size", [(0, 1, 1), (-1, 1, 1), (1, 1, float("nan")), (1, 1, float("inf")), (1, 1)])
def test_impossible_size_is_refused(size, tmp_path):
    with pytest.raises(InvalidArgumentError, match="z, y, x in nm"):
        open_volume(tmp_path / "v.tif", size)
