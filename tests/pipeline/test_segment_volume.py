"""A whole volume through the pipeline with synthetic graphs: outputs, resuming, refusals, faults."""

import contextlib
import csv
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
from synthetic_session import CountingFunction, detect_discs, draw_discs, encode_by_pooling, make_manifest, make_session

from dendsam_deploy.errors import (
    IncompleteRunError,
    InvalidArgumentError,
    MissingCapabilityError,
    ParityError,
    StorageError,
    VolumeError,
)
from dendsam_deploy.instances import Detections
from dendsam_deploy.pipeline.prepare import plan_tiles
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume
from dendsam_deploy.runtimes.session import Session

if TYPE_CHECKING:
    from dendsam_deploy.progress import Progress

DEPTH = 6
RESULT_FILES = ("labels.tif", "instances.csv", "detections.csv")


def draw_stack(depth: int = DEPTH) -> np.ndarray:
    """Two dendrites along z, one of which ends early, and an empty slice at the end."""
    slices = [draw_discs((96, 110), [(24, 20 + z, 9), (70, 80 - z, 11)][: 2 if z < 4 else 1]) for z in range(depth - 1)]
    return np.stack([*slices, np.zeros_like(slices[0])])


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "stack.tif"
    tifffile.imwrite(
        path,
        draw_stack(),
        imagej=True,
        resolution=(100.0, 100.0),
        metadata={"spacing": 0.04, "unit": "um", "axes": "ZYX"},
    )
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def content_of(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on how a run came about."""
    pieces = sorted((out / "slices").iterdir())
    return {path.name: path.read_bytes() for path in [*(out / name for name in RESULT_FILES), *pieces]}


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


def test_a_complete_run_is_returned_as_it_is(volume: Path):
    first = segment_volume(volume, make_session(), SegmentOptions())
    before = {path: path.stat().st_mtime_ns for path in first.out.rglob("*")}
    detector = CountingFunction(detect_discs)
    assert segment_volume(volume, make_session(detector=detector), SegmentOptions()) == first
    assert not detector.calls
    assert {path: path.stat().st_mtime_ns for path in first.out.rglob("*")} == before


def test_an_unproven_bundle_is_named_in_the_result(volume: Path):
    session = dataclasses.replace(make_session(), is_proven=False)
    assert "unproven" in segment_volume(volume, session, SegmentOptions()).notices[0]


def interrupting_session(calls: int) -> Session:
    """A session whose detector is interrupted, as by Ctrl-C, in the given call."""
    count = iter(range(calls))

    def detector(inputs):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return detect_discs(inputs)

    return make_session(detector=detector)


def test_an_interrupted_run_resumes_and_equals_an_uninterrupted_one(volume: Path):
    whole = segment_volume(volume, make_session(), SegmentOptions(out=volume.parent / "whole"))
    tiles = len(plan_tiles((96, 110), make_manifest().preprocessing, None, None).tiles)
    with pytest.raises(IncompleteRunError, match=r"interrupted with [123] of 6 slices finished; run the same command"):
        segment_volume(volume, interrupting_session(3 * tiles), SegmentOptions())
    detector = CountingFunction(detect_discs)
    result = segment_volume(volume, make_session(detector=detector), SegmentOptions())
    assert 1 <= result.resumed_slices <= 3
    assert len(detector.calls) == (DEPTH - result.resumed_slices) * tiles
    assert content_of(result.out) == content_of(whole.out)


@pytest.mark.parametrize("damage", ["delete", "alter", "truncate"])
def test_a_piece_that_is_not_proven_is_done_again(volume: Path, damage: str):
    first = segment_volume(volume, make_session(), SegmentOptions())
    before = content_of(first.out)
    piece = first.out / "slices" / "000002.npz"
    if damage == "delete":
        piece.unlink()
    else:
        data = piece.read_bytes()
        piece.write_bytes(data[:-9] if damage == "truncate" else data[:-9] + b"x" * 9)
    again = segment_volume(volume, make_session(), SegmentOptions())
    assert again.resumed_slices == DEPTH - 1
    assert content_of(first.out) == before


@pytest.mark.parametrize("name", [*RESULT_FILES, "run.json"])
def test_a_lost_output_is_made_again_from_the_slices(volume: Path, name: str):
    first = segment_volume(volume, make_session(), SegmentOptions())
    before = content_of(first.out)
    (first.out / name).unlink()
    detector = CountingFunction(detect_discs)
    segment_volume(volume, make_session(detector=detector), SegmentOptions())
    assert content_of(first.out) == before
    assert (first.out / "run.json").is_file()
    assert not detector.calls


def test_a_journal_cut_in_the_middle_of_a_line_proves_the_lines_before(volume: Path):
    first = segment_volume(volume, make_session(), SegmentOptions())
    before = content_of(first.out)
    journal = first.out / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    assert segment_volume(volume, make_session(), SegmentOptions()).resumed_slices == DEPTH - 1
    assert content_of(first.out) == before
    assert all(json.loads(line) for line in journal.read_text().splitlines())


OTHER_SETTINGS = {
    "slices": (0, 5),
    "detection_score": 0.5,
    "nms_iou": 0.5,
    "min_area_px": 3.0,
    "linker": "iou-greedy",
    "format": "ome-zarr",
    "voxel_size_nm": (50.0, 10.0, 10.0),
    "zoom": 2.0,
    "boxes": None,
}
NOT_IN_THE_FINGERPRINT = {"out", "restart"}


class FixedBoxes:
    """The same two boxes in every slice."""

    def __init__(self, score: float = 0.1) -> None:
        self.score = score

    def for_slice(self, z: int) -> Detections:
        boxes = np.array([[10, 10, 30, 30], [60, 60, 90, 85]], np.float32)
        return Detections(boxes, np.full(2, self.score, np.float32))


OTHER_SETTINGS["boxes"] = FixedBoxes()


def test_every_option_is_in_the_fingerprint_or_on_the_list_of_exceptions():
    assert {
        field.name for field in dataclasses.fields(SegmentOptions)
    } == OTHER_SETTINGS.keys() | NOT_IN_THE_FINGERPRINT


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_are_refused_with_the_difference(volume: Path, name: str):
    first = segment_volume(volume, make_session(), SegmentOptions())
    before = content_of(first.out)
    changed = dataclasses.replace(SegmentOptions(), **{name: OTHER_SETTINGS[name]})
    with pytest.raises(InvalidArgumentError, match=r"other settings \(.* -> .*\); restore them") as caught:
        segment_volume(volume, make_session(), changed)
    assert "\n" not in str(caught.value)
    assert content_of(first.out) == before
    restarted = segment_volume(volume, make_session(), dataclasses.replace(changed, restart=True))
    assert restarted.fingerprint != first.fingerprint
    assert restarted.resumed_slices == 0


def test_other_weights_are_refused(volume: Path):
    segment_volume(volume, make_session(), SegmentOptions())
    manifest = make_manifest()
    graphs = [
        dataclasses.replace(graph, files=(dataclasses.replace(graph.files[0], sha256="other"),))
        for graph in manifest.graphs
    ]
    other = make_session(dataclasses.replace(manifest, graphs=tuple(graphs)))
    with pytest.raises(InvalidArgumentError, match=r"bundle\.graphs\.decoder.*other"):
        segment_volume(volume, other, SegmentOptions())


def test_another_input_is_refused_even_where_the_sample_is_the_same(volume: Path):
    segment_volume(volume, make_session(), SegmentOptions())
    stack = tifffile.imread(volume)
    stack[1, 50, 50] = 7
    tifffile.imwrite(
        volume, stack, imagej=True, resolution=(100.0, 100.0), metadata={"spacing": 0.04, "unit": "um", "axes": "ZYX"}
    )
    with pytest.raises(InvalidArgumentError, match=r"slice 1 of .* has changed"):
        segment_volume(volume, make_session(), SegmentOptions())
    stack[0, 50, 50] = 7
    tifffile.imwrite(
        volume, stack, imagej=True, resolution=(100.0, 100.0), metadata={"spacing": 0.04, "unit": "um", "axes": "ZYX"}
    )
    with pytest.raises(InvalidArgumentError, match=r"input\.sample_sha256\.0"):
        segment_volume(volume, make_session(), SegmentOptions())


def test_a_touched_but_equal_input_is_accepted(volume: Path):
    first = segment_volume(volume, make_session(), SegmentOptions())
    os.utime(volume, (1, 1))
    assert segment_volume(volume, make_session(), SegmentOptions()) == first


def test_a_folder_with_something_else_is_refused_and_left_alone(volume: Path):
    out = volume.parent / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("...")
    for restart in (False, True):
        with pytest.raises(InvalidArgumentError, match="no run of this program"):
            segment_volume(volume, make_session(), SegmentOptions(out=out, restart=restart))
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_restarting_removes_only_what_runs_make(volume: Path):
    first = segment_volume(volume, make_session(), SegmentOptions())
    (first.out / "notes.txt").write_text("mine")
    (first.out / "report.html").write_text("old")
    with pytest.raises(InvalidArgumentError, match="no run of this program"):
        segment_volume(volume, make_session(), SegmentOptions(restart=True, zoom=2.0))
    assert (first.out / "notes.txt").read_text() == "mine"


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


class FailingDisk:
    """Lets a number of flushes and renames pass and then refuses all: a disk that fills up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.left = allowed
        self.failed = False
        self.lock = threading.Lock()
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename")):
            monkeypatch.setattr(module, name, self.wrapped(getattr(module, name)))

    def wrapped(self, operation):
        def call(*args, **options):
            with self.lock:
                self.left -= 1
                if self.left < 0:
                    self.failed = True
                    raise OSError(errno.ENOSPC, "No space left on device")
            return operation(*args, **options)

        return call


def test_a_full_disk_at_any_operation_leaves_a_run_that_resumes(volume: Path):
    whole = segment_volume(volume, make_session(), SegmentOptions(out=volume.parent / "whole", slices=(0, 3)))
    out = volume.parent / "full"
    for allowed in range(500):
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, allowed)
            with contextlib.suppress(StorageError):
                segment_volume(volume, make_session(), SegmentOptions(out=out, slices=(0, 3)))
        if not disk.failed:
            break
        if allowed % 3:  # resume from what every third failure left, and begin anew after the others
            shutil.rmtree(out, ignore_errors=True)
        else:
            segment_volume(volume, make_session(), SegmentOptions(out=out, slices=(0, 3)))
            assert content_of(out) == content_of(whole.out)
            shutil.rmtree(out)
    assert 10 < allowed < 499
    assert content_of(out) == content_of(whole.out)


KILLED_SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from synthetic_session import detect_discs, make_session
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume

def slowly(inputs):
    time.sleep(0.002)
    return detect_discs(inputs)

print("ready", flush=True)
segment_volume(Path(sys.argv[1]), make_session(detector=slowly), SegmentOptions(out=Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(volume: Path):
    whole = segment_volume(volume, make_session(), SegmentOptions(out=volume.parent / "whole"))
    out = volume.parent / "killed"
    command = [sys.executable, "-c", KILLED_SCRIPT, str(volume), str(out), str(Path(__file__).parent)]
    rng = np.random.default_rng(0)
    kills = 0
    for attempt in range(60):  # each gets a little longer than the one before, so that one of them ends
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(timeout=rng.uniform(0, 0.06) * (attempt + 1))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.stdout.close()
        if process.wait() == 0:
            break
    assert process.returncode == 0
    assert kills >= 2
    assert content_of(out) == content_of(whole.out)


def test_memory_does_not_grow_with_the_number_of_slices(tmp_path: Path):
    """Keeping one array of each slice would double the peak of the deeper volume."""
    session = make_session(make_manifest(tile_size=512, overlap=64))
    image = draw_discs((512, 512), [(100, 90, 30), (300, 350, 60)])
    peaks = []
    for depth in (4, 4, 16):  # the first run pays for imports
        tifffile.imwrite(tmp_path / f"{depth}.tif", np.stack([image] * depth), photometric="minisblack")
        tracemalloc.start()
        segment_volume(tmp_path / f"{depth}.tif", session, SegmentOptions(restart=True))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]


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
