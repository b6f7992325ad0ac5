"""What a deployment costs in scores, where ground truth says so."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from sabotage import with_inputs

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.compare_scores import (
    SliceScores,
    bootstrap_interval,
    compare_scores,
    read_labelled_slices,
    score_slices,
)
from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
from dendsam_deploy.runtimes.session import SessionOptions
from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> tuple[Path, Path]:
    """A phantom of ten slices and its labels."""
    folder = tmp_path_factory.mktemp("labelled")
    phantom = make_phantom(PhantomOptions(shape_zyx=(10, 160, 140), seed=4))
    for name, stack in (("raw", phantom.raw), ("labels", phantom.labels_2d.astype(np.uint16))):
        tifffile.imwrite(folder / f"{name}.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    return folder / "raw.tif", folder / "labels.tif"


def test_the_interval_holds_the_mean_and_narrows_with_more_slices():
    rng = np.random.default_rng(1)
    few, many = rng.normal(0.1, 1, 8), rng.normal(0.1, 1, 800)
    for values in (few, many):
        low, high = bootstrap_interval(values)
        assert low < values.mean() < high
    narrow, wide = (np.ptp(bootstrap_interval(values)) for values in (many, few))
    assert narrow < wide / 5
    # For many values it is that of the normal distribution.
    low, high = bootstrap_interval(many)
    assert high - low == pytest.approx(2 * 1.96 * many.std() / np.sqrt(800), rel=0.1)
    assert bootstrap_interval(few) == bootstrap_interval(few), "the same slices, the same interval"
    assert bootstrap_interval(np.full(4, 0.25)) == (0.25, 0.25)


def test_a_loss_is_reported_with_its_interval():
    reference = SliceScores(np.array([0.8, 0.6, 0.7]), np.array([0.9, 0.9, 0.9]))
    deployed = SliceScores(np.array([0.8, 0.57, 0.7]), np.array([0.9, 0.9, 0.9]))
    found = {finding.metric: finding.value for finding in compare_scores(deployed, reference, "torch")}
    assert found["truth_pq"] == pytest.approx(0.69)
    assert found["truth_pq_loss"] == pytest.approx(0.01)
    assert (found["truth_pq_loss_low"], found["truth_pq_loss_high"]) == (pytest.approx(0), pytest.approx(0.03))
    assert found["truth_box_iou_loss"] == found["truth_box_iou_loss_high"] == 0
    alone = {finding.metric for finding in compare_scores(deployed, None, "fp32")}
    assert alone == {"truth_pq", "truth_box_iou"}, "what is its own reference proves nothing"


def test_slices_are_spread_or_chosen(labelled, tmp_path):
    assert len(read_labelled_slices(*labelled, None).images) == 8
    chosen = read_labelled_slices(*labelled, (3, 5))
    np.testing.assert_array_equal(chosen.truth[1], tifffile.imread(labelled[1])[4])
    with pytest.raises(InvalidArgumentError, match="slices 8:11 are not within its 10 slices"):
        read_labelled_slices(*labelled, (8, 11))
    tifffile.imwrite(tmp_path / "small.tif", np.zeros((10, 16, 16), np.uint8), imagej=True, metadata={"axes": "ZYX"})
    with pytest.raises(VolumeError, match=r"10 x 16 x 16 voxels.*has 10 x 160 x 140"):
        read_labelled_slices(labelled[0], tmp_path / "small.tif", None)
    with pytest.raises(InvalidArgumentError, match="give both --volume and --truth"):
        VerifyOptions(volume=labelled[0])
    with pytest.raises(InvalidArgumentError, match="give both --volume and --truth"):
        VerifyOptions(slices=(0, 1))


def test_scores_are_those_of_the_labels_and_of_exact_boxes(session, labelled):
    slices = read_labelled_slices(*labelled, (4, 5))
    right = score_slices(session, slices)
    # Without a detector the labels come from the exact boxes, too.
    prompted = score_slices(dataclasses.replace(session, detector=None), slices)
    assert prompted.box_iou == pytest.approx(right.box_iou)
    wrong = score_slices(with_inputs(session, "decoder", lambda inputs: {"boxes": inputs["boxes"] + 30}), slices)
    assert wrong.box_iou != pytest.approx(right.box_iou, abs=1e-4)
    empty = dataclasses.replace(slices, truth=(np.zeros_like(slices.truth[0]),))
    assert score_slices(session, empty).box_iou == [1.0]


def test_verify_reports_the_loss_of_every_combination_but_the_reference(exported, labelled, tmp_path):
    bundle = Path(shutil.copytree(exported.bundle, tmp_path / "toy"))
    volume, truth = labelled
    options = VerifyOptions(
        session=SessionOptions(device="cpu", threads=1), box_counts=(3,), volume=volume, truth=truth, slices=(4, 5)
    )
    report = verify_bundle(bundle, options)
    rows = {(row.engine, row.metric): row for row in report.rows if row.metric.startswith("truth")}
    assert ("onnxruntime", "truth_pq_loss") not in rows
    loss = rows["openvino", "truth_box_iou_loss"]
    assert (loss.level, loss.graph, loss.reference, loss.passed) == (5, "chain", "fp32", True)
    assert rows["openvino", "truth_box_iou_loss_low"].value <= loss.value
    assert rows["openvino", "truth_box_iou_loss_low"].limit is None
    assert Bundle.open(bundle).parity == report
