"""``finetune sam``: options reach the training, the checkpoint can be used, an interrupted run is not mixed up.

The detector's command is run by `tests/test_readme.py`, its training by `tests/training`.
"""

from __future__ import annotations

import csv
import json

import pytest
import torch

from dendsam_deploy.cli.finetune_sam import HEADINGS


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


def test_the_published_protocol_with_adapters(finetune, random_sam, tmp_path) -> None:
    """Every option reaches the training; the checkpoint is a plain SAM, and its course lies beside it."""
    words = ["--protocol", "published", "--train", "lora", "--lora-rank", 2, "--objects", 1]
    words += ["--box-jitter", "0.1", "--exact-fraction", 0.5, "--learning-rate", 0.001, "--rate", "cosine"]
    words += ["--clip-norm", 2, "--min-object", 30, "--preset", "small", "--tiles", 2, "--accumulate", 2]
    words += ["--precision", "fp32", "--checkpointing"]
    outcome = finetune("--steps", 1, "--judge-steps", 1, "--patience", 5, *words, "--json", "-")
    document, plan = outcome.document, outcome.document["plan"]
    expected = {
        "protocol": "published",
        "preset": "small",
        "tiles_per_step": 2,
        "accumulate": 2,
        "objects_per_tile": 1,
        "precision": "fp32",
        "checkpointing": True,
        "learning_rate": 0.001,
        "rate": "cosine",
        "clip_norm": 2,
        "box_jitter": [0.1, 0.1],
        "exact_fraction": 0.5,
    }
    assert {name: plan[name] for name in expected} == expected
    assert "protocol published: interactive" in outcome.err
    assert (
        "preset small: 2 tiles x 2 a step, at most 1 objects each, fp32, encoder blocks computed twice" in outcome.err
    )
    assert document["scores"].keys() == document["first_scores"].keys() == {"box", "jittered", "point"}
    assert document["scores"]["box"] == pytest.approx(document["held_out_iou"], abs=1e-3)
    state = torch.load(tmp_path / "sam.pt", weights_only=True)["model_state"]
    assert state.keys() == torch.load(random_sam, weights_only=True)["model_state"].keys()

    course = tmp_path / "sam.training"
    with (course / "history.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [0, 1]
    assert [float(row["held_out_iou"]) for row in rows] == pytest.approx([row[2] for row in document["history"]])
    assert all(row["loss"] and row["learning_rate"] for row in rows[1:])
    config = json.loads((course / "config.json").read_text(encoding="utf-8"))
    assert config["options"]["schedule"]["min_object_px"] == 30
    page = (course / "report.html").read_text(encoding="utf-8")
    assert "LoRA of rank 2" in page
    assert document["report"] == str(course / "report.html")


def test_steps_alone_leave_nothing_to_the_clock(finetune, tmp_path) -> None:
    states = []
    for _ in range(2):
        finetune("--steps", 2, "--seed", 4, "--no-resume")
        states.append(torch.load(tmp_path / "sam.pt", weights_only=True)["model_state"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_help_page_has_headings(run) -> None:
    page = run("finetune", "sam", "-h").out
    places = [page.index(f"\n{heading}:\n") for heading in HEADINGS.values()]
    assert places == sorted(places)
    assert page.index("\nMethod:\n") < page.index("--protocol") < page.index("\nMemory and speed:\n")
    assert "boxes: 16; published: 25" in " ".join(page.split())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--box-jitter", "a,b"], "'a,b' is no box error, expected LOW,HIGH such as 0.05,0.15"),
        (["--box-jitter", "0.1,0.2,0.3"], "is no box error"),
        (["--box-jitter", "0.3,0.2"], "expected two ascending numbers below 0.5"),
        (["--precision", "fp16"], "fp16 needs a GPU"),
        (["--protocol", "mine"], "'mine' is not one of 'boxes', 'published'"),
        (["--device", "cuda:0", "--devices", "2"], "cuda:0 names one GPU, but 2 devices were asked for"),
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
