"""Scores of label volumes: what counts as what, in slices and across them."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import tifffile
from scored_arrays import ArrayReader, blocks, score

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.score_report import EvaluateOptions, ObjectRow
from dendsam_deploy.evaluate.scores import evaluate_labels, score_volumes
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.summary import score_objects, score_partition

OBJECT_KEYS = {"oce", "e_gs", "e_sg", "pq", "sq", "dq", "s_inst", "msa", "sa50", "sa75", "dice"}
VOLUME_KEYS = OBJECT_KEYS | {"vi_split", "vi_merge", "arand_error", "arand_precision", "arand_recall"}
COUNT_KEYS = {"truth_objects", "segments"}


def test_document_has_the_keys_of_the_contract():
    document = json.loads(score(blocks(1), blocks(2)).to_json())
    assert document["volume"].keys() == VOLUME_KEYS | COUNT_KEYS
    assert document["slices"].keys() == OBJECT_KEYS
    assert [row["z"] for row in document["per_slice"]] == list(range(8))
    assert all(row.keys() == OBJECT_KEYS | COUNT_KEYS | {"z"} for row in document["per_slice"])
    assert document["per_object"][0].keys() == {"z", "truth_id", "voxels", "segment_id", "iou", "shown_z"}
    assert document["options"] == {
        "slices": None,
        "ignore_labels": [],
        "sparse_truth": False,
        "as_2d": False,
        "first_slice": None,
        "resamples": 1000,
        "seed": 0,
        "size_limits_px": [],
        "skeletons": None,
        "voxel_size_nm": None,
    }
    intervals = document["intervals"]
    assert intervals["slices"].keys() == OBJECT_KEYS
    assert intervals["volume"].keys() == VOLUME_KEYS
    assert [row["truth_objects"] for row in document["size_classes"]["slices"]]


def test_volume_scores_are_those_of_the_whole_volume_at_once():
    labels, truth = blocks(1), blocks(2)
    table = ContingencyTable.from_labels(truth, labels)
    volume = score(labels, truth).volume
    assert volume.objects == score_objects(table)
    assert volume.partition == score_partition(table)


def test_slice_scores_are_those_of_each_slice_and_their_mean():
    labels, truth = blocks(1), blocks(2)
    report = score(labels, truth)
    for z, row in enumerate(report.per_slice):
        assert row.z == z
        assert row.scores == score_objects(ContingencyTable.from_labels(truth[z], labels[z]))
        assert row.truth_objects == len(np.unique(truth[z][truth[z] > 0]))
        assert row.segments == len(np.unique(labels[z][labels[z] > 0]))
    means = {name: np.mean([asdict(row.scores)[name] for row in report.per_slice]) for name in OBJECT_KEYS}
    assert asdict(report.slices) == pytest.approx(means)


def test_truth_and_labels_are_not_exchanged():
    truth = np.zeros((1, 4, 8), int)
    truth[0, :, :4], truth[0, :2, 5:] = 1, 2
    report = score(labels=np.where(truth == 2, 0, truth), truth=truth)
    assert report.volume.objects.e_gs > 0  # object 2 is missing
    assert report.volume.objects.e_sg == 0
    assert (report.volume.truth_objects, report.volume.segments) == (2, 1)
    assert report.per_object == (ObjectRow(None, 1, 16, 1, 1.0, 0), ObjectRow(None, 2, 6, None, 0.0, 0))


def wrongly_linked() -> tuple[np.ndarray, np.ndarray]:
    """Two objects through two slices, found exactly but exchanged in the second slice."""
    truth = np.zeros((2, 4, 9), int)
    truth[:, :, :4], truth[:, :, 5:] = 1, 2
    return np.stack([truth[0], np.array([0, 2, 1])[truth[1]]]), truth


def test_wrong_links_cost_the_volume_but_not_its_slices():
    report = score(*wrongly_linked())
    assert report.slices.pq == 1
    assert report.volume.objects.pq == 0
    assert report.volume.partition.vi_split == report.volume.partition.vi_merge == 1


def test_labels_of_one_slice_each_are_pooled():
    report = score(*wrongly_linked(), as_2d=True)
    assert report.volume.objects.pq == 1
    assert report.volume.partition.vi_split == report.volume.partition.vi_merge == 0
    assert report.volume.truth_objects == 4
    assert [(row.z, row.truth_id, row.segment_id) for row in report.per_object] == [
        (0, 1, 1),
        (0, 2, 2),
        (1, 1, 2),
        (1, 2, 1),
    ]


def test_only_the_chosen_slices_count():
    labels, truth = blocks(1), blocks(2)
    labels[:3] = truth[:3]
    report = score(labels, truth, slices=range(1, 3))
    assert [row.z for row in report.per_slice] == [1, 2]
    assert report.volume.objects.pq == report.slices.pq == 1
    assert report.to_document()["options"]["slices"] == [1, 3, 1]


def test_ignored_labels_are_removed_from_both_sides():
    truth = np.array([[[1, 1, 249, 249, 2, 2]]])
    labels = np.array([[[5, 5, 5, 6, 6, 6]]])
    assert score(labels, truth).volume.objects.pq < 1
    report = score(labels, truth, ignore_labels=(249,))
    assert report.volume.objects.pq == 1
    assert report.volume.truth_objects == 2
    assert report.volume.partition.arand_error == 0


def test_a_slice_without_any_voxel_that_counts_is_not_scored():
    truth = np.array([[[249, 249]], [[1, 0]]])
    report = score(np.array([[[3, 3]], [[3, 0]]]), truth, ignore_labels=(249,))
    assert report.unscored_slices == (0,)
    assert [row.z for row in report.per_slice] == [1]
    assert report.slices.pq == 1


def test_sparse_truth_forgives_what_nobody_drew():
    truth = np.array([[[1, 1, 0, 0, 0]], [[0, 0, 0, 0, 0]]])
    labels = np.array([[[7, 7, 0, 8, 8]], [[0, 0, 0, 8, 8]]])
    dense = score(labels, truth)
    assert dense.volume.objects.pq == pytest.approx(1 / 1.5)
    assert dense.unscored_slices == ()
    sparse = score(labels, truth, sparse_truth=True)
    assert sparse.volume.objects.pq == sparse.slices.pq == 1
    assert sparse.volume.segments == 1
    assert sparse.unscored_slices == (1,)


def test_sparse_truth_keeps_a_segment_that_meets_the_truth_in_another_slice():
    truth = np.array([[[1, 1, 0]], [[0, 0, 2]]])
    labels = np.array([[[7, 7, 0]], [[7, 7, 2]]])
    report = score(labels, truth, sparse_truth=True)
    assert [row.iou for row in report.per_object] == [1 / 2, 1]
    assert report.slices.pq == 1


def test_sparse_truth_leaves_slices_that_nobody_annotated_out_of_the_volume():
    truth = np.array([[[1, 1, 0]], [[0, 0, 0]]])
    labels = np.array([[[7, 7, 0]], [[7, 7, 2]]])
    report = score(labels, truth, sparse_truth=True)
    assert report.unscored_slices == (1,)
    assert report.volume.objects.pq == report.per_object[0].iou == 1


def test_slices_without_objects_on_either_side_are_perfect():
    report = score(np.zeros((2, 3, 3)), np.zeros((2, 3, 3)))
    assert report.slices.pq == report.volume.objects.pq == 1
    assert report.slices.oce == report.volume.objects.oce == 0
    assert report.per_object == ()


def test_progress_is_told_after_each_slice():
    heard = []
    reader = ArrayReader("labels", blocks(1))
    score_volumes(reader, reader, EvaluateOptions(slices=range(2, 5)), heard.append)
    told = [(progress.done, progress.total) for progress in heard if progress.stage == "evaluate"]
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_volumes_of_different_shapes_are_refused():
    with pytest.raises(VolumeError, match=r"^labels: 1 x 2 x 3 voxels .* but truth has 1 x 3 x 2; crop"):
        score(np.zeros((1, 2, 3)), np.zeros((1, 3, 2)))


@pytest.mark.parametrize("slices", [range(0), range(5, 2), range(-1, 2), range(3, 0, -1)])
def test_ranges_that_name_no_slices_are_refused(slices):
    with pytest.raises(InvalidArgumentError, match="names no slices"):
        EvaluateOptions(slices=slices)


def test_slices_beyond_the_volume_are_refused():
    with pytest.raises(InvalidArgumentError, match="slices 6 to 8 asked for, but labels shows slices 0 to 7"):
        score(blocks(1), blocks(2), slices=range(6, 9))


def test_a_truth_that_says_nothing_is_refused():
    with pytest.raises(VolumeError, match="truth: nothing in its slices 0 to 1 is labelled"):
        score(np.ones((2, 3, 3)), np.zeros((2, 3, 3)), sparse_truth=True)
    with pytest.raises(VolumeError, match="all of it is in ignore_labels"):
        score(np.ones((2, 3, 3)), np.zeros((2, 3, 3)), ignore_labels=(0,))


def test_files_are_opened_and_named(tmp_path):
    truth = blocks(2).astype(np.uint16)
    for name in ("labels.tif", "truth.tif"):
        tifffile.imwrite(tmp_path / name, truth, metadata={"axes": "ZYX"})
    report = evaluate_labels(tmp_path / "labels.tif", tmp_path / "truth.tif")
    assert report.volume.objects.pq == 1
    assert report.labels.endswith("labels.tif")
    assert report.truth.endswith("truth.tif")


def test_a_missing_file_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "labels.tif", blocks(1).astype(np.uint16), metadata={"axes": "ZYX"})
    with pytest.raises(VolumeError, match=r"truth\.tif"):
        evaluate_labels(tmp_path / "labels.tif", tmp_path / "truth.tif")


@pytest.mark.parametrize("as_2d", [False, True])
def test_accuracy_at_every_threshold_has_the_means_that_are_reported(as_2d):
    report = score(blocks(1), blocks(2), as_2d=as_2d)
    curve = report.accuracy
    assert curve.thresholds == tuple(step / 20 for step in range(2, 20))
    for values, scores in ((curve.slices, report.slices), (curve.volume, report.volume.objects)):
        assert np.mean(values[:17]) == pytest.approx(scores.s_inst)  # .10 to .90
        assert np.mean(values[8:]) == pytest.approx(scores.msa)  # .50 to .95
        assert values[8] == pytest.approx(scores.sa50)
        assert values[13] == pytest.approx(scores.sa75)
        assert list(values) == sorted(values, reverse=True)
    assert report.to_document()["accuracy"]["volume"] == list(curve.volume)


def test_intervals_hold_the_scores_and_depend_on_the_seed_alone():
    labels, truth = blocks(1), blocks(2)
    labels[:3] = truth[:3]
    report = score(labels, truth)
    for interval, value in (
        *((report.intervals.slices[name], value) for name, value in asdict(report.slices).items()),
        *((report.intervals.volume[name], value) for name, value in asdict(report.volume.objects).items()),
    ):
        assert interval[0] <= value <= interval[1]
    low, high = report.intervals.slices["pq"]
    assert low < report.slices.pq < high
    assert report.intervals == score(labels, truth).intervals
    assert report.intervals.slices != score(labels, truth, seed=1).intervals.slices
    assert report.intervals.volume_method == "jackknife"


def test_intervals_of_pooled_slices_are_bootstrapped():
    labels, truth = blocks(1), blocks(2)
    labels[:3] = truth[:3]
    report = score(labels, truth, as_2d=True)
    assert report.intervals.volume_method == "bootstrap"
    low, high = report.intervals.volume["pq"]
    assert low < report.volume.objects.pq < high
    # Pooled objects and means over slices are uncertain for the same reason, and about as much.
    of_slices = report.intervals.slices["pq"]
    assert (high - low) == pytest.approx(of_slices[1] - of_slices[0], rel=0.5)


def test_slices_that_are_alike_leave_no_doubt_and_one_slice_says_nothing():
    truth = np.repeat(blocks(2)[:1], 5, axis=0)
    labels = np.repeat(blocks(1)[:1], 5, axis=0)
    report = score(labels, truth)
    assert report.intervals.slices["pq"] == pytest.approx((report.slices.pq, report.slices.pq))
    assert report.intervals.volume["pq"] == pytest.approx((report.volume.objects.pq,) * 2)
    for alone in (score(labels[:1], truth[:1]), score(labels, truth, resamples=0)):
        assert alone.intervals.slices == alone.intervals.volume == {}


def test_many_slices_are_drawn_in_blocks_of_neighbours():
    labels, truth = (np.tile(blocks(seed)[:, :4, :4], (20, 1, 1)) for seed in (1, 2))
    report = score(labels, truth)
    assert len(report.per_slice) == 160
    assert report.intervals.volume_blocks == 64
    assert report.volume.objects == score_objects(ContingencyTable.from_labels(truth, labels))


def test_sizes_are_those_of_the_2d_objects_and_of_the_volume():
    truth = np.zeros((3, 8, 8), int)
    truth[:, :2, :2], truth[:, 4:, :] = 1, 2
    report = score(np.where(truth == 1, 0, truth), truth, size_limits_px=(10,))
    small, large = report.size_classes.slices
    assert (small.truth_objects, small.found, large.truth_objects, large.found) == (3, 0, 3, 3)
    assert (small.pq, large.pq) == (0, 1)
    assert [row.truth_objects for row in report.size_classes.volume] == [1, 1]
    assert score(truth, truth, as_2d=True).size_classes.volume == ()


def test_limits_of_sizes_are_said_in_nm_where_the_voxel_size_is_known():
    reader = ArrayReader("labels", blocks(1), (40.0, 10.0, 5.0))
    document = score_volumes(reader, reader, EvaluateOptions(size_limits_px=(30,))).to_document()
    small, large = document["size_classes"]["slices"]
    assert (small["low_px"], small["high_px"], small["high_nm2"]) == (None, 30, 1500)
    assert large["low_diameter_nm"] == pytest.approx(2 * (1500 / np.pi) ** 0.5)
    assert document["size_classes"]["volume"][0]["high_nm3"] % 2000 == 0
    unknown = score(blocks(1), blocks(1)).to_document()["size_classes"]["slices"][0]
    assert unknown["high_nm2"] is None


@pytest.mark.parametrize(
    "options", [{"size_limits_px": (5, 5)}, {"size_limits_px": (0,)}, {"resamples": -1}, {"seed": -1}]
)
def test_limits_that_do_not_ascend_and_negative_numbers_are_refused(options):
    with pytest.raises(InvalidArgumentError, match=r"expected|ascend"):
        EvaluateOptions(**options)


def test_what_a_sparse_truth_leaves_out_is_counted():
    truth = np.array([[[1, 1, 0, 0, 0, 0]]])
    labels = np.array([[[7, 7, 0, 8, 9, 0]]])
    assert score(labels, truth, sparse_truth=True).segments_left_out == 2
    assert score(labels, truth).segments_left_out == 0


def test_real_neurites_against_damaged_copies(shared_data, tmp_path):
    path = shared_data / "em_fibsem_medulla" / "neurites.tif"
    sections = EvaluateOptions(slices=range(137, 167))
    itself = evaluate_labels(path, path, sections)
    assert itself.slices.pq == itself.volume.objects.msa == itself.volume.partition.arand_recall == 1
    assert itself.slices.oce == itself.volume.partition.vi_split == 0

    truth = tifffile.imread(path)
    merged, cut = truth.copy(), truth.copy()
    largest = np.argsort(np.bincount(truth[137:].ravel())[1:])[-2:] + 1
    merged[np.isin(merged, largest)] = largest[0]
    cut[150:][cut[150:] == largest[1]] = truth.max() + 1
    for name, labels in (("merged.tif", merged), ("cut.tif", cut)):
        tifffile.imwrite(tmp_path / name, labels, metadata={"axes": "ZYX"}, compression="zlib")
    joined = evaluate_labels(tmp_path / "merged.tif", path, sections).volume.partition
    assert joined.vi_merge > 0
    assert joined.vi_split == 0
    assert joined.arand_precision < joined.arand_recall == 1
    in_two = evaluate_labels(tmp_path / "cut.tif", path, sections)
    assert in_two.volume.partition.vi_split > 0
    assert in_two.volume.partition.vi_merge == 0
    assert in_two.volume.partition.arand_recall < in_two.volume.partition.arand_precision == 1
    assert in_two.slices.pq == 1  # no single slice shows the cut


def test_the_jackknife_leaves_each_block_out_once():
    """Against the definition: the volume scored anew without each slice."""
    labels, truth = blocks(1), blocks(2)
    labels[:3] = truth[:3]
    whole = score(labels, truth)
    without = [score(np.delete(labels, z, 0), np.delete(truth, z, 0), resamples=0) for z in range(8)]
    for name in ("s_inst", "dice"):
        values = [getattr(report.volume.objects, name) for report in without]
        spread = np.sqrt(7 / 8 * np.square(np.array(values) - getattr(whole.volume.objects, name)).sum())
        reach = 2.364624 * spread  # Student's t with 7 degrees of freedom at .975
        expected = getattr(whole.volume.objects, name) - reach, getattr(whole.volume.objects, name) + reach
        assert whole.intervals.volume[name] == pytest.approx(np.clip(expected, 0, 1), rel=1e-5)
