"""Tiles, prompts and targets of SAM's training, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spy_volume import SpyVolume

from dendsam_deploy.bundle.manifest import Preprocessing
from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.geometry import default_overlap_px
from dendsam_deploy.pipeline.prepare import plan_tiles, prepare_slice
from dendsam_deploy.training.augment import flip_and_turn, vary_intensity
from dendsam_deploy.training.prompts import random_points
from dendsam_deploy.training.samples import (
    LabelledSlice,
    LabelledVolume,
    Tile,
    TileRecipe,
    boxes_by_region,
    coverage,
    dense_targets,
    deployed_tiles,
    jittered_boxes,
    random_tile,
    tile_objects,
)
from dendsam_deploy.volume.array import ArrayVolume

RECIPE = TileRecipe(64, 1.0)


def labelled(seed: int = 0, shape: tuple[int, int, int] = (3, 80, 100)) -> LabelledVolume:
    """A volume of rectangular objects, each brighter than the next."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, 6, (shape[0], shape[1] // 20, shape[2] // 20)), np.ones((1, 20, 20), int))
    image = (labels * 40 + rng.integers(0, 20, labels.shape)).astype(np.uint8)
    return LabelledVolume(ArrayVolume(image), ArrayVolume(labels.astype(np.uint32)), range(shape[0]))


def test_only_the_allowed_slices_are_ever_read():
    image = SpyVolume(np.full((6, 64, 64), 90, np.uint8))
    labels = SpyVolume(np.kron(np.arange(1, 5).reshape(1, 2, 2), np.ones((6, 32, 32), int)).astype(np.uint32))
    volume = LabelledVolume(image, labels, range(1, 4))
    volume.object_areas()
    for seed in range(40):
        random_tile(volume, RECIPE, np.random.default_rng(seed))
    assert image.seen == labels.seen == {1, 2, 3}


def test_volumes_of_different_shapes_are_refused():
    image, labels = np.zeros((2, 64, 64), np.uint8), np.zeros((2, 64, 60), np.uint32)
    with pytest.raises(VolumeError, match=r"\(2, 64, 60\) .* differs from \(2, 64, 64\)"):
        LabelledVolume(ArrayVolume(image), ArrayVolume(labels), range(2))


def test_background_labels_are_no_objects():
    labels = np.zeros((1, 64, 64), np.uint32)
    labels[0, :20], labels[0, 30:50] = 7, 249
    volume = LabelledVolume(ArrayVolume(np.zeros((1, 64, 64), np.uint8)), ArrayVolume(labels), range(1), (249,))
    assert volume.object_areas().tolist() == [20 * 64]


def test_objects_below_the_least_area_are_left_out():
    labels = np.zeros((1, 64, 64), np.uint32)
    labels[0, 2:6, 2:6], labels[0, 20:25, 20:25], labels[0, 40:50, 40:50] = 1, 2, 3  # 16, 25 and 100 px
    image = ArrayVolume(np.zeros((1, 64, 64), np.uint8))
    for least_px, areas in ((25, [25, 100]), (26, [100]), (5, [16, 25, 100])):
        volume = LabelledVolume(image, ArrayVolume(labels), range(1), least_px=least_px)
        assert volume.object_areas().tolist() == areas
        assert np.array_equal(volume[0].objects > 0, np.isin(labels[0], [1, 2, 3][-len(areas) :]))


def test_random_tiles_have_the_models_size_and_zeros_beyond_their_own():
    for seed in range(20):
        tile = random_tile(labelled(), TileRecipe(96, 1.0), np.random.default_rng(seed))
        height, width = tile.size_hw
        assert tile.image.shape == tile.objects.shape == (96, 96)
        assert not tile.image[height:].any()
        assert not tile.objects[:, width:].any()


def test_a_random_tile_depends_on_its_generator_alone():
    first, second = (random_tile(labelled(), RECIPE, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.objects, second.objects)


def test_labels_follow_their_image():
    """Objects are told apart by their brightness, so a tile whose labels were moved would show it."""
    for seed in range(10):
        tile = random_tile(labelled(), TileRecipe(64, 1.5, 0.0, 0.0), np.random.default_rng(seed))
        spreads = [
            tile.image[tile.objects == n].std() for n in np.unique(tile.objects) if (tile.objects == n).sum() > 300
        ]
        assert np.median(spreads) < tile.image[: tile.size_hw[0], : tile.size_hw[1]].std()


@given(
    st.tuples(st.integers(30, 150), st.integers(30, 150)),
    st.sampled_from([0.5, 2**-0.5, 1.0, 2**0.5, 2.0, 1.37]),
)
@settings(deadline=None, max_examples=60)
def test_deployed_tiles_are_those_of_the_pipeline(shape, zoom):
    rng = np.random.default_rng(sum(shape))
    source = LabelledSlice(rng.integers(0, 256, shape).astype(np.uint8), np.ones(shape, np.int32))
    tiles = deployed_tiles(source, TileRecipe(64, zoom))
    plan = plan_tiles(shape, Preprocessing("minmax_uint8", 64, default_overlap_px(64), None, zoom), None, None)
    prepared = prepare_slice(source.image, plan)
    assert len(tiles) == len(plan.tiles)
    for index, tile in enumerate(tiles):
        deployed = prepared.tile_inputs(index)
        np.testing.assert_array_equal(tile.image, deployed["tiles"][0])
        assert tile.size_hw == tuple(deployed["sizes"][0])
        assert (tile.objects > 0).sum() == np.prod(tile.size_hw)


@pytest.mark.parametrize("zoom", [0.5, 2**0.5, 3.0])
def test_resampled_labels_lie_where_their_image_lies(zoom):
    """The borders of both are at the same place to half a pixel, so labels are neither shifted nor scaled otherwise."""
    objects = np.kron(np.array([[1, 0, 2], [0, 3, 0], [4, 0, 5]]), np.ones((21, 21), int)).astype(np.int32)
    tile = deployed_tiles(LabelledSlice(np.where(objects > 0, 200, 0).astype(np.uint8), objects), TileRecipe(64, zoom))[
        0
    ]
    assert ((tile.image > 100) == (tile.objects > 0)).mean() > 0.98


def test_labels_in_few_slices_are_found():
    labels = np.zeros((50, 64, 64), np.uint32)
    labels[33, 10:30, 10:30] = 5
    volume = LabelledVolume(ArrayVolume(np.zeros((50, 64, 64), np.uint8)), ArrayVolume(labels), range(50))
    assert volume.object_areas(4).tolist() == [400]


def test_areas_are_taken_from_no_more_slices_than_asked_for():
    labels = SpyVolume(np.ones((31, 64, 64), np.uint32))
    volume = LabelledVolume(ArrayVolume(np.zeros((31, 64, 64), np.uint8)), labels, range(31))
    assert len(volume.object_areas(16)) == len(labels.seen) == 16


def test_slices_out_of_use_cannot_be_had():
    with pytest.raises(InvalidArgumentError, match="slice 4 is none of the slices 1:3"):
        LabelledVolume(ArrayVolume(np.zeros((5, 8, 8))), ArrayVolume(np.zeros((5, 8, 8))), range(1, 3))[4]


def test_objects_of_a_tile_are_those_of_brute_force():
    tile = deployed_tiles(labelled()[0], RECIPE)[0]
    objects = tile_objects(tile, 30)
    expected = [n for n in np.unique(tile.objects) if n > 0 and (tile.objects == n).sum() >= 30]
    assert objects.numbers.tolist() == expected
    for number, box, area in zip(*objects, strict=True):
        rows, columns = np.nonzero(tile.objects == number)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert area == len(rows)


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.1), st.floats(0, 0.2))
@settings(deadline=None)
def test_edges_move_by_no_more_than_the_jitter(seed, low, more):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 100, (20, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 50, (20, 2))], axis=1).astype(np.float32)
    moved = jittered_boxes(boxes, (low, low + more), 0.3, rng)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    assert (np.abs(moved - boxes) <= (low + more) * sides + 1e-3).all()


def test_exact_boxes_stay_exact():
    boxes = np.array([[3, 4, 20, 30]] * 50, np.float32)
    np.testing.assert_array_equal(jittered_boxes(boxes, (0.05, 0.15), 1.0, np.random.default_rng(0)), boxes)
    assert not np.array_equal(jittered_boxes(boxes, (0.05, 0.15), 0.0, np.random.default_rng(0)), boxes)


def test_points_lie_in_their_objects():
    tile = deployed_tiles(labelled()[0], RECIPE)[0]
    objects = tile_objects(tile, 1)
    for seed in range(10):
        points = random_points(tile.objects, objects.numbers, objects.boxes_xyxy, np.random.default_rng(seed))
        assert [tile.objects[int(y), int(x)] for x, y in points] == objects.numbers.tolist()


def test_coverage_counts_the_pixels_of_each_cell():
    objects = np.random.default_rng(0).integers(0, 3, (64, 64)).astype(np.int32)
    part = coverage(objects, 2, np.array([3, 5]), 6)
    for row in range(6):
        for column in range(6):
            y, x = 4 * (3 + row), 4 * (5 + column)
            assert part[row, column] == pytest.approx((objects[y : y + 4, x : x + 4] == 2).mean())


def test_regions_hold_their_boxes_and_share_out_all_of_them():
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 300, (60, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(2, 84, (60, 2))], axis=1).astype(np.float32)
    groups = boxes_by_region(boxes, 24)
    assert sorted(np.concatenate([rows for _, rows in groups]).tolist()) == list(range(60))
    for side, rows in groups:
        longest = (boxes[rows, 2:] - boxes[rows, :2]).max(1)
        assert side == 24 or (longest * 1.5 <= 16 * side).all()


def test_borders_and_offsets_of_a_worked_example():
    objects = np.zeros((16, 16), np.int32)
    objects[:8, :8], objects[:8, 8:] = 1, 2
    border, offset, inside = dense_targets(Tile(objects.astype(np.uint8), objects, (16, 16)), 4)
    # A border is marked on the later of two pixels that differ.
    assert border.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert inside.tolist() == [[1] * 4, [1] * 4, [0] * 4, [0] * 4]
    # Cell (0, 0) is sampled at its pixel (2, 2), centred at 2.5; object 1 is centred at (4, 4).
    assert offset[:, 0, 0].tolist() == [1.5, 1.5]
    assert offset[:, 1, 2].tolist() == [-2.5, 1.5]


def test_flips_and_turns_move_image_and_labels_alike():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    seen = set()
    for seed in range(60):
        turned, labels = flip_and_turn(image, image.astype(np.int32), np.random.default_rng(seed))
        np.testing.assert_array_equal(turned, labels)
        seen.add(turned.tobytes() + bytes(turned.shape))
    assert len(seen) == 8


def test_intensities_vary_within_their_range_and_keep_the_order_of_regions():
    image = np.zeros((64, 64), np.uint8)
    image[:, :32], image[:, 32:] = 80, 170
    results = [vary_intensity(image, np.random.default_rng(seed)) for seed in range(20)]
    assert all(result.dtype == np.uint8 for result in results)
    assert all(result[:, 40:].mean() > result[:, :24].mean() + 20 for result in results)
    assert len({result.tobytes() for result in results}) == 20
