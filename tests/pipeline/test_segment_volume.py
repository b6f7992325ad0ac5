"""A whole volume through the pipeline with synthetic graphs: outputs, options, memory, errors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
from stack_runs import DEPTH, RESULT_FILES, FixedBoxes, draw_stack, read_rows
from synthetic_session import detect_discs, draw_discs, encode_by_pooling, make_manifest, make_session

from dendsam_deploy.errors import (
    InvalidArgumentError,
    MissingCapabilityError,
    ParityError,
    VolumeError,
)
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume

if TYPE_CHECKING:
    from dendsam_deploy.progress import Progress


def test_the_result_is_the_folder_that_the_contract_describes(volume: Path):
    seen: list[Progress] = []
    result = segment_volume(volume, make_session(), SegmentOptions(), seen.append)

    assert result.out == volume.with_name("stack.tif.dendsam")
    assert (result.slices, result.objects_2d, result.objects_3d) == (DEPTH, 9, 2)
    assert {path.name for path in result.out.iterdir()} == {*RESULT_FILES, "run.json", "journal.jsonl", "slices"}
    labels = tifffile.imread(result.out / "labels.tif")
    truth = draw_stack()
    assert labels.dtype == np.uint8
    assert labels.shape == truth.shape
    assert ((labels > 0) == (truth > 0)).mean() > 0.99
    assert [set(np.unique(labels[:, 24, 24])), set(np.unique(labels[:, 70, 78]))] == [{0, 1}, {0, 2}]

    detections = read_rows(result.out / "detections.csv")
    assert len(detections) == 9
    for row in detections:
        assert (labels[int(row["z"])] == int(row["id"])).sum() == int(row["area_px"])
    instances = read_rows(result.out / "instances.csv")
    assert [(row["id"], row["z_first"], row["z_last"], row["slices"]) for row in instances] == [
        ("1", "0", "4", "5"),
        ("2", "0", "3", "4"),
    ]
    assert [int(row["voxels"]) for row in instances] == np.bincount(labels.ravel())[1:].tolist()
    assert float(instances[0]["volume_um3"]) == pytest.approx(int(instances[0]["voxels"]) * 10 * 10 * 40e-9)
    places = np.argwhere(labels == 1) + 0.5
    for axis, name in enumerate(("centroid_z", "centroid_y", "centroid_x")):
        assert float(instances[0][name]) == pytest.approx(places[:, axis].mean(), abs=0.006)
    assert [int(instances[0][name]) for name in ("y0", "x0")] == np.argwhere(labels == 1)[:, 1:].min(axis=0).tolist()

    assert [step.stage for step in seen[:: len(seen) - 1]] == ["segment", "publish"]
    assert seen[-1].done == seen[-1].total == DEPTH


def test_the_record_holds_the_result_the_settings_and_the_environment(volume: Path):
    result = segment_volume(volume, make_session(), SegmentOptions(slices=(1, 3)))
    record = json.loads((result.out / "run.json").read_text())
    assert record["result"] == result.to_document()
    assert record["z_offset"] == 1
    assert record["settings"]["recipe"]["detect"]["score"] == make_manifest().thresholds.detection_score
    assert record["environment"]["packages"]["numpy"] == np.__version__
    assert (record["environment"]["compiled_engines"], record["environment"]["trusted_engines"]) == ({}, [])
    trusting = replace(make_session(), trusted_engines=("ab" * 32,))
    result = segment_volume(volume, trusting, SegmentOptions(slices=(1, 3), out=volume.parent / "trusting"))
    record = json.loads((result.out / "run.json").read_text())
    assert record["environment"]["trusted_engines"] == ["ab" * 32], "whom one trusted has to be known afterwards"
    expected_keys = "out slices objects_2d objects_3d seconds stage_seconds limiting_stage engine device precision"
    assert {*expected_keys.split(), "fingerprint"} <= result.to_document().keys()
    assert result.limiting_stage in result.stage_seconds


def test_a_range_of_slices_gives_labels_of_those_slices(volume: Path):
    whole = segment_volume(volume, make_session(), SegmentOptions(out=volume.parent / "whole"))
    part = segment_volume(volume, make_session(), SegmentOptions(out=volume.parent / "part", slices=(2, 5)))
    labels = tifffile.imread(part.out / "labels.tif")
    np.testing.assert_array_equal(labels > 0, tifffile.imread(whole.out / "labels.tif")[2:5] > 0)
    assert {row["z"] for row in read_rows(part.out / "detections.csv")} == {"2", "3", "4"}


def test_zarr_comes_out_when_asked_for(volume: Path):
    result = segment_volume(volume, make_session(), SegmentOptions(format="ome-zarr"))
    assert (result.out / "labels.ome.zarr").is_dir()
    assert not (result.out / "labels.tif").exists()
    assert segment_volume(volume, make_session(), SegmentOptions(format="ome-zarr")) == result


def test_a_two_dimensional_image_counts_as_one_slice(tmp_path: Path):
    tifffile.imwrite(tmp_path / "one.tif", draw_stack()[0])
    result = segment_volume(tmp_path / "one.tif", make_session(), SegmentOptions())
    assert (result.slices, result.objects_3d) == (1, 2)
    assert any("voxel size" in notice for notice in result.notices)


def test_an_unproven_bundle_is_named_in_the_result(volume: Path):
    session = dataclasses.replace(make_session(), is_proven=False)
    assert "unproven" in segment_volume(volume, session, SegmentOptions()).notices[0]


def test_a_folder_with_something_else_is_refused_and_left_alone(volume: Path):
    out = volume.parent / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("...")
    for restart in (False, True):
        with pytest.raises(InvalidArgumentError, match="no run of this program"):
            segment_volume(volume, make_session(), SegmentOptions(out=out, restart=restart))
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["labels.tif", "report.html", "slices/000000.npz"])
def test_without_a_journal_nothing_is_taken_for_a_run(volume: Path, name: str):
    """A folder with the labels that somebody drew must not be taken over because they have the usual name."""
    precious = volume.parent / "precious" / name
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    for restart in (False, True):
        with pytest.raises(InvalidArgumentError, match="no run of this program"):
            segment_volume(volume, make_session(), SegmentOptions(out=volume.parent / "precious", restart=restart))
    assert precious.read_text() == "mine"


def test_what_a_kill_before_the_journal_leaves_is_no_obstacle(volume: Path):
    out = volume.parent / "begun"
    (out / "slices").mkdir(parents=True)
    (out / ".journal.jsonl.partial").write_text("{")
    assert segment_volume(volume, make_session(), SegmentOptions(out=out)).slices == DEPTH


def test_restarting_removes_only_what_runs_make(volume: Path):
    first = segment_volume(volume, make_session(), SegmentOptions(format="ome-zarr"))
    (first.out / "notes.txt").write_text("mine")
    (first.out / "report.html").write_text("old")
    (first.out / "labels.ome.zarr.old").mkdir()
    (first.out / "labels.ome.zarr.partial").mkdir()
    again = segment_volume(volume, make_session(), SegmentOptions(restart=True, zoom=2.0))
    assert again.resumed_slices == 0
    assert again.fingerprint != first.fingerprint
    assert {path.name for path in first.out.iterdir()} == {
        *RESULT_FILES, "run.json", "journal.jsonl", "slices", "notes.txt"
    }  # fmt: skip
    assert (first.out / "notes.txt").read_text() == "mine"


def test_the_folder_of_a_volume_that_is_the_current_folder_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "stack").mkdir()
    for z, image in enumerate(draw_stack()):
        tifffile.imwrite(tmp_path / "stack" / f"{z}.tif", image)
    monkeypatch.chdir(tmp_path / "stack")
    assert segment_volume(Path(), make_session(), SegmentOptions()).out == tmp_path / "stack.dendsam"


def test_boxes_replace_the_detector_and_are_taken_as_they_are(volume: Path):
    session = dataclasses.replace(make_session(), detector=None)
    result = segment_volume(volume, session, SegmentOptions(boxes=FixedBoxes()))
    assert result.objects_2d == 2 * DEPTH
    with pytest.raises(InvalidArgumentError, match="boxes: "):
        segment_volume(volume, session, SegmentOptions(boxes=FixedBoxes(0.2)))
    fewer = SegmentOptions(boxes=FixedBoxes(), detection_score=0.5, out=volume.parent / "fewer")
    assert segment_volume(volume, session, fewer).objects_2d == 0
    with pytest.raises(MissingCapabilityError, match="--boxes"):
        segment_volume(volume, session, SegmentOptions())


@pytest.mark.parametrize("slices", [(0, 7), (3, 3), (-1, 2), (4, 2)])
def test_slices_outside_the_volume_are_refused(volume: Path, slices: tuple[int, int]):
    with pytest.raises(InvalidArgumentError, match="0:6"):
        segment_volume(volume, make_session(), SegmentOptions(slices=slices))


def test_a_broken_slice_names_itself_and_keeps_what_is_finished(tmp_path: Path):
    stack = draw_stack().astype(np.float32)
    stack[3, 0, 0] = np.nan
    tifffile.imwrite(tmp_path / "stack.tif", stack)
    with pytest.raises(VolumeError, match=r"stack\.tif: slice 3"):
        segment_volume(tmp_path / "stack.tif", make_session(), SegmentOptions())
    assert (tmp_path / "stack.tif.dendsam" / "slices" / "000002.npz").is_file()
    assert not (tmp_path / "stack.tif.dendsam" / "labels.tif").exists()


def test_an_error_of_a_graph_stops_the_run_and_frees_its_threads(volume: Path):
    def broken(inputs):
        outputs = encode_by_pooling(inputs)
        outputs["embeddings"][:] = np.inf
        return outputs

    with pytest.raises(ParityError):
        segment_volume(volume, make_session(encoder=broken), SegmentOptions())
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("slice-")]


def test_reading_runs_ahead_by_a_bounded_number_of_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While slice k is computed, at most slice k + 3 has been touched: memory stays flat however deep the volume is."""
    from dendsam_deploy.pipeline import run  # noqa: PLC0415  (only this test looks behind the door)

    tifffile.imwrite(tmp_path / "deep.tif", draw_stack(20))
    read: list[int] = []
    load = run._load

    def counting_load(job, z):
        read.append(z)
        return load(job, z)

    ahead: list[int] = []

    def slow_detector(inputs):
        time.sleep(0.0005)
        ahead.append(max(read))
        return detect_discs(inputs)

    monkeypatch.setattr(run, "_load", counting_load)
    segment_volume(tmp_path / "deep.tif", make_session(detector=slow_detector), SegmentOptions())
    tiles = len(ahead) // 20
    assert max(last - index // tiles for index, last in enumerate(ahead)) <= 3


def test_memory_does_not_grow_with_the_number_of_slices(tmp_path: Path):
    """Keeping one array of each slice would triple the peak of the deeper volume; how much overlaps is chance."""
    session = make_session(make_manifest(tile_size=512, overlap=64))
    image = draw_discs((512, 512), [(100, 90, 30), (300, 350, 60)])
    peaks = []
    for depth in (8, 8, 48):  # the first run pays for imports
        tifffile.imwrite(tmp_path / f"{depth}.tif", np.stack([image] * depth), photometric="minisblack")
        tracemalloc.start()
        segment_volume(tmp_path / f"{depth}.tif", session, SegmentOptions(restart=True))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1]


def test_segmenting_loads_nothing_that_trains_or_exports(volume: Path):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from synthetic_session import make_session
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume
segment_volume(Path({str(volume)!r}), make_session(), SegmentOptions())
print([name for name in ("torch", "torchvision", "onnx", "ultralytics", "segment_anything") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
