"""Whole comparisons: every row, several bundles, and agreement with what `segment` and `evaluate` say."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, replace

import numpy as np
import pytest
import tifffile

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError, VolumeError
from dendsam_deploy.evaluate.comparison_report import relative_changes
from dendsam_deploy.evaluate.labelled_slices import CompareOptions
from dendsam_deploy.evaluate.prompt_comparison import compare_prompts
from dendsam_deploy.evaluate.score_report import EvaluateOptions, SliceScores
from dendsam_deploy.evaluate.scores import evaluate_labels
from dendsam_deploy.metrics.summary import ObjectScores
from dendsam_deploy.pipeline.job import SegmentOptions
from dendsam_deploy.pipeline.run import segment_volume
from dendsam_deploy.runtimes.session import SessionOptions, open_session
from dendsam_deploy.volume.boxes import open_boxes

ENGINE = SessionOptions("onnxruntime", "cpu", "fp32", threads=1)
QUICK = CompareOptions(
    grid_points=6, grid_iou=0.0, grid_stability=0.0, curve_repeats=1, resamples=50, points=2, session=ENGINE
)
OBJECT_KEYS = {"oce", "e_gs", "e_sg", "pq", "sq", "dq", "s_inst", "msa", "sa50", "sa75", "dice"}
VOLUME_KEYS = OBJECT_KEYS | {"vi_split", "vi_merge", "arand_error", "arand_precision", "arand_recall"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Three slices of bright discs and their labels; 60 nm pixels, so that the bundle sees them four times as large."""
    folder = tmp_path_factory.mktemp("discs")
    y, x = np.mgrid[:70, :64]
    labels = np.zeros((3, 70, 64), np.uint16)
    for label, (cy, cx, radius) in enumerate([(15, 17, 9), (45, 22, 12), (28, 46, 8)], start=1):
        for z in range(3):
            labels[z][(y - cy - z) ** 2 + (x - cx) ** 2 < radius**2] = label
    raw = np.clip(np.where(labels > 0, 190, 60) + np.random.default_rng(0).normal(0, 6, labels.shape), 0, 255)
    for name, volume in (("raw", raw.astype(np.uint8)), ("labels", labels)):
        tifffile.imwrite(folder / f"{name}.tif", volume, photometric="minisblack")
    return folder


@pytest.fixture(scope="module")
def comparison(exported, stack):
    return compare_prompts(stack / "raw.tif", stack / "labels.tif", [exported.bundle], QUICK)


def test_every_row_has_the_keys_of_evaluate(comparison):
    document = json.loads(json.dumps(comparison.to_document(), allow_nan=False))
    assert [row["prompts"] for row in document["rows"]] == [
        "truth_box",
        "truth_point",
        "truth_points",
        "detector_box",
        "point_grid",
    ]
    for row in document["rows"]:
        assert row["slices"].keys() == OBJECT_KEYS
        assert row["volume"].keys() >= VOLUME_KEYS
        assert {name: row[name] for name in OBJECT_KEYS} == row["slices"]
        assert [one["z"] for one in row["per_slice"]] == [0, 1, 2]
        assert row["intervals"]["slices"].keys() == OBJECT_KEYS
        assert row["relative_percent"] == {}
        assert row["seconds_per_slice"] > 0
        assert (row["grid"] is not None) == (row["prompts"] == "point_grid")
    assert document["slices"] == [0, 1, 2]
    assert document["options"]["grid_points"] == 6
    assert len(document["curves"]) == 1
    assert document["notes"] == []


@pytest.mark.parametrize("prompts", ["truth_box", "detector_box"])
def test_rows_are_what_segment_and_evaluate_say(comparison, exported, stack, tmp_path, prompts):
    with ExitStack() as stack_of_files:
        boxes = None
        if prompts == "truth_box":
            boxes = stack_of_files.enter_context(open_boxes(stack / "labels.tif", (3, 70, 64)))
        session = stack_of_files.enter_context(open_session(Bundle.open(exported.bundle), ENGINE))
        segment_volume(stack / "raw.tif", session, SegmentOptions(out=tmp_path / "out", boxes=boxes))
    report = evaluate_labels(tmp_path / "out", stack / "labels.tif", EvaluateOptions(resamples=0))
    row = next(row for row in comparison.rows if row.prompts == prompts)
    for name, value in asdict(report.slices).items():
        assert getattr(row.report.slices, name) == pytest.approx(value), name


def test_the_curve_begins_with_exact_boxes(comparison):
    (curve,) = comparison.curves
    row = next(row for row in comparison.rows if row.prompts == "truth_box")
    assert asdict(curve.points[0].scores) == pytest.approx(asdict(row.report.slices))
    assert curve.detector.matched + curve.detector.missed == 9


def test_it_is_reproducible(comparison, exported, stack):
    again = compare_prompts(stack / "raw.tif", stack / "labels.tif", [exported.bundle], QUICK)
    for one, other in zip(comparison.rows, again.rows, strict=True):
        assert one.report == other.report
    assert comparison.curves == again.curves


def test_a_bundle_against_itself_is_neither_better_nor_worse(exported, stack, tmp_path):
    shutil.copytree(exported.bundle, tmp_path / "copy")
    bundles = [exported.bundle, tmp_path / "copy"]
    options = replace(QUICK, slices=(0, 2), sources=("truth_box", "truth_point"), curve_repeats=0)
    found = compare_prompts(stack / "raw.tif", stack / "labels.tif", bundles, options)
    assert [(row.bundle, row.prompts) for row in found.rows] == [
        (str(path), prompts) for path in bundles for prompts in ("truth_box", "truth_point")
    ]
    assert found.curves == ()
    assert all(row.relative == {} for row in found.rows[:2])
    for row in found.rows[2:]:
        for name, change in row.relative.items():
            assert change.percent in (None, pytest.approx(0)), name
    assert set(found.shown.labels) == {(row.bundle, row.prompts) for row in found.rows}


def slice_scores(*values: dict) -> list[SliceScores]:
    names = ObjectScores.__dataclass_fields__
    return [
        SliceScores(z, 1, 1, ObjectScores(**{name: given.get(name, 0.5) for name in names}))
        for z, given in enumerate(values)
    ]


def test_changes_are_stated_as_in_the_paper():
    first = slice_scores({"pq": 0.4, "oce": 0.5, "sq": 0}, {"pq": 0.6, "oce": 0.7, "sq": 0})
    better = slice_scores({"pq": 0.5, "oce": 0.4, "sq": 1}, {"pq": 0.69, "oce": 0.5, "sq": 1})
    changes = relative_changes(better, first, resamples=100, seed=0)
    assert changes["pq"].percent == pytest.approx(19.0)  # .595 is 1.19 times .5
    assert changes["oce"].percent == pytest.approx(100 * ((0.55 / 0.4) - 1))  # agreement rose from .4 to .55
    assert changes["sq"].percent is None, "nothing is no base"
    assert changes["dice"].percent == pytest.approx(0)
    assert changes["pq"].low <= 19 <= changes["pq"].high
    assert changes["pq"].low >= 100 * (0.69 / 0.6 - 1) - 1e-9, "slices are resampled in pairs"


def test_a_bundle_without_a_detector_or_points_says_so(exported, stack, tmp_path):
    path = tmp_path / "bare"
    shutil.copytree(exported.bundle, path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["graphs"] = [graph for graph in manifest["graphs"] if graph["role"] in ("encoder", "decoder")]
    (path / "manifest.json").write_text(json.dumps(manifest))
    options = replace(QUICK, slices=(0, 1))
    found = compare_prompts(stack / "raw.tif", stack / "labels.tif", [path], options)
    assert [row.prompts for row in found.rows] == ["truth_box"]
    assert len(found.notes) == 4
    assert all("export it again" in note for note in found.notes)
    assert found.curves[0].detector is None
    with pytest.raises(MissingCapabilityError, match="has no decoder for points"):
        compare_prompts(stack / "raw.tif", stack / "labels.tif", [path], replace(options, sources=("point_grid",)))


def test_what_is_not_judged_is_left_out(exported, stack):
    options = replace(QUICK, slices=(1, 2), sources=("truth_box",), curve_repeats=0)
    judged = {
        name: compare_prompts(stack / "raw.tif", stack / "labels.tif", [exported.bundle], replace(options, **change))
        for name, change in (("all", {}), ("some", {"ignore_labels": (2,)}), ("large", {"min_area_px": 210.0}))
    }
    counts = {name: found.rows[0].report.per_slice[0].truth_objects for name, found in judged.items()}
    assert counts == {"all": 3, "some": 2, "large": 2}
    assert judged["large"].least_px == 210
    with pytest.raises(VolumeError, match="nothing in the chosen slices is labelled"):
        compare_prompts(
            stack / "raw.tif",
            stack / "labels.tif",
            [exported.bundle],
            replace(options, sparse_truth=True, ignore_labels=(1, 2, 3)),
        )


def test_volumes_that_do_not_fit_and_slices_that_are_not_there_are_refused(exported, stack, tmp_path):
    tifffile.imwrite(tmp_path / "other.tif", np.zeros((3, 70, 65), np.uint8), photometric="minisblack")
    with pytest.raises(VolumeError, match="3 x 70 x 65 voxels"):
        compare_prompts(stack / "raw.tif", tmp_path / "other.tif", [exported.bundle], QUICK)
    with pytest.raises(InvalidArgumentError, match="slices 2:5 are not within its 3 slices"):
        compare_prompts(stack / "raw.tif", stack / "labels.tif", [exported.bundle], replace(QUICK, slices=(2, 5)))
    with pytest.raises(InvalidArgumentError, match="no bundle"):
        compare_prompts(stack / "raw.tif", stack / "labels.tif", [], QUICK)


def test_slices_without_labels_are_not_taken_and_told_of(exported, stack, tmp_path):
    labels = tifffile.imread(stack / "labels.tif")
    labels[1] = 0
    tifffile.imwrite(tmp_path / "part.tif", labels, photometric="minisblack")
    files = stack / "raw.tif", tmp_path / "part.tif", [exported.bundle]
    options = replace(QUICK, sources=("truth_box",))
    found = compare_prompts(*files, options)
    assert (found.slices, found.notes) == ((0, 2), ())
    asked = compare_prompts(*files, replace(options, slices=(0, 3)))
    assert asked.slices == (0, 1, 2)
    assert "no object to judge in slices 1: they score 1" in asked.notes[0]


def test_the_curve_leaves_out_what_the_table_does(exported, stack, tmp_path):
    labels = tifffile.imread(stack / "labels.tif")
    labels[1] = 0
    tifffile.imwrite(tmp_path / "part.tif", labels, photometric="minisblack")
    options = replace(QUICK, sources=("truth_box",), slices=(0, 3), ignore_labels=(0,))
    found = compare_prompts(stack / "raw.tif", tmp_path / "part.tif", [exported.bundle], options)
    assert [row.z for row in found.rows[0].report.per_slice] == [0, 2]
    assert asdict(found.curves[0].points[0].scores) == pytest.approx(asdict(found.rows[0].report.slices))


def test_the_same_bundle_twice_has_two_names(exported, stack):
    options = replace(QUICK, slices=(0, 1), sources=("truth_box",), curve_repeats=0)
    found = compare_prompts(stack / "raw.tif", stack / "labels.tif", [exported.bundle] * 2, options)
    assert [row.bundle for row in found.rows] == [str(exported.bundle), f"{exported.bundle} (2)"]
    assert [bundle.name for bundle in found.bundles] == [row.bundle for row in found.rows]


def test_thresholds_of_the_grid_are_chosen_on_other_slices(exported, stack):
    options = replace(QUICK, sources=("point_grid",), grid_iou=None, grid_stability=0.9, curve_repeats=0)
    files = stack / "raw.tif", stack / "labels.tif", [exported.bundle]
    found = compare_prompts(*files, replace(options, grid_slices=(0, 1)))
    assert found.slices == (1, 2)
    (row,) = found.rows
    assert row.grid.stability == 0.9, "what was asked for stays"
    chosen = replace(options, slices=(1, 3), grid_iou=row.grid.predicted_iou)
    assert compare_prompts(*files, chosen).rows[0].report == row.report
    assert compare_prompts(*files, replace(options, slices=(1, 2))).rows[0].grid.predicted_iou == 0.88, "as SAM's own"
    for slices, words in (((0, 2), "slice 0 would be judged"), (None, "leaves none of the 3 slices")):
        with pytest.raises(InvalidArgumentError, match=words):
            compare_prompts(*files, replace(options, slices=slices, grid_slices=(0, 3)))
    with pytest.raises(InvalidArgumentError, match="slices 2:9 are not within"):
        compare_prompts(*files, replace(options, grid_slices=(2, 9)))


@pytest.mark.parametrize(
    "options",
    [{"sources": ("guess",)}, {"points": 0}, {"min_area_px": -1.0}, {"curve_repeats": -1}, {"grid_iou": 2.0}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidArgumentError):
        CompareOptions(**options)
