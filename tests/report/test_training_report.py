"""The page of a training: what it says, what it draws, and that it stands on its own."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from pages import Page, assert_self_contained, pixels

from dendsam_deploy.errors import StorageError
from dendsam_deploy.report.training_report import (
    SplitBlock,
    draw_sample,
    render_training_report,
    split_blocks,
    write_training_report,
)
from dendsam_deploy.training.story import BoxStory, SamplePrediction, SizeScores, TrainingStory, VolumeStory

BLUE, ORANGE = (86, 180, 233), (255, 176, 0)


def labels_with(*squares):
    labels = np.zeros((48, 64), np.int32)
    for number, (y, x, side) in enumerate(squares, start=1):
        labels[y : y + side, x : x + side] = number
    return labels


MASKS = SamplePrediction(
    caption="<b>ca1</b>.tif, slice 17, tile 3",
    image=np.arange(48 * 64, dtype=np.uint16).reshape(48, 64).astype(np.uint8),
    score=0.4,
    score_name="mean IoU",
    truth_labels=labels_with((2, 2, 12), (20, 2, 12), (2, 30, 10)),
    predicted_labels=labels_with((3, 3, 12), (30, 40, 8)),
)
BOXES = SamplePrediction(
    caption="vnc.tif, slice 3, tile 0",
    image=np.full((40, 40), 90, np.uint8),
    score=0.9,
    score_name="F1 at IoU .5",
    truth_boxes_xyxy=np.array([[1, 1, 11, 11], [20, 20, 30, 30]], np.float32),
    predicted_boxes_xyxy=np.array([[1, 2, 11, 12], [0, 30, 8, 38], [31, 1, 39, 9]], np.float32),
)
VOLUME = VolumeStory(
    name="ca1.tif",
    labels="ca1-labels.tif",
    depth=20,
    train_blocks=((0, 4), (9, 15)),
    held_out_blocks=((6, 7),),
    gap=2,
    zoom=1.5,
    model_pixel_size_nm=10.0,
)


@pytest.fixture
def story():
    return TrainingStory(
        kind="detector",
        model="yolo11n",
        out="ca1.pt",
        score_name="held-out AP50-95",
        first_score=0.25,
        best_score=0.4,
        best_at=2,
        volumes=(VOLUME, dataclasses.replace(VOLUME, name="b.tif", held_out_blocks=(), weight=2.0, is_pseudo=True)),
        history=(
            {"epoch": 0.0, "elapsed_s": 0.0, "held_out_map50_95": 0.25},
            {"epoch": 1.0, "elapsed_s": 5.0, "held_out_map50_95": 0.3, "loss": 3.0, "learning_rate": 1e-3},
            {"epoch": 2.0, "elapsed_s": 9.0, "held_out_map50_95": 0.4, "loss": math.nan, "learning_rate": 0.0},
        ),
        seconds=75.0,
        settings={"batch": "8 tiles"},
        environment={"torch": "2"},
        metrics={"recall at IoU .5": 0.71234, "AP of nothing": math.nan},
        per_size=(
            SizeScores("small, below 32 px", 1, {"recall": 0.125}),
            SizeScores("large", 0, {"recall": math.nan}),
        ),
        boxes=BoxStory(
            objects_per_tile=np.array([0, 3, 40]),
            short_side_px=np.array([4.0, 20.0, 90.0], np.float32),
            aspect=np.array([1.0, 2.0, 7.0], np.float32),
            most_objects=292,
            finest_cell_px=8,
        ),
        samples=(BOXES, MASKS),
        notes=("stopped early", "Interrupted <and> resumed."),
    )


def test_the_page_tells_the_story(story):
    page = Page(render_training_report(story))
    assert_self_contained(page)
    for words in (
        "Training of ca1.pt",
        "Detector yolo11n · 2 volumes · 2 epochs in 1 min 15 s",
        "Stopped early. Interrupted <and> resumed.",
        "0.400 held-out AP50-95 0.250 before training +0.150 change 2 best epoch of 2",
        "recall at IoU .5 0.712",
        "AP of nothing –",
        "small, below 32 px 1 0.125 large 0 –",
        "trained on 0:4, 9:15 · judged by 6:7, at least 2 slices apart",
        "b.tif (labels made by a model)",
        "judges nothing",
        "weight 2",
        "held-out AP50-95",
        "batch 8 tiles",
    ):
        assert words in page.text, words
    assert page.source.count("<svg") == 6 + 2 + 2  # charts, strips, samples


def test_the_worst_sample_comes_first_and_names_are_escaped(story):
    page = Page(render_training_report(story))
    assert page.text.index("mean IoU 0.400") < page.text.index("F1 at IoU .5 0.900")
    assert "<b>ca1</b>.tif, slice 17, tile 3 · 2 missed, 1 wrong" in page.text
    assert "vnc.tif, slice 3, tile 0 · 1 missed, 2 wrong" in page.text


def test_a_training_that_has_little_to_tell_has_a_page_as_well(story):
    bare = TrainingStory(
        kind="sam",
        model="tiny",
        out="x.pt",
        score_name="held-out IoU",
        first_score=math.nan,
        best_score=math.nan,
        best_at=math.nan,
        volumes=(VOLUME,),
        history=(),
        seconds=0.5,
    )
    page = Page(render_training_report(bare))
    assert "SAM tiny · 1 volume · 0 steps in 500 ms" in page.text
    assert "Nothing was noted before training ended." in page.text
    assert "– change" in page.text
    sparse = dataclasses.replace(story, per_size=(), boxes=None, samples=(), history=story.history[:1])
    assert "What training minimises" not in Page(render_training_report(sparse)).text


def test_the_split_of_a_volume_is_told_slice_by_slice():
    blocks = split_blocks(VOLUME)
    assert blocks == (
        SplitBlock(0, 4, "train"),
        SplitBlock(4, 6, "unused"),
        SplitBlock(6, 7, "held out"),
        SplitBlock(7, 9, "unused"),
        SplitBlock(9, 15, "train"),
        SplitBlock(15, 20, "unused"),
    )
    assert sum(block.stop - block.first for block in blocks) == VOLUME.depth


def test_masks_without_a_partner_are_filled():
    picture = draw_sample(MASKS)
    layer = pixels(picture.layer_png)
    assert (picture.missed, picture.wrong) == (2, 1)
    np.testing.assert_array_equal(pixels(picture.image_png), MASKS.image)
    assert tuple(layer[25, 8]) == (*BLUE, 110)  # a missed object
    assert tuple(layer[20, 8]) == (*BLUE, 255)  # its outline
    assert tuple(layer[34, 44]) == (*ORANGE, 110)  # a wrong one
    assert layer[9, 9, 3] == 0  # inside a pair that belongs together
    assert tuple(layer[8, 2]) == (*BLUE, 255)
    assert tuple(layer[8, 3]) == (*ORANGE, 255)
    assert layer[45, 2, 3] == 0


def test_boxes_know_their_partners():
    picture = draw_sample(BOXES)
    assert picture.layer_png is None
    assert [(mark.is_truth, mark.has_partner) for mark in picture.boxes] == [
        (True, True),
        (True, False),
        (False, True),
        (False, False),
        (False, False),
    ]
    assert (picture.boxes[1].x, picture.boxes[1].width) == (20, 10)
    nothing = dataclasses.replace(BOXES, predicted_boxes_xyxy=np.zeros((0, 4), np.float32))
    assert (draw_sample(nothing).missed, draw_sample(nothing).wrong) == (2, 0)


def test_the_page_is_written_whole_or_not_at_all(story, tmp_path):
    path = write_training_report(tmp_path / "ca1.training", story)
    assert path.name == "report.html"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        write_training_report(tmp_path / "file", story)
