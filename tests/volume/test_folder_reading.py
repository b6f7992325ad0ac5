"""Folders of slices: which files, in which order, and with what voxel size."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.geometry import Window
from dendsam_deploy.volume.folder import find_slices
from dendsam_deploy.volume.open import open_labels, open_volume

STACK = np.random.default_rng(1).integers(0, 255, (12, 30, 20), np.uint8)


def save(path, image, **options):
    if path.suffix.lower() == ".png":
        Image.fromarray(image).save(path)
    else:
        tifffile.imwrite(path, image, **options)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".TIF"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_slices_are_read_in_natural_order(suffix, dtype, tmp_path):
    stack = STACK.astype(dtype) * (1 if dtype == np.uint8 else 257)
    order = list(range(12))
    random.Random(0).shuffle(order)
    for z in order:
        save(tmp_path / f"cell2_z{z}{suffix}", stack[z])
    for junk in ("._cell2_z0.tif", ".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / junk).write_bytes(b"junk")
    (tmp_path / "masks").mkdir()
    with open_volume(tmp_path) as volume:
        assert volume.info.shape_zyx == (12, 30, 20)
        assert volume.info.dtype == dtype
        assert volume.info.format == "folder"
        for z in range(12):
            np.testing.assert_array_equal(volume.read(z), stack[z])
            np.testing.assert_array_equal(volume.read(z, Window(3, 4, 5, 6)), stack[z, 3:8, 4:10])


def test_single_png_is_one_slice(tmp_path):
    save(tmp_path / "image.png", STACK[0])
    with open_volume(tmp_path / "image.png", (40, 10, 10)) as volume:
        assert volume.info.shape_zyx == (1, 30, 20)
        assert volume.info.format == "png"
        assert volume.info.voxel_size_nm == (40, 10, 10)
        np.testing.assert_array_equal(volume.read(0), STACK[0])


def test_bilevel_png_is_a_mask(tmp_path):
    Image.fromarray(STACK[0] > 100).save(tmp_path / "mask.png")
    with open_labels(tmp_path / "mask.png") as volume:
        np.testing.assert_array_equal(volume.read(0), STACK[0] > 100)


def test_png_is_known_by_content_and_not_by_name(tmp_path):
    Image.fromarray(STACK[0]).save(tmp_path / "image.tif", format="PNG")
    with open_volume(tmp_path / "image.tif") as volume:
        np.testing.assert_array_equal(volume.read(0), STACK[0])


ACCEPTED = {
    "from any number": ["s7.png", "s8.png", "s9.png", "s10.png"],
    "in tens": ["s0.png", "s10.png", "s20.png"],
    "one file": ["only.png"],
    "two counters": ["b1_s1.png", "b1_s2.png", "b2_s1.png"],
    "a position beside the counter": ["s1_z0.png", "s2_z15.png", "s3_z33.png"],
    "constant numbers beside the counter": ["em2024_z1_r4.png", "em2024_z2_r4.png"],
    "no numbers": ["apical.png", "basal.png"],
    "capitals": ["S1.png", "s2.PNG", "S3.png"],
    "very long numbers": ["s20240101000000000001.png", "s20240101000000000002.png"],
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_numbering_without_gaps_is_accepted(case, tmp_path):
    for name in ACCEPTED[case]:
        (tmp_path / name).touch()
    assert [file.name for file in find_slices(tmp_path)] == ACCEPTED[case]


@given(st.sets(st.integers(0, 60), min_size=2, max_size=12), st.integers(1, 4))
@settings(deadline=None, max_examples=80)
def test_a_gap_is_found_wherever_it_is(tmp_path_factory, numbers, digits):
    folder = tmp_path_factory.mktemp("folder")
    for number in numbers:
        (folder / f"s{number:0{digits}d}.png").touch()
    ordered = sorted(numbers)
    steps = {b - a for a, b in itertools.pairwise(ordered)}
    if len(steps) == 1:
        assert [int(file.stem[1:]) for file in find_slices(folder)] == ordered
    else:
        with pytest.raises(VolumeError, match="is missing between"):
            find_slices(folder)


def test_voxel_size_comes_from_the_slices_only_where_they_record_all_of_it(tmp_path):
    metadata = {"unit": "nm", "spacing": 50.0}
    for name, with_spacing in (("whole", True), ("pixels_only", False)):
        (tmp_path / name).mkdir()
        for z in range(3):
            options = metadata if with_spacing else {"unit": "nm"}
            save(tmp_path / name / f"{z}.tif", STACK[z], imagej=True, resolution=(0.25, 0.2), metadata=options)
    with open_volume(tmp_path / "whole") as volume:
        assert volume.info.voxel_size_nm == pytest.approx((50, 5, 4))
    with open_volume(tmp_path / "pixels_only") as volume:
        assert volume.info.voxel_size_nm is None


def test_slice_that_disappears_or_changes_later_is_named(tmp_path):
    for z in range(3):
        save(tmp_path / f"{z}.png", STACK[z])
    with open_volume(tmp_path) as volume:
        (tmp_path / "1.png").unlink()
        save(tmp_path / "2.png", STACK[2, :10])
        with pytest.raises(VolumeError, match=r"1\.png: slice 1 has disappeared"):
            volume.read(1)
        with pytest.raises(VolumeError, match=r"2\.png: has changed"):
            volume.read(2)
