"""The canonical suppression of a slice, against the words of its definition."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dendsam_deploy.instances import Detections, suppress_duplicates


def random_boxes(seed: int, count: int) -> Detections:
    """Crowded boxes with many equal scores."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 90, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 40, (count, 2))], axis=1)
    return Detections(boxes.astype(np.float32), (rng.integers(1, 9, count) / 8).astype(np.float32))


def iou_of(a: list[float], b: list[float]) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return np.float32(width * height / (sum(areas) - width * height))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 60), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@example(1, 300, 0.6)  # more than are compared at once
def test_a_box_stays_unless_a_better_one_that_stays_covers_it(seed: int, count: int, limit: float):
    found = random_boxes(seed, count)
    boxes, scores = found.boxes_xyxy.tolist(), found.scores.tolist()
    ranked = sorted(range(count), key=lambda i: (-scores[i], boxes[i][1], boxes[i][0], boxes[i][3], boxes[i][2]))
    kept: list[int] = []
    for i in ranked:
        if all(iou_of(boxes[i], boxes[j]) <= limit for j in kept):
            kept.append(i)
    assert suppress_duplicates(found, limit).tolist() == kept


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_the_order_of_the_boxes_does_not_matter(seed: int):
    found = random_boxes(seed, 50)
    shuffled = found.take(np.random.default_rng(seed).permutation(50))
    ours, theirs = (some.take(suppress_duplicates(some, 0.4)) for some in (found, shuffled))
    np.testing.assert_array_equal(ours.boxes_xyxy, theirs.boxes_xyxy)
    np.testing.assert_array_equal(ours.scores, theirs.scores)
