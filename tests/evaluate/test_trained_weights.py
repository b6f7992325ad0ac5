"""Masks and labels of a trained model: there they mean something, and small mistakes show in them.

The packaged weights are run by segment_anything itself, on smaller tiles than they were trained on, with whatever
mistake is to be found; exporting them would take a minute.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from sabotage import Tensors, failures, from_torch, judged, sabotaged, with_outputs

torch = pytest.importorskip("torch")

from dendsam_deploy.export.reference import ReferenceOptions, reference_inputs, sam_outputs  # noqa: E402 - see above
from dendsam_deploy.models.weights import load_sam  # noqa: E402
from dendsam_deploy.weights import PACKAGED_SAM  # noqa: E402

SIZE = 256


@pytest.fixture(scope="module")
def trained():
    return load_sam(PACKAGED_SAM, SIZE).sam


@pytest.fixture(scope="module")
def trained_truth(trained, truth):
    inputs = reference_inputs(ReferenceOptions(SIZE, boxes=16))
    return dataclasses.replace(truth, inputs=inputs, sam=sam_outputs(trained, inputs), detector=None, detected=None)


@pytest.fixture(scope="module")
def make(session, trained):
    """Make a session of the trained weights, changed in some way."""
    manifest = session.manifest
    small = dataclasses.replace(
        manifest,
        preprocessing=dataclasses.replace(manifest.preprocessing, tile_size_px=SIZE),
        decoding=dataclasses.replace(manifest.decoding, region_sizes=(8, 16)),
    )
    bare = dataclasses.replace(session, manifest=small, detector=None)
    return partial(from_torch, bare, trained)


def test_the_weights_themselves_pass_and_paint_objects(make, trained_truth):
    report = judged(make(lambda sam: None), trained_truth)
    assert report.passed, report.failures
    painted = [row.value for row in report.rows if row.metric.startswith("instances_compared")]
    assert min(painted) >= 2
    assert next(row.value for row in report.rows if row.metric == "cut_by_region") == 0


def test_another_mask_token_paints_other_objects(make, trained_truth):
    """Trained tokens agree on clear objects: whole, part and subpart of a profile are much the same mask."""

    def third(sam) -> None:
        predict = sam.mask_decoder.predict_masks
        sam.mask_decoder.predict_masks = lambda **inputs: tuple(output[:, [2]] for output in predict(**inputs))

    found = failures(make(third), trained_truth)
    assert {"logits_rms_over_std", "mask_iou_mean", "mask_iou_min", "instances_pq50", "instances_pq90"} <= found


def test_half_a_pixel_shows_in_the_masks(make, trained_truth):
    def shifted(sam) -> None:
        embed = sam.prompt_encoder._embed_boxes
        sam.prompt_encoder._embed_boxes = lambda boxes: embed(boxes + 0.5)

    assert {"logits_max_over_std", "mask_iou_mean", "mask_iou_min"} <= failures(make(shifted), trained_truth)


def test_a_threshold_that_is_off_shows_in_the_masks(make, trained_truth):
    right = make(lambda sam: None)
    wrong = with_outputs(right, "decoder", lambda outputs: {"logits": outputs["logits"] - np.float32(0.1)})
    assert {"mask_iou_mean", "instances_pq50"} <= failures(wrong, trained_truth)


def test_a_region_cropped_too_tight_shows_in_the_masks(make, trained_truth, monkeypatch):
    """Half the region that a box was promised."""
    session = make(lambda sam: None)

    def crop(inputs: Tensors, run) -> Tensors:
        outputs = run(inputs)
        edge = outputs["logits"].shape[1] // 4
        kept = np.full_like(outputs["logits"], -20)
        kept[:, edge:-edge, edge:-edge] = outputs["logits"][:, edge:-edge, edge:-edge]
        return {**outputs, "logits": kept}

    assert {"logits_max_over_std", "mask_iou_min"} <= failures(sabotaged(session, "decoder", crop), trained_truth)
    monkeypatch.setattr("dendsam_deploy.pipeline.decode.region_cells", lambda box, margin_px, sizes: 2)
    assert {"cut_by_region", "mask_iou_min", "instances_pq90"} & failures(session, trained_truth)
