"""The page of an evaluation."""

import csv
import io

import numpy as np
import pytest
import tifffile
from pages import Page, assert_self_contained
from PIL import Image

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.score_report import EvaluateOptions
from dendsam_deploy.evaluate.scores import evaluate_labels
from dendsam_deploy.report.score_tables import csv_text, write_score_tables
from dendsam_deploy.report.scores_report import interval_text, render_scores_report, size_text, write_scores_report
from dendsam_deploy.report.worst_objects import SEGMENT_COLOUR, TRUTH_COLOUR, draw_worst_objects, worst_objects


@pytest.fixture
def volumes(tmp_path):
    """Two objects through three slices; in slice 1 the second one is missed, in slice 2 it is cut."""
    truth = np.zeros((3, 20, 30), np.uint8)
    truth[:, 2:10, 2:12], truth[:, 12:18, 14:28] = 1, 2
    labels = truth.copy()
    labels[1][labels[1] == 2] = 0
    labels[2, 12:18, 20:28] = 7
    for name, volume in (("truth", truth), ("labels <1>", labels)):
        tifffile.imwrite(tmp_path / f"{name}.tif", volume, photometric="minisblack")
    return tmp_path / "labels <1>.tif", tmp_path / "truth.tif"


def test_the_page_shows_the_scores(volumes, tmp_path):
    report = evaluate_labels(*volumes)
    write_scores_report(tmp_path / "scores.html", report)
    page = Page((tmp_path / "scores.html").read_text())
    assert_self_contained(page)
    assert "Scores of labels <1>.tif" in page.text
    assert f"{report.slices.pq:.3f} PQ, mean over slices" in page.text
    between = " ".join(f"pq {report.volume.objects.pq:.4f} {interval_text(report.intervals.volume['pq'])}".split())
    assert f"{between} {report.slices.pq:.4f} {interval_text(report.intervals.slices['pq'])}" in page.text
    split = interval_text(report.intervals.volume["vi_split"])
    assert f"vi_split {report.volume.partition.vi_split:.4f} {split} variation of information" in page.text
    bare = Page(render_scores_report(evaluate_labels(*volumes, EvaluateOptions(resamples=0))))
    assert f"pq {report.volume.objects.pq:.4f} {report.slices.pq:.4f}" in bare.text
    assert "95 %" not in bare.text


def test_the_worst_come_first(volumes):
    text = Page(render_scores_report(evaluate_labels(*volumes))).text
    worst = text[text.index("Slices with the lowest PQ") :]
    order = [row.z for row in sorted(evaluate_labels(*volumes).per_slice, key=lambda row: row.scores.pq)]
    assert order[0] in (1, 2)
    assert f"segments {order[0]} " in worst
    assert "IoU below 0.5 (1 in all)" in worst


def test_what_was_left_out_is_said(volumes):
    options = EvaluateOptions(sparse_truth=True, as_2d=True, ignore_labels=(1, 9), slices=range(1))
    page = Page(render_scores_report(evaluate_labels(*volumes, options)))
    for words in ("The truth is sparse", "Labels hold for one slice only", "labels 1, 9", "1 slice "):
        assert words in page.text
    assert "Along z" not in page.text


def micrographs(folder, truth):
    path = folder / "raw.tif"
    tifffile.imwrite(path, (120 + 40 * (tifffile.imread(truth) > 0)).astype(np.uint8), photometric="minisblack")
    return path


def test_the_worst_objects_are_those_that_cost_most(volumes):
    rows = worst_objects(evaluate_labels(*volumes))
    assert [row.truth_id for row in rows] == [2], "object 1 is perfect"
    assert rows[0].shown_z == 0, "all of its profiles are equally large: the first one"
    pooled = worst_objects(evaluate_labels(*volumes, EvaluateOptions(as_2d=True)))
    assert [(row.shown_z, row.truth_id) for row in pooled] == [(1, 2), (2, 2)]


def test_one_dendrite_does_not_fill_the_page(volumes):
    """Object 2 is missed and cut, object 1 loses a pixel: of two pictures one is of object 1."""
    labels = tifffile.imread(volumes[0])
    labels[0, 2, 2] = 0
    tifffile.imwrite(volumes[0], labels, photometric="minisblack")
    rows = worst_objects(evaluate_labels(*volumes, EvaluateOptions(as_2d=True)), 2)
    assert [(row.shown_z, row.truth_id) for row in rows] == [(1, 2), (0, 1)]


def test_pictures_show_both_outlines_on_the_micrograph(volumes, tmp_path):
    labels, truth = volumes
    report = evaluate_labels(labels, truth, EvaluateOptions(as_2d=True))
    pictures = draw_worst_objects(report, micrographs(tmp_path, truth), truth, labels)
    missed, cut = (np.asarray(Image.open(io.BytesIO(picture.png))) for picture in pictures)
    for image, is_found in ((missed, False), (cut, True)):
        assert (image == TRUTH_COLOUR).all(axis=2).any()
        assert (image == SEGMENT_COLOUR).all(axis=2).any() == is_found
        assert (image == 120).all(axis=2).any(), "the tissue around it is seen"
    page = Page(render_scores_report(report, pictures))
    assert_self_contained(page)
    assert "The worst objects" in page.text
    assert "object 2, z 1" in page.text
    assert page.tags.count("img") == 2


def test_a_volume_of_another_shape_is_refused(volumes, tmp_path):
    labels, truth = volumes
    tifffile.imwrite(tmp_path / "other.tif", np.zeros((3, 20, 31), np.uint8), photometric="minisblack")
    with pytest.raises(VolumeError, match=r"other\.tif: 3 x 20 x 31 voxels .* the truth has 3 x 20 x 30"):
        draw_worst_objects(evaluate_labels(labels, truth), tmp_path / "other.tif", truth, labels)


TABLES = ("scores.csv", "per_slice.csv", "per_object.csv", "accuracy.csv", "size_classes.csv")


def test_tables_hold_the_numbers_of_the_report(volumes, tmp_path):
    report = evaluate_labels(*volumes)
    files = write_score_tables(tmp_path / "tables", report)
    assert [path.name for path in files] == list(TABLES)
    scores, slices, objects, accuracy, classes = (list(csv.DictReader(path.read_text().splitlines())) for path in files)
    pq = next(row for row in scores if row["score"] == "pq")
    assert float(pq["volume"]) == report.volume.objects.pq
    assert (float(pq["slices_low"]), float(pq["slices_high"])) == report.intervals.slices["pq"]
    assert next(row for row in scores if row["score"] == "vi_split")["slices"] == ""
    assert [int(row["z"]) for row in slices] == [0, 1, 2]
    assert [float(row["iou_threshold"]) for row in accuracy] == [step / 20 for step in range(2, 20)]
    assert float(accuracy[8]["slices"]) == pytest.approx(report.slices.sa50)
    assert [float(row["iou"]) for row in objects] == [row.iou for row in report.per_object]
    assert {row["of"] for row in classes} == {"slices", "volume"}


def test_a_file_is_no_folder_for_tables(volumes, tmp_path):
    with pytest.raises(InvalidArgumentError, match="is a file"):
        write_score_tables(volumes[0], evaluate_labels(*volumes))
    assert csv_text([]) == "\n"


def test_sizes_are_said_in_px_and_where_they_are_known_in_nm(volumes):
    small = evaluate_labels(*volumes).size_classes.slices[0]
    assert size_text(small, None, 2) == "below 84 px"
    assert size_text(small, (40, 10, 10), 2) == f"below 84 px (⌀ {2 * (8400 / np.pi) ** 0.5:.0f} nm)"
    page = Page(render_scores_report(evaluate_labels(*volumes, EvaluateOptions(voxel_size_nm=(40, 10, 10)))))
    assert "⌀ 103 nm" in page.text
