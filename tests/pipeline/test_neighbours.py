"""Agreement with neighbouring slices, against IoUs counted on painted images."""

from __future__ import annotations

import numpy as np

from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Instances, RunLengths
from dendsam_deploy.pipeline.neighbours import agreements


def painted(labels: np.ndarray) -> Instances:
    """The objects of a label image."""
    ids = np.unique(labels[labels > 0]).astype(np.uint32)
    runs = tuple(RunLengths.from_mask(labels == number, Window(0, 0, *labels.shape)) for number in ids)
    return Instances(
        ids,
        np.zeros((len(ids), 4), np.float32),
        np.ones(len(ids), np.float32),
        np.ones(len(ids), np.float32),
        np.array([run.area_px for run in runs], np.int64),
        runs,
    )


def best_iou(labels: np.ndarray, number: int, other: np.ndarray) -> float:
    mask = labels == number
    ious = [(mask & (other == n)).sum() / (mask | (other == n)).sum() for n in np.unique(other[other > 0])]
    return max(ious, default=0.0)


def random_stack(depth: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    stack = np.zeros((depth, 40, 50), np.uint32)
    for z in range(depth):
        for number in range(1, 6):
            y, x = rng.integers(0, 28), rng.integers(0, 38)
            stack[z, y : y + rng.integers(4, 12), x : x + rng.integers(4, 12)] = number
    return stack


def test_agreement_is_the_best_iou_in_either_neighbour() -> None:
    stack = random_stack(6, 1)
    stack[4] = 0  # a section that shows nothing is known to show nothing
    found = dict(agreements((z, painted(labels)) for z, labels in enumerate(stack)))
    assert list(found) == list(range(6))
    for z, agreement in found.items():
        numbers = np.unique(stack[z][stack[z] > 0])
        for side, other in ((agreement.below, z - 1), (agreement.above, z + 1)):
            if 0 <= other < len(stack):
                expected = [best_iou(stack[z], number, stack[other]) for number in numbers]
                np.testing.assert_allclose(side, expected, atol=1e-6)
            else:
                assert np.isnan(side).all()
        assert len(agreement.best) == len(numbers)
    np.testing.assert_array_equal(found[0].best, found[0].above)
    np.testing.assert_array_equal(found[5].best, np.zeros(len(found[5].best)))
    np.testing.assert_array_equal(found[2].best, np.maximum(found[2].below, found[2].above))


def test_a_missing_slice_is_an_end_and_a_single_slice_has_no_neighbour() -> None:
    stack = random_stack(3, 2)
    found = dict(agreements((z, painted(stack[z])) for z in (0, 2)))
    assert np.isnan(found[0].best).all()
    assert np.isnan(found[2].best).all()
    assert list(agreements([])) == []


def test_a_shift_of_the_whole_section_is_undone() -> None:
    rng = np.random.default_rng(3)
    plain = np.zeros((200, 200), np.uint32)
    for number, (y, x) in enumerate([(y, x) for y in range(12, 180, 30) for x in range(12, 180, 30)], start=1):
        plain[y : y + rng.integers(8, 20), x : x + rng.integers(8, 20)] = number
    moved = np.roll(plain, (9, 11), axis=(0, 1))
    found = dict(agreements(enumerate([painted(plain), painted(moved)])))
    assert found[0].above.min() > 0.95
