"""The decoder for points in a bundle: written, proven, loaded on request, and noticed where it is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.evaluate.compare_points import compare_points
from dendsam_deploy.evaluate.limits import METRICS
from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
from dendsam_deploy.evaluate.truth import Originals, collect_truth
from dendsam_deploy.runtimes.runner import CallableRunner
from dendsam_deploy.runtimes.session import SessionOptions, open_session

ON_ONE_THREAD = SessionOptions("onnxruntime", "cpu", "fp32", threads=1, with_points=True)


@pytest.fixture(scope="module")
def truth(exported):
    return collect_truth(Bundle.open(exported.bundle), Originals(threads=1))


@pytest.fixture(scope="module")
def clicked(exported):
    with open_session(Bundle.open(exported.bundle), ON_ONE_THREAD) as session:
        yield session.points


def failures(decoder, truth) -> set[str]:
    findings = compare_points(decoder, truth.sam.embeddings, truth.points)
    return {finding.metric for finding in findings if not METRICS[finding.metric].judge(finding.value, "fp32")[1]}


def test_it_is_loaded_on_request_only(exported):
    bundle = Bundle.open(exported.bundle)
    assert bundle.manifest.graph("points", "fp32") is not None
    assert open_session(bundle, dataclasses.replace(ON_ONE_THREAD, with_points=False)).points is None
    session = open_session(bundle, ON_ONE_THREAD)
    assert session.points in session.runners
    assert session.points.spec.role == "points"


def test_it_equals_what_segment_anything_returned(clicked, truth):
    assert truth.points is not None
    assert set(np.unique(truth.points.labels)) == {-1, 0, 1}
    assert failures(clicked, truth) == set()


@pytest.mark.parametrize(
    ("change", "metric"),
    [
        (lambda inputs, run: run(inputs | {"points": inputs["points"] + np.float32(1)}), "logits_max_over_std"),
        (lambda inputs, run: run(inputs | {"labels": np.abs(inputs["labels"])}), "logits_max_over_std"),
        (lambda inputs, run: run(inputs | {"tile_index": 0 * inputs["tile_index"]}), "logits_max_over_std"),
        (lambda inputs, run: (o := run(inputs)) | {"iou": o["iou"] + np.float32(1e-3)}, "predicted_iou_max_difference"),
        (lambda inputs, run: (o := run(inputs)) | {"logits": o["logits"][:, ::-1]}, "logits_rms_over_std"),
        (lambda inputs, run: (o := run(inputs)) | {"logits": o["logits"][:, :1]}, "wrong_shapes"),
        (lambda inputs, run: (o := run(inputs)) | {"iou": o["iou"] * np.float32(np.nan)}, "not_finite"),
    ],
)
def test_what_is_wrong_is_noticed(clicked, truth, change, metric):
    wrong = CallableRunner(clicked.spec, lambda inputs: change(dict(inputs), clicked.run))
    assert metric in failures(wrong, truth)


def test_verify_judges_it_against_the_stored_answers_and_against_the_checkpoint(exported, tmp_path):
    import shutil  # noqa: PLC0415 - the only test that writes into a bundle

    bundle = tmp_path / "toy"
    shutil.copytree(exported.bundle, bundle)
    for sam, reference in ((None, "stored"), (exported.sam, "torch")):
        options = VerifyOptions(sam=sam, session=dataclasses.replace(ON_ONE_THREAD, with_points=False), box_counts=(1,))
        rows = [row for row in verify_bundle(bundle, options).rows if row.graph == "points"]
        assert {row.metric.partition(":")[0] for row in rows} == {
            "wrong_shapes",
            "not_finite",
            "logits_max_over_std",
            "logits_rms_over_std",
            "predicted_iou_max_difference",
        }
        assert all(row.passed for row in rows)
        assert {row.reference for row in rows} == {reference}


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("points", [1, 3, 5])
def test_other_engines_agree_for_any_number_of_points(exported, clicked, truth, engine, points):
    pytest.importorskip(engine)
    rng = np.random.default_rng(points)
    inputs = {
        "embeddings": truth.sam.embeddings,
        "points": rng.uniform(0, 128, (3, points, 2)).astype(np.float32),
        "labels": rng.integers(0, 2, (3, points)),
        "tile_index": np.array([0, 1, 0]),
    }
    expected = clicked.run(inputs)
    options = dataclasses.replace(ON_ONE_THREAD, engine=engine)
    with open_session(Bundle.open(exported.bundle), options).points as other:
        found = other.run(inputs)
    for name in ("logits", "iou"):
        assert np.abs(found[name] - expected[name]).max() < 1e-4 * np.abs(expected[name]).max()
