"""Labels of a run are found by its folder and compared with the slices that they show."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.evaluate.score_report import EvaluateOptions
from dendsam_deploy.evaluate.scores import evaluate_labels
from dendsam_deploy.evaluate.segmentation import find_segmentation


@pytest.fixture
def truth(tmp_path):
    labels = np.random.default_rng(0).integers(0, 5, (10, 8, 9)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "truth.tif", labels, photometric="minisblack")
    return labels


@pytest.fixture
def run(tmp_path, truth):
    """The folder of a run over slices 4 to 6 that found the truth exactly."""
    folder = tmp_path / "run"
    folder.mkdir()
    tifffile.imwrite(folder / "labels.tif", truth[4:7], photometric="minisblack")
    record = {"z_offset": 4, "outputs": {"labels.tif": 1, "detections.csv": 1}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_partial_run_is_compared_with_its_own_slices(run, given):
    path = run if given == "folder" else run / "labels.tif"
    report = evaluate_labels(path, run.parent / "truth.tif")
    assert [row.z for row in report.per_slice] == [4, 5, 6]
    assert report.volume.objects.pq == 1


def test_a_run_over_the_first_slices_is_compared_with_those(run, truth):
    tifffile.imwrite(run / "labels.tif", truth[:3], photometric="minisblack")
    (run / "run.json").write_text(json.dumps({"z_offset": 0, "outputs": {"labels.tif": 1}}))
    report = evaluate_labels(run, run.parent / "truth.tif")
    assert [row.z for row in report.per_slice] == [0, 1, 2]
    assert report.volume.objects.pq == 1


def test_slices_are_counted_in_the_truth(run):
    report = evaluate_labels(run, run.parent / "truth.tif", EvaluateOptions(slices=range(5, 7)))
    assert [row.z for row in report.per_slice] == [5, 6]


def test_a_stated_first_slice_overrides_the_record(run):
    report = evaluate_labels(run, run.parent / "truth.tif", EvaluateOptions(first_slice=0))
    assert [row.z for row in report.per_slice] == [0, 1, 2]
    assert report.volume.objects.pq < 1


def test_labels_that_run_past_the_truth_are_refused(run):
    with pytest.raises(VolumeError, match=r"3 x 8 x 9 voxels .* from slice 8 on, but .*truth.tif has 10 x 8 x 9"):
        evaluate_labels(run, run.parent / "truth.tif", EvaluateOptions(first_slice=8))


def test_other_files_beside_a_record_are_taken_as_they_are(run):
    assert find_segmentation(run / "other.tif").first_slice is None


def test_a_damaged_record_is_named(run):
    (run / "run.json").write_text("{")
    with pytest.raises(VolumeError, match=r"run.json: the record of the run is damaged"):
        find_segmentation(run)


def test_a_run_without_labels_is_named(run):
    (run / "run.json").write_text(json.dumps({"z_offset": 0, "outputs": {}}))
    with pytest.raises(VolumeError, match="has no labels"):
        find_segmentation(run)


@pytest.mark.parametrize("content", ['{"name": "my experiment"}', "[1]", "not JSON"])
def test_a_record_of_some_other_program_says_nothing_about_labels_beside_it(run, content):
    (run / "run.json").write_text(content)
    assert find_segmentation(run / "labels.tif").first_slice is None
