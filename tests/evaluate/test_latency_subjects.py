"""Slices with a known number of objects, on one tile and on many."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))

from synthetic_session import CountingFunction, detect_discs, make_manifest, make_session

from dendsam_deploy.evaluate.latency_subjects import (
    FixedDetector,
    SpreadBoxes,
    spread_boxes,
    spread_detections,
    with_fixed_boxes,
)
from dendsam_deploy.instances import Detections, suppress_duplicates
from dendsam_deploy.pipeline.prepare import prepare_slice
from dendsam_deploy.pipeline.segment import SliceOptions, make_recipe, segment_prepared
from dendsam_deploy.runtimes.runner import CallableRunner, keeps_tensors


@given(st.tuples(st.integers(64, 2000), st.integers(64, 2000)), st.integers(0, 300), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_boxes_are_inside_and_none_hides_another(size_hw, count, seed) -> None:
    boxes = spread_boxes(size_hw, count, seed)
    assert boxes.shape == (count, 4)
    assert boxes.dtype == np.float32
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= np.array([size_hw[1], size_hw[0]])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    assert len(suppress_duplicates(Detections(boxes, np.ones(count, np.float32)), 0.7)) == count
    np.testing.assert_array_equal(boxes, spread_boxes(size_hw, count, seed))


def test_other_seeds_give_other_boxes() -> None:
    assert not np.array_equal(spread_boxes((512, 512), 8, 0), spread_boxes((512, 512), 8, 1))


@pytest.mark.parametrize("shape_hw", [(64, 64), (50, 60), (150, 110), (64, 200)])
def test_a_fixed_detector_works_and_finds_its_boxes_on_every_slice(shape_hw) -> None:
    function = CountingFunction(detect_discs)
    session = make_session(make_manifest(tile_size=64), detector=function)
    recipe = make_recipe(shape_hw, session.manifest, SliceOptions())
    detections = spread_detections(recipe.plan, 12)
    fixed = with_fixed_boxes(session, recipe.plan, detections)
    assert isinstance(fixed.detector, FixedDetector)
    assert (fixed.engine, fixed.device, fixed.detector.spec) == ("callable", "cpu", session.detector.spec)
    for repeat in range(1, 4):
        prepared = prepare_slice(np.zeros(shape_hw, np.uint8), recipe.plan)
        with fixed:
            _, instances = segment_prepared(prepared, fixed, None, recipe)
        assert len(function.calls) == repeat * len(recipe.plan.tiles), "the network itself ran on every tile"
        found = instances.boxes_xyxy[np.lexsort(instances.boxes_xyxy.T)]
        expected = detections.boxes_xyxy[np.lexsort(detections.boxes_xyxy.T)]
        assert len(found) == 12
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_detector_that_keeps_tensors_on_its_device_still_does() -> None:
    session = make_session()
    recipe = make_recipe((64, 64), session.manifest, SliceOptions())

    def fixed(detector):
        return with_fixed_boxes(
            replace(session, detector=detector), recipe.plan, spread_detections(recipe.plan, 3)
        ).detector

    assert not keeps_tensors(fixed(session.detector))
    resident = CallableRunner(session.detector.spec, detect_discs)
    resident.run_into, resident.rows_per_call = "run_into", 4
    assert keeps_tensors(fixed(resident))
    assert fixed(resident).rows_per_call == 4


def test_without_a_detector_the_session_stays_as_it_is() -> None:
    session = make_session()
    bare = type(session)(session.manifest, session.encoder, session.decoder, None)
    recipe = make_recipe((64, 64), session.manifest, SliceOptions())
    assert with_fixed_boxes(bare, recipe.plan, spread_detections(recipe.plan, 3)) is bare


def test_a_source_of_boxes_has_the_same_for_every_slice() -> None:
    detections = spread_detections(make_recipe((64, 64), make_manifest(), SliceOptions()).plan, 3)
    with SpreadBoxes(detections) as source:
        assert source.for_slice(0) is source.for_slice(77) is detections
