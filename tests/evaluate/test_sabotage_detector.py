"""Detectors whose boxes are not those of the weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sabotage import Tensors, failures, sabotaged, with_outputs

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 128


def test_scaled_scores_are_found(session, truth):
    wrong = with_outputs(session, "detector", lambda outputs: {"scores": outputs["scores"] * np.float32(0.9)})
    found = failures(wrong, truth)
    assert "box_score_max_difference" in found
    assert "box_iou_min" not in found


def squared_scores(outputs: Tensors) -> Tensors:
    return {"scores": outputs["scores"] ** 2}


def half_a_pixel(outputs: Tensors) -> Tensors:
    return {"boxes": np.clip(outputs["boxes"] + np.float32(0.5), 0, SIZE)}


def corner_and_size(outputs: Tensors) -> Tensors:
    boxes = outputs["boxes"]
    return {"boxes": np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)}


def centre_and_size(outputs: Tensors) -> Tensors:
    boxes = outputs["boxes"]
    side = boxes[..., 2:] - boxes[..., :2]
    return {"boxes": np.concatenate([boxes[..., :2] + side / 2, side], axis=-1)}


def swapped_axes(outputs: Tensors) -> Tensors:
    return {"boxes": np.ascontiguousarray(outputs["boxes"][..., [1, 0, 3, 2]])}


def normalised(outputs: Tensors) -> Tensors:
    return {"boxes": outputs["boxes"] / np.float32(SIZE)}


def of_the_network(outputs: Tensors) -> Tensors:
    """In the pixels of the network's own input, which is a little larger than the tile."""
    return {"boxes": np.clip(outputs["boxes"] * np.float32(160 / SIZE), 0, SIZE)}


def letterboxed(outputs: Tensors) -> Tensors:
    return {"boxes": np.clip(outputs["boxes"] - np.float32(4), 0, SIZE)}


def clipped(outputs: Tensors) -> Tensors:
    return {"boxes": np.clip(outputs["boxes"], 0, SIZE - 1)}


def whole_pixels(outputs: Tensors) -> Tensors:
    return {"boxes": np.round(outputs["boxes"])}


def moved_candidates(outputs: Tensors) -> Tensors:
    return {"scores": np.roll(outputs["scores"], 1, axis=1)}


@pytest.mark.parametrize(
    "change",
    [
        squared_scores,
        half_a_pixel,
        corner_and_size,
        centre_and_size,
        swapped_axes,
        normalised,
        of_the_network,
        letterboxed,
        clipped,
        whole_pixels,
        moved_candidates,
    ],
)
def test_wrong_boxes_are_found(session, truth, change):
    found = failures(with_outputs(session, "detector", change), truth)
    assert {"box_iou_min", "box_score_max_difference", "boxes_unmatched", "boxes_invalid"} & found


def test_missing_boxes_are_found(session, truth):
    worst = with_outputs(session, "detector", lambda outputs: {name: a[:, 5:] for name, a in outputs.items()})
    assert {"box_iou_min", "candidates_missing"} <= failures(worst, truth)
    few = with_outputs(session, "detector", lambda outputs: {name: a[:, :10] for name, a in outputs.items()})
    assert "candidates_missing" in failures(few, truth)

    def lose_all_but_one(outputs: Tensors) -> Tensors:
        return {name: np.repeat(array[:, -1:], array.shape[1], axis=1) for name, array in outputs.items()}

    assert "boxes_unmatched" in failures(with_outputs(session, "detector", lose_all_but_one), truth)


def test_repeated_boxes_in_place_of_others_are_found(session, truth):
    """Twice the better half of the candidates, as a graph without suppression that stops at so many returns them."""

    def repeat(outputs: Tensors) -> Tensors:
        count = outputs["scores"].shape[1]
        best = np.argsort(-outputs["scores"], axis=1, kind="stable")
        twice = np.repeat(best[:, : (count + 1) // 2], 2, axis=1)[:, :count]
        rows = np.arange(len(best))[:, None]
        return {name: np.ascontiguousarray(array[rows, twice]) for name, array in outputs.items()}

    assert {"boxes_unmatched", "box_iou_min", "box_score_max_difference"} & failures(
        with_outputs(session, "detector", repeat), truth
    )


def test_impossible_boxes_are_found_even_without_a_reference(session, truth):
    invert = with_outputs(session, "detector", lambda outputs: {"boxes": outputs["boxes"][..., [2, 3, 0, 1]]})
    without = dataclasses.replace(truth, detector=None, stored_detector=None, detected=None)
    assert failures(session, without) == set()
    assert failures(invert, without) == {"boxes_invalid"}
    assert {"boxes_invalid", "boxes_unmatched"} <= failures(invert, truth)


def test_the_tile_that_is_shown_matters(session, truth):
    def darker(inputs: Tensors, run: Callable) -> Tensors:
        return run({"tiles": inputs["tiles"] // 2})

    found = failures(sabotaged(session, "detector", darker), truth)
    assert {"box_score_max_difference", "boxes_unmatched"} & found


def test_other_objects_make_other_labels(session, truth):
    """Level 5: what the detector finds is followed to the labels."""
    assert len(truth.detected.prompts.tile_index) >= 8
    assert failures(session, truth) == set()

    def lose_the_best(outputs: Tensors) -> Tensors:
        scores = outputs["scores"].copy()
        np.put_along_axis(scores, scores.argmax(axis=1)[:, None], 0, axis=1)
        return {"scores": scores}

    assert "detected_pq90" in failures(with_outputs(session, "detector", lose_the_best), truth)
