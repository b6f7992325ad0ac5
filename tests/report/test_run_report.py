"""The page of a run, from folders that the pipeline wrote."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from pages import FIRST_Z, STOP_Z, VOXEL_NM, Page, assert_self_contained, pixels

from dendsam_deploy.errors import DendsamError, IncompleteRunError, InputFileError
from dendsam_deploy.report.overlays import Picture
from dendsam_deploy.report.run_folder import read_run, report_from_run, slices_to_show
from dendsam_deploy.report.run_report import render_run_report, scale_bar
from dendsam_deploy.volume.open import open_labels, open_volume


def report_of(folder, stack):
    with open_volume(stack) as raw:
        return read_run(folder, raw)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_holds_what_the_run_wrote(run_folder, stack):
    report = report_of(run_folder, stack)
    result = json.loads((run_folder / "run.json").read_text())["result"]
    detections, instances = table(run_folder / "detections.csv"), table(run_folder / "instances.csv")
    assert len(report.profiles) == result["objects_2d"] == len(detections) == 15
    assert len(report.objects) == result["objects_3d"] == len(instances) == 3
    assert report.profiles.z.tolist() == [int(row["z"]) for row in detections]
    assert report.profiles.object_id.tolist() == [int(row["id"]) for row in detections]
    assert report.profiles.area_px.tolist() == [float(row["area_px"]) for row in detections]
    assert report.profiles.link_confidence.tolist() == [float(row["link_confidence"]) for row in detections]
    assert report.objects.voxels.tolist() == [int(row["voxels"]) for row in instances]
    assert (report.shape_zyx, report.first_z) == ((STOP_Z - FIRST_Z, 96, 110), FIRST_Z)
    assert report.voxel_size_nm == VOXEL_NM
    assert report.limiting_stage == result["limiting_stage"]


def test_pictures_show_labels_over_their_own_slice(run_folder, stack):
    report = report_of(run_folder, stack)
    assert [picture.z for picture in report.pictures] == [2, 4, 5, 6]
    with open_volume(stack) as raw, open_labels(run_folder / "labels.tif") as labels:
        for picture in report.pictures:
            np.testing.assert_array_equal(pixels(picture.image_png), raw.read(picture.z))
            shown = pixels(picture.overlay_png)[..., 3] > 0
            np.testing.assert_array_equal(shown, labels.read(picture.z - FIRST_Z) > 0)


def test_the_page_is_self_contained_and_says_what_matters(run_folder, stack, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    with open_volume(stack) as raw:
        report_from_run(tmp_path / "run", raw)
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert_self_contained(page)
    assert len(page.ids) == len(set(page.ids))
    for words in ("Segmentation of CA1 <b>&.tif", "3 3-D objects", "15 2-D objects in 6 slices", "40 × 10 × 10 nm"):
        assert words in page.text
    for words in ("median area in a slice", "µm²", "µm³", "Slice 5 · 3 objects", "200 nm", "overlap-graph"):
        assert words in page.text
    assert "in pixels" not in page.text
    assert "<b>&" not in page.source  # the name of the file was escaped
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []


def test_the_same_run_gives_the_same_page(run_folder, stack):
    assert render_run_report(report_of(run_folder, stack)) == render_run_report(report_of(run_folder, stack))


def test_without_a_voxel_size_the_page_says_so(unscaled_run_folder, stack):
    page = Page(render_run_report(report_of(unscaled_run_folder, stack)))
    assert "sizes are in pixels" in page.text
    assert "µm" not in page.text
    assert "The voxel size is not recorded: sizes are in pixels; give it with --voxel-size Z,Y,X." in page.text


def test_one_slice_has_neither_curves_nor_links(unscaled_run_folder, stack):
    page = Page(render_run_report(report_of(unscaled_run_folder, stack)))
    assert "3 2-D objects in 1 slice " in page.text
    assert "Along z" not in page.text
    assert "Links between slices" not in page.text


def test_a_run_that_found_nothing(empty_run_folder, stack):
    page = Page(render_run_report(report_of(empty_run_folder, stack)))
    assert_self_contained(page)
    assert "Nothing was found in any slice." in page.text
    assert "Sizes" not in page.text
    assert "nan" not in page.text


def test_an_unproven_bundle_is_announced(run_folder, stack):
    report = dataclasses.replace(report_of(run_folder, stack), notices=("the bundle is unproven <here>",))
    page = Page(render_run_report(report))
    assert "The bundle is unproven <here>." in page.text
    assert page.source.index("unproven") < page.source.index("What it looks like")


def test_without_the_volume_the_labels_stand_alone(run_folder):
    report = read_run(run_folder, None)
    assert all(picture.image_png is None for picture in report.pictures)
    assert_self_contained(Page(render_run_report(report)))


def test_doubtful_links_are_listed_largest_first(run_folder, stack):
    report = report_of(run_folder, stack)
    confidence = np.ones(len(report.profiles))
    confidence[[1, 3, 5]] = 0.6, 0.79, 0.0
    area = np.arange(100.0, 100 + len(confidence))
    report = dataclasses.replace(
        report, profiles=dataclasses.replace(report.profiles, link_confidence=confidence, area_px=area)
    )
    text = Page(render_run_report(report)).text
    assert "1 of 15 objects found no partner in another slice, and for 2 the best link has a confidence" in text
    rows = text[text.index("Worth a look") :]
    assert rows.index("0.79") < rows.index("0.60")


@pytest.mark.parametrize(
    ("z", "depth", "shown"),
    [
        (np.arange(8), 8, [0, 2, 4, 6]),
        (np.array([], int), 8, [0, 2, 4, 6]),
        (np.array([3, 3, 3]), 100, [3]),
        (np.array([0]), 1, [0]),
        (np.array([10, 90]), 100, [10, 90]),
    ],
)
def test_slices_to_show_have_objects_and_are_spread(z, depth, shown):
    found = slices_to_show(z, depth)
    assert len(found) == len(shown)
    assert all(abs(a - b) <= 1 for a, b in zip(found, shown, strict=True))
    assert set(found) <= (set(z.tolist()) or set(range(depth)))


@pytest.mark.parametrize(
    ("pixel_nm", "reduction", "text", "width"),
    [(10, 1.0, "200 nm", 20), (10, 2.0, "500 nm", 25), (100, 1.0, "2 µm", 20), (4, 1.0, "100 nm", 25)],
)
def test_scale_bars_are_round_and_exact(pixel_nm, reduction, text, width):
    bar = scale_bar(Picture(0, 0, None, b"", 100, 80, reduction), (40.0, pixel_nm, pixel_nm))
    assert (bar.text, bar.width_px) == (text, pytest.approx(width))


def test_no_scale_bar_without_a_voxel_size():
    assert scale_bar(Picture(0, 0, None, b"", 100, 80, 1.0), None) is None


@pytest.mark.parametrize("missing", ["run.json", "detections.csv", "instances.csv", "labels.tif"])
def test_a_missing_file_is_named(run_folder, tmp_path, missing):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(IncompleteRunError, match=missing.removesuffix(".tif")):
        report_from_run(tmp_path / "run", None)
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b"{"),
        ("run.json", b"[]"),
        ("run.json", b'{"result": {}}'),
        ("detections.csv", b""),
        ("detections.csv", b"z,id\n1,2\n"),
        ("instances.csv", b"\xff\xfe"),
        ("labels.tif", b"II*\0"),
    ],
)
def test_a_damaged_file_gets_one_line(run_folder, tmp_path, name, content):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(InputFileError) as caught:
        report_from_run(tmp_path / "run", None)
    assert isinstance(caught.value, DendsamError)
    assert str(tmp_path / "run") in str(caught.value)
    assert "\n" not in str(caught.value)
