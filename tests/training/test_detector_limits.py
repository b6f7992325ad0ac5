"""Boxes against the limits of a YOLO head, and the batch against the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dendsam_deploy.export.options import DEFAULT_THRESHOLDS
from dendsam_deploy.models.detector import load_detector
from dendsam_deploy.models.detector_graph import DetectorGraph
from dendsam_deploy.training import detector_plan
from dendsam_deploy.training.detector_limits import NMS_IOU, check_limits, head_facts
from dendsam_deploy.training.detector_plan import PRESETS, plan_batch
from dendsam_deploy.training.detector_tiles import TileBoxes
from dendsam_deploy.training.options import DetectorSchedule


@pytest.fixture(scope="module")
def yolo():
    return load_detector(Path("yolo11n.yaml"))


def grid(count, width=40.0, height=40.0):
    """Return boxes side by side, far enough from each other."""
    x, y = np.meshgrid(np.arange(count), np.arange(count))
    corner = np.stack([x.ravel() * (width + 5), y.ravel() * (height + 5)], axis=1)
    return np.concatenate([corner, corner + np.array([width, height])], axis=1).astype(np.float32)


def failed(boxes, head, zoom=1.0):
    return {check.name: check for check in check_limits(TileBoxes(tuple(boxes)), head, zoom) if not check.passed}


def test_the_limits_are_those_of_the_network(yolo):
    head = head_facts(yolo, 512)
    assert (head.strides_px, head.overlap_px, head.reach_px) == ((8, 16, 32), 128, 960)
    assert head.candidates == DetectorGraph(yolo, 512, 512).candidates
    small = head_facts(yolo, 64)
    assert small.candidates == DetectorGraph(yolo, 64, 64).candidates < head.candidates
    assert DEFAULT_THRESHOLDS.nms_iou == NMS_IOU


def test_what_a_detector_can_do_passes(yolo):
    checks = check_limits(TileBoxes((grid(8),)), head_facts(yolo, 512), 1.0)
    assert len(checks) == 6
    assert all(check.passed and not check.remedy for check in checks)
    assert check_limits(TileBoxes((np.zeros((0, 4), np.float32),)), head_facts(yolo, 512), 1.0) == ()


def test_each_limit_has_its_own_complaint_and_remedy(yolo):
    head = head_facts(yolo, 512)
    crowded = failed([grid(5), grid(24, 20, 20)], head)
    assert set(crowded) == {"objects_per_tile"}
    assert crowded["objects_per_tile"].found == 576
    assert "--zoom 1.47" in crowded["objects_per_tile"].describe()  # sqrt(576 / 292) and a little more
    tiny = failed([grid(8, 4, 4)], head, zoom=0.5)
    assert set(tiny) == {"smallest_side_px"}
    assert "well served from 8" in tiny["smallest_side_px"].describe()
    assert "--zoom 1 (now 0.5)" in tiny["smallest_side_px"].describe()
    assert set(failed([grid(2, 200, 180)], head)) == {"longest_side_px"}
    assert set(failed([grid(4, 100, 12)], head)) == {"aspect_ratio"}
    twins = np.concatenate([grid(5), grid(2) + 3])
    assert set(failed([twins], head)) == {"overlapping_boxes"}
    assert failed([twins], head)["overlapping_boxes"].found == pytest.approx(4 / 29)
    huge = np.concatenate([grid(8), [[0, 0, 1000, 900]]]).astype(np.float32)
    assert set(failed([huge], head_facts(yolo, 1024))) == {"largest_side_px"}


def test_a_suggested_zoom_is_enough(yolo):
    """At the zoom that is suggested, as many objects as then fit on a tile are within the limit."""
    head = head_facts(yolo, 512)
    remedy = failed([grid(24, 20, 20)], head)["objects_per_tile"].remedy
    zoom = float(remedy.split("--zoom ")[1].split()[0])
    assert 576 / zoom**2 <= head.most_objects


@pytest.mark.parametrize(("free_gib", "preset"), [(64, "small"), (1.2, "smallest"), (0.01, "smallest")])
def test_the_batch_follows_the_memory(yolo, monkeypatch, free_gib, preset):
    monkeypatch.setattr(detector_plan, "free_bytes", lambda device: int(free_gib * 2**30))
    plan = plan_batch(yolo, 512, 60, DetectorSchedule())
    assert (plan.preset, plan.tiles) == (preset, PRESETS[preset])
    assert plan.fits == (free_gib > 1)
    assert f"{plan.tiles} tiles a step (preset {preset})" in plan.describe()
    assert ("may be too much" in plan.describe()) != plan.fits


def test_a_given_batch_is_kept_and_judged(yolo, monkeypatch):
    monkeypatch.setattr(detector_plan, "free_bytes", lambda device: 2**30)
    plan = plan_batch(yolo, 512, 60, DetectorSchedule(batch=24))
    assert (plan.preset, plan.tiles, plan.fits) == ("given", 24, False)


def test_planning_leaves_the_network_as_it_was(yolo):
    before = {name: value.clone() for name, value in yolo.network.state_dict().items()}
    needed = [plan_batch(yolo, side, 60, DetectorSchedule(batch=4)).needed_bytes for side in (64, 128, 256)]
    assert needed == sorted(needed)
    assert needed[2] - needed[1] > 3 * (needed[1] - needed[0])  # four times the area
    assert all((before[name] == value).all() for name, value in yolo.network.state_dict().items())
    assert not yolo.network.training
    assert not any(value.requires_grad for value in yolo.network.parameters())


def test_crowded_tiles_need_more_memory(yolo):
    few, many = (plan_batch(yolo, 256, boxes, DetectorSchedule(batch=4)).needed_bytes for boxes in (10, 800))
    assert many > few
