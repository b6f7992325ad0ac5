"""A training of SAM that is killed and started again ends, bit by bit, as one that was left alone."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from labelled_discs import write_discs

from dendsam_deploy.models.weights import load_sam
from dendsam_deploy.training.finetune import finetune_sam
from dendsam_deploy.training.sam_options import FinetuneSamOptions, SamTrainingOptions

STEPS, JUDGE_STEPS = 8, 2


def arguments(folder, out):
    """Return a command whose state is as manifold as it can be: adapters, a plateau, points, boxes and masks."""
    words = ["finetune", "sam", folder / "raw.tif", folder / "labels.tif", "-o", out, "--from-scratch"]
    words += ["--image-size", 64, "--gap", 1, "--zoom", 1, "--steps", STEPS, "--judge-steps", JUDGE_STEPS]
    words += ["--protocol", "published", "--train", "lora", "--objects", 1, "--learning-rate", 1e-3, "--seed", 5]
    return [str(word) for word in words]


def finished(folder, out):
    """Do what the command does, in this process."""
    schedule = SamTrainingOptions(
        minutes=None,
        steps=STEPS,
        judge_steps=JUDGE_STEPS,
        protocol="published",
        train="lora",
        objects_per_tile=1,
        learning_rate=1e-3,
        seed=5,
    )
    options = FinetuneSamOptions(out, from_scratch=True, image_size=64, gap=1, zoom=1.0, schedule=schedule)
    return finetune_sam(folder / "raw.tif", folder / "labels.tif", options)


def judged_steps(out) -> list[int]:
    """Return the steps of the judgements that the logbook knows."""
    path = out.with_name(f"{out.stem}.training") / "history.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as stream:
        return [int(row["step"]) for row in csv.DictReader(stream)]


def kill_at(folder, out, judgement) -> None:
    """Start the command and kill it, with a signal that nothing can catch, behind its n-th judgement."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "dendsam_deploy", *arguments(folder, out)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(judged_steps(out)) <= judgement and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was finished before it was killed"


@pytest.mark.slow
def test_a_killed_training_ends_as_one_that_was_left_alone(tmp_path):
    write_discs(tmp_path)
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    expected = finished(tmp_path, whole)
    judgement = random.Random().randint(1, 3)
    kill_at(tmp_path, broken, judgement)
    assert not broken.exists()
    assert (tmp_path / ".broken.pt.resume").is_file()
    random.seed(), torch.rand(3)  # nothing of the new process's randomness may matter
    result = finished(tmp_path, broken)
    assert result.resumed, f"killed behind judgement {judgement}"
    first, second = (load_sam(path).sam.state_dict() for path in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first), f"killed behind judgement {judgement}"
    assert judged_steps(broken) == judged_steps(whole) == list(range(0, STEPS + 1, JUDGE_STEPS))
    assert [row[2:] for row in result.history] == [row[2:] for row in expected.history]
    assert result.scores == expected.scores
    assert not (tmp_path / ".broken.pt.resume").exists()
