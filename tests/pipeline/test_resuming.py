"""Runs that stop and go on: what proves a finished slice, what is refused, what faults and kills leave."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
from stack_runs import DEPTH, RESULT_FILES, FixedBoxes, content_of, draw_stack
from synthetic_session import CountingFunction, detect_discs, make_manifest, make_session

from dendsam_deploy.errors import (
    IncompleteRunError,
    InvalidArgumentError,
    StorageError,
    VolumeError,
)
from dendsam_deploy.pipeline.prepare import plan_tiles
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume

if TYPE_CHECKING:
    from dendsam_deploy.runtimes.session import Session


def test_a_complete_run_is_returned_as_it_is(volume: Path):
    first = segment_volume(volume, make_session(), SegmentOptions())
    before = {path: path.stat().st_mtime_ns for path in first.out.rglob("*")}
    detector = CountingFunction(detect_discs)
    assert segment_volume(volume, make_session(detector=detector), SegmentOptions()) == first
    assert not detector.calls
    assert {path: path.stat().st_mtime_ns for path in first.out.rglob("*")} == before


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


def test_two_processes_cannot_work_in_one_folder(volume: Path):
    out = volume.parent / "shared"
    script = KILLED_SCRIPT.replace("0.002", "1.0")
    command = [sys.executable, "-c", script, str(volume), str(out), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
        try:
            for _ in range(600):
                if (out / "journal.jsonl").exists():
                    break
                time.sleep(0.05)
            with pytest.raises(InvalidArgumentError, match="another run is at work there"):
                segment_volume(volume, make_session(), SegmentOptions(out=out))
        finally:
            other.kill()
    assert segment_volume(volume, make_session(), SegmentOptions(out=out)).slices == DEPTH


def test_a_run_that_finished_no_slice_is_in_nobodys_way(tmp_path: Path):
    stack = draw_stack().astype(np.float32)
    stack[0, 0, 0] = np.nan
    tifffile.imwrite(tmp_path / "stack.tif", stack)
    with pytest.raises(VolumeError, match="slice 0"):
        segment_volume(tmp_path / "stack.tif", make_session(), SegmentOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["stack.tif"]
    stack[0, 0, 0] = 0
    tifffile.imwrite(tmp_path / "stack.tif", stack)
    assert segment_volume(tmp_path / "stack.tif", make_session(), SegmentOptions()).slices == DEPTH
