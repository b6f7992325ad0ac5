"""``finetune sam``: options reach the training, the checkpoint can be used, an interrupted run is not mixed up.

The detector's command is run by `tests/test_readme.py`, its training by `tests/training`.
"""

from __future__ import annotations

import pytest


@pytest.fixture
def finetune(run, discs, random_sam, tmp_path):
    def call(*words: object):
        given = ["--start", random_sam, "--zoom", 1, "--holdout", 0.25, "--gap", 0, "-o", tmp_path / "sam.pt", *words]
        return run("finetune", "sam", discs / "raw.tif", discs / "labels.tif", *given)

    return call


def test_a_short_training(finetune, run, tmp_path) -> None:
    document = finetune("--steps", 2, "--seed", 3, "--voxel-size", "40,10,10", "--json", "-").document
    assert document["out"] == str(tmp_path / "sam.pt")
    assert (document["train_slices"], document["held_out_slices"]) == ([0, 3], [3, 4])
    assert document["steps"] == 2
    assert document["model_pixel_size_nm"] == 10
    facts = run("info", tmp_path / "sam.pt", "--json", "-").document
    assert (facts["architecture"], facts["image_size_px"]) == ("tiny", 64)
    assert facts["training"]["seed"] == 3


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--slices", "0:9"], "slices 0:9 do not lie in a volume of 4 slices"),
        (["--slices", "2:3"], "give more slices"),
        (["--holdout", "1"], "give a fraction of 0 to below 1"),
        (["--model", "vit_b"], "holds a tiny, but vit_b was asked for"),
        (["--image-size", "100"], "multiple"),
        (["--background-label", "1", "--background-label", "2", "--background-label", "3"], "no object"),
    ],
)
def test_options_that_do_not_fit(finetune, words, part) -> None:
    outcome = finetune(*words)
    assert outcome.code in (2, 4)
    assert part in outcome.message
