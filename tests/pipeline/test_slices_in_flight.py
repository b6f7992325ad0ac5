"""Reading, graphs, painting and writing at the same time: what overlaps, what is bounded, what an end leaves."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
import tifffile
from stack_runs import DEPTH, content_of, draw_stack
from synthetic_session import detect_discs, make_manifest, make_session

from dendsam_deploy.errors import DendsamError, IncompleteRunError
from dendsam_deploy.pipeline import run
from dendsam_deploy.pipeline.prepare import plan_tiles
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TILES = len(plan_tiles((96, 110), make_manifest().preprocessing, None, None).tiles)
PATIENCE_S = 20


def watch_painter(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Call a function with the number of the slice that is about to be painted."""
    paint = run.paint_masks
    count = iter(range(10**6))

    def watched(*arguments):
        before(next(count))
        return paint(*arguments)

    monkeypatch.setattr(run, "paint_masks", watched)


def test_a_slice_is_painted_while_the_next_is_in_the_graphs(volume: Path, monkeypatch: pytest.MonkeyPatch):
    detecting = [threading.Event() for _ in range(DEPTH)]
    calls = iter(range(DEPTH * TILES))

    def detector(inputs):
        detecting[next(calls) // TILES].set()
        return detect_discs(inputs)

    def wait_for_the_next(z: int) -> None:
        if z + 1 < DEPTH:
            assert detecting[z + 1].wait(PATIENCE_S), "the graphs wait for the painter"

    watch_painter(monkeypatch, wait_for_the_next)
    assert segment_volume(volume, make_session(detector=detector), SegmentOptions()).slices == DEPTH


def test_the_graphs_wait_for_a_slow_painter_so_that_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tifffile.imwrite(tmp_path / "deep.tif", draw_stack(15))
    painted: list[int] = []
    lead: list[int] = []
    calls = iter(range(15 * TILES))

    def detector(inputs):
        lead.append(next(calls) // TILES - len(painted))
        return detect_discs(inputs)

    def slowly(z: int) -> None:
        time.sleep(0.01)
        painted.append(z)

    watch_painter(monkeypatch, slowly)
    segment_volume(tmp_path / "deep.tif", make_session(detector=detector), SegmentOptions())
    assert 1 < max(lead) <= 3


def test_what_the_graphs_have_finished_is_kept_when_a_run_is_interrupted(volume: Path, monkeypatch: pytest.MonkeyPatch):
    calls = iter(range(2 * TILES))

    def detector(inputs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return detect_discs(inputs)

    whole = segment_volume(volume, make_session(), SegmentOptions(out=volume.parent / "whole"))
    with monkeypatch.context() as patch:
        watch_painter(patch, lambda z: time.sleep(0.1))
        with pytest.raises(IncompleteRunError, match="interrupted with 2 of 6 slices"):
            segment_volume(volume, make_session(detector=detector), SegmentOptions())
    result = segment_volume(volume, make_session(), SegmentOptions())
    assert result.resumed_slices == 2
    assert content_of(result.out) == content_of(whole.out)


def test_a_painter_that_fails_ends_the_run_and_its_threads(volume: Path, monkeypatch: pytest.MonkeyPatch):
    class BrokenBrushError(DendsamError):
        """What the painter raises."""

    def fail(z: int) -> None:
        if z == 1:
            raise BrokenBrushError

    with monkeypatch.context() as patch:
        watch_painter(patch, fail)
        with pytest.raises(BrokenBrushError):
            segment_volume(volume, make_session(), SegmentOptions())
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("slice-")]
    assert segment_volume(volume, make_session(), SegmentOptions()).resumed_slices >= 1
