"""ROI zips: opened with roifile, outlines have the area of the masks and lie on their slices."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import roifile
from hypothesis import given, settings
from mask_shapes import SLICE_HW, any_mask, encoded, letter_shapes, slice_of

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import RunLengths
from dendsam_deploy.volume.exported_masks import SliceMasks
from dendsam_deploy.volume.imagej_rois import make_roi, write_rois
from dendsam_deploy.volume.outlines import signed_area_px


def area_px(roi: roifile.ImagejRoi) -> float:
    return sum(signed_area_px(np.asarray(part)) for part in roi.coordinates(multi=True))


def test_areas_names_and_slices(tmp_path) -> None:
    path, shapes = tmp_path / "masks.zip", letter_shapes()
    found = slice_of(shapes)
    assert write_rois(path, [found]) == len(shapes)
    rois = roifile.roiread(path)
    assert [roi.name for roi in rois] == [f"z0003-{number:05d}" for number in found.ids]
    for roi, mask in zip(rois, shapes, strict=True):
        assert area_px(roi) == mask.sum()
        assert roi.position == 4
        rows, columns = np.nonzero(mask)
        assert (roi.left, roi.top, roi.right, roi.bottom) == (
            columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        )  # fmt: skip
    assert [roi.composite for roi in rois] == [False, False, True, True, False, False]


@settings(max_examples=40, deadline=None)
@given(any_mask())
def test_area_of_any_mask(mask) -> None:
    roi = roifile.ImagejRoi.frombytes(make_roi(encoded(mask), "a", 0).tobytes())
    assert area_px(roi) == mask.sum()


def test_an_object_in_two_masks_gets_two_names(tmp_path) -> None:
    shapes = [encoded(mask) for mask in letter_shapes()[:2]]
    write_rois(tmp_path / "a.zip", [SliceMasks(0, SLICE_HW, tuple(shapes), np.array([5, 5]), np.ones(2))])
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == ["z0000-00005.roi", "z0000-00005-2.roi"]


def test_equal_masks_give_equal_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        write_rois(tmp_path / f"{name}.zip", [slice_of(letter_shapes())])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_masks_beyond_the_reach_of_rois_are_refused(tmp_path) -> None:
    far = RunLengths.from_mask(np.ones((2, 2), bool), Window(0, 39000, 2, 2))
    wide = SliceMasks(0, (10, 40000), (far,), np.ones(1, np.int64), np.ones(1))
    with pytest.raises(InvalidArgumentError, match="reach 32767 px"):
        write_rois(tmp_path / "a.zip", [wide])
    assert not list(tmp_path.iterdir())


def test_masks_that_leave_the_slice_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="object 4 is empty or leaves"):
        SliceMasks(0, (6, 6), (encoded(letter_shapes()[0]),), np.array([4]), np.ones(1))
