"""Runs that examine the masks of a volume: resumed where they stopped, refused where they would mix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tifffile
from stack_runs import DEPTH, FixedBoxes, draw_stack
from synthetic_session import decode_ellipses, make_session

from dendsam_deploy.errors import IncompleteRunError, InvalidArgumentError
from dendsam_deploy.pipeline.job import SegmentOptions
from dendsam_deploy.pipeline.run import segment_volume
from dendsam_deploy.pipeline.scored_masks import ScoredSlice, ScoringOptions, score_masks
from dendsam_deploy.pipeline.stability import JitterOptions
from dendsam_deploy.volume.open import open_volume


def scored(volume, out, session=None, **wishes):
    options = ScoringOptions(SegmentOptions(out, **wishes), JitterOptions(repeats=2))
    with open_volume(volume) as opened:
        return score_masks(volume, opened, session or make_session(), options)


def content(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "slices").iterdir())}


class Mutiny:
    """A decoder that stops after some calls, as Ctrl-C does."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, inputs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return decode_ellipses(inputs)


def test_objects_are_those_that_segment_paints(volume, tmp_path) -> None:
    run = scored(volume, tmp_path / "a")
    segment_volume(volume, make_session(), SegmentOptions(tmp_path / "b"))
    assert list(run.slices) == list(range(DEPTH))
    for z, instances in run.instances():
        with np.load(tmp_path / "b" / "slices" / f"{z:06d}.npz") as other:
            np.testing.assert_array_equal(instances.areas_px, other["areas_px"])
            np.testing.assert_array_equal(instances.scores, other["scores"])
        assert len(run.load(z).stability) == len(instances)


@pytest.mark.parametrize("calls", [0, 3, 8])
def test_an_interrupted_run_ends_like_an_undisturbed_one(volume, tmp_path, calls) -> None:
    undisturbed = scored(volume, tmp_path / "a")
    with pytest.raises(IncompleteRunError, match="run the same command again"):
        scored(volume, tmp_path / "b", make_session(decoder=Mutiny(calls)))
    again = scored(volume, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert again.journal.header.fingerprint == undisturbed.journal.header.fingerprint


def test_a_flipped_bit_is_done_again_or_refused(volume, tmp_path) -> None:
    run = scored(volume, tmp_path / "a")
    before = content(tmp_path / "a")
    piece = tmp_path / "a" / "slices" / "000002.npz"
    damaged = bytearray(piece.read_bytes())
    damaged[100] ^= 1
    piece.write_bytes(damaged)
    with pytest.raises(IncompleteRunError, match="slice 2 is missing or altered"):
        run.load(2)
    scored(volume, tmp_path / "a")
    assert content(tmp_path / "a") == before


def test_other_settings_are_refused_with_the_difference(volume, tmp_path) -> None:
    scored(volume, tmp_path / "a")
    options = ScoringOptions(SegmentOptions(tmp_path / "a"), JitterOptions(repeats=3))
    with open_volume(volume) as opened, pytest.raises(InvalidArgumentError, match=r"jitter\.repeats: 2 -> 3"):
        score_masks(volume, opened, make_session(), options)
    with pytest.raises(InvalidArgumentError, match=r"detect\.score"):
        scored(volume, tmp_path / "a", detection_score=0.7)


def test_another_volume_under_the_same_name_is_refused(volume, tmp_path) -> None:
    with pytest.raises(IncompleteRunError):
        scored(volume, tmp_path / "a", make_session(decoder=Mutiny(8)))
    changed = draw_stack()
    changed[1] //= 2  # not among the slices that the settings sample
    tifffile.imwrite(
        volume, changed, imagej=True, resolution=(100.0, 100.0),
        metadata={"spacing": 0.04, "unit": "um", "axes": "ZYX"},
    )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match=r"slice 1 of .* has changed"):
        scored(volume, tmp_path / "a")


def test_boxes_from_elsewhere(volume, tmp_path) -> None:
    run = scored(volume, tmp_path / "a", boxes=FixedBoxes(0.4), slices=(1, 4))
    assert list(run.slices) == [1, 2, 3]
    assert all(len(instances) == 2 and (instances.scores == np.float32(0.4)).all() for _, instances in run.instances())


def test_a_slice_survives_its_file(volume, tmp_path) -> None:
    found = scored(volume, tmp_path / "a").load(1)
    again = ScoredSlice.from_bytes(found.to_bytes())
    np.testing.assert_array_equal(again.stability, found.stability)
    np.testing.assert_array_equal(again.instances.boxes_xyxy, found.instances.boxes_xyxy)
    assert again.to_bytes() == found.to_bytes()


def test_a_run_needs_a_folder(volume) -> None:
    options = ScoringOptions(replace(SegmentOptions(), out=None))
    with open_volume(volume) as opened, pytest.raises(InvalidArgumentError, match="needs a folder"):
        score_masks(volume, opened, make_session(), options)
