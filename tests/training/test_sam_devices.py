"""Several processes that train one model: the same as one process that accumulates their batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from labelled_discs import failing_work, large_work, write_discs

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError, VolumeError
from dendsam_deploy.models.weights import load_sam
from dendsam_deploy.progress import no_progress
from dendsam_deploy.training.finetune import finetune_sam
from dendsam_deploy.training.launcher import run_in_team
from dendsam_deploy.training.sam_options import FinetuneSamOptions, SamTrainingOptions

SCHEDULE = SamTrainingOptions(
    minutes=None, steps=3, judge_steps=2, objects_per_tile=2, judge_slices=1, learning_rate=1e-3, point_fraction=0.5
)


def options_of(out, **changes):
    schedule = dataclasses.replace(SCHEDULE, **changes)
    return FinetuneSamOptions(out, from_scratch=True, image_size=64, gap=1, zoom=1.0, schedule=schedule)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_twice_the_batches(tmp_path):
    write_discs(tmp_path)
    paths = tmp_path / "raw.tif", tmp_path / "labels.tif"
    alone = finetune_sam(*paths, options_of(tmp_path / "one.pt", accumulate=2))
    seen = []
    together = finetune_sam(*paths, options_of(tmp_path / "two.pt", devices=2, accumulate=1), seen.append)
    assert [row[0] for row in together.history] == [row[0] for row in alone.history] == [0, 2, 3]
    assert {entry.stage for entry in seen} == {"plan", "train"}
    # The running mean of the loss holds what the weights were behind every step, whichever were the best.
    first, second = ([row[3] for row in result.history[1:]] for result in (alone, together))
    assert second == pytest.approx(first, rel=1e-4)
    first, second = (load_sam(tmp_path / name).sam.state_dict() for name in ("one.pt", "two.pt"))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4)
    assert together.held_out_iou == pytest.approx(alone.held_out_iou, abs=0.02)


def test_what_goes_wrong_in_a_process_is_told_as_if_there_were_none():
    with pytest.raises(VolumeError, match=r"^raw\.tif: found by process 0 of 1$"):
        run_in_team(failing_work, ("raw.tif",), SCHEDULE, no_progress)


def test_a_result_may_be_large():
    seen = []
    result = run_in_team(large_work, (3,), SCHEDULE, seen.append)
    assert result.shape == (3, 1 << 20)
    assert (result == 1).all()
    assert [entry.stage for entry in seen] == ["train"]


def test_devices_that_are_not_there(tmp_path):
    write_discs(tmp_path)
    paths = tmp_path / "raw.tif", tmp_path / "labels.tif"
    with pytest.raises(InvalidArgumentError, match="cuda:0 names one GPU, but 2 devices were asked for"):
        finetune_sam(*paths, options_of(tmp_path / "sam.pt", device="cuda:0", devices=2))
    with pytest.raises(MissingCapabilityError, match="99 GPUs were asked for"):
        finetune_sam(*paths, options_of(tmp_path / "sam.pt", device="cuda", devices=99))
