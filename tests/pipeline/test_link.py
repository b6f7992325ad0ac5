"""The linkers: worked examples that a person can check, a brute-force oracle, and their limits."""

from __future__ import annotations

import link_oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from painted_slices import blank, instances_from, link_volume, relabelled

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Instances, RunLengths
from dendsam_deploy.pipeline.link import LinkOptions, SliceObjects, link_slices

BOTH = pytest.mark.parametrize("method", ["overlap-graph", "iou-greedy"])


@BOTH
def test_straight_tubes_keep_one_id_each(method):
    volume = blank(6)
    volume[:, 5:15, 5:15] = 1
    volume[:, 20:35, 30:50] = 2
    result = link_volume(volume, method=method)
    assert result.object_count == 2
    np.testing.assert_array_equal(relabelled(volume, result), volume)
    assert (result.confidence > 0.9).all()


@BOTH
def test_a_drifting_tube_stays_one_object(method):
    volume = blank(20)
    for z in range(20):
        volume[z, 10:22, 2 + 2 * z : 14 + 2 * z] = 1
    assert link_volume(volume, method=method).object_count == 1


@BOTH
def test_touching_parallel_tubes_stay_two(method):
    volume = blank(8)
    volume[:, 10:30, 10:20] = 1
    volume[:, 10:30, 20:30] = 2
    result = link_volume(volume, method=method)
    np.testing.assert_array_equal(relabelled(volume, result), volume)


@BOTH
def test_labels_of_a_slice_mean_nothing_in_the_next(method):
    volume = blank(2)
    volume[0, 5:15, 5:15], volume[0, 5:15, 30:40] = 1, 2
    volume[1, 5:15, 5:15], volume[1, 5:15, 30:40] = 9, 4
    result = link_volume(volume, method=method)
    assert result.ids_of(0).tolist() == [0, 1, 2]
    assert result.ids_of(1).tolist() == [0, 0, 0, 0, 2, 0, 0, 0, 0, 1]


def branching(upside_down):
    """A tube that divides into two at the middle slice."""
    volume = blank(10)
    volume[:5, 10:20, 10:40] = 1
    volume[5:, 10:20, 10:23] = 1
    volume[5:, 10:20, 26:40] = 2
    return volume[::-1] if upside_down else volume


@pytest.mark.parametrize("upside_down", [False, True])
def test_both_arms_of_a_branch_belong_to_the_parent(upside_down):
    result = link_volume(branching(upside_down))
    assert result.object_count == 1


def test_the_baseline_knows_no_branches():
    assert link_volume(branching(upside_down=False), method="iou-greedy").object_count == 2


def side_by_side(slices):
    """Two tubes that touch along their whole length."""
    volume = blank(slices)
    volume[:, 10:30, 10:20] = 1
    volume[:, 10:30, 20:30] = 2
    return volume


def test_tubes_painted_as_one_in_a_single_slice_stay_two():
    volume = side_by_side(11)
    volume[5, 10:30, 10:30] = 1
    result = link_volume(volume)
    ids = relabelled(volume, result)
    assert result.object_count == 2
    for z in (0, 4, 6, 10):
        np.testing.assert_array_equal(ids[z], volume[0])


def with_a_shred_between():
    """Two tubes, and for one slice a shred of the right one that lies inside the left one a slice later."""
    volume = blank(12)
    volume[:6, 10:30, 10:22] = 1
    volume[:, 10:30, 22:36] = 2
    volume[5, 10:30, 22:25] = 3
    volume[6:, 10:30, 10:25] = 1
    return volume


def test_a_shred_does_not_unite_two_tubes():
    volume = with_a_shred_between()
    ids = relabelled(volume, link_volume(volume))
    for z in (0, 5, 6, 11):
        assert ids[z, 20, 15] == 1
        assert ids[z, 20, 30] == 2
    assert ids[5, 20, 23] in {1, 2}


def test_the_conflict_rule_is_what_keeps_them_apart():
    assert link_volume(with_a_shred_between(), conflict_slices=6).object_count == 2
    assert link_volume(with_a_shred_between(), conflict_slices=7).object_count == 1


def test_a_crossing_by_one_false_overlap_stays_two():
    volume = side_by_side(12)
    volume[6][volume[6] == 2] = 0  # the right tube is missed, and the left one painted over both
    volume[6, 10:30, 18:30] = 1
    ids = relabelled(volume, link_volume(volume))
    for z in (0, 5, 7, 11):
        np.testing.assert_array_equal(ids[z], volume[0])


@BOTH
@pytest.mark.parametrize("missing", [1, 2])
def test_an_object_that_vanishes_for_a_slice_or_two_is_the_same_afterwards(method, missing):
    volume = blank(9)
    volume[:, 10:20, 10:20] = 1
    volume[:, 25:35, 30:50] = 2
    volume[4 : 4 + missing][volume[4 : 4 + missing] == 2] = 0
    assert link_volume(volume, method=method).object_count == 2
    assert link_volume(volume, method=method, max_gap_slices=missing - 1).object_count == 3


@BOTH
def test_a_missing_slice_is_bridged_whether_it_is_empty_or_left_out(method):
    volume = side_by_side(7)
    volume[3] = 0
    whole = link_volume(volume, method=method)
    pieces = (SliceObjects(z, instances_from(volume[z])) for z in (0, 1, 2, 4, 5, 6))
    without = link_slices(pieces, LinkOptions(method=method))
    assert whole.object_count == without.object_count == 2
    assert whole.ids_of(3).tolist() == [0]
    np.testing.assert_array_equal(whole.ids_3d, without.ids_3d)
    with pytest.raises(InvalidArgumentError, match="slice 3 was not linked"):
        without.ids_of(3)


def test_nothing_at_all():
    assert link_volume(blank(0)).object_count == 0
    result = link_volume(blank(3))
    assert result.object_count == 0
    assert result.confidence_of(2).tolist() == [0.0]


def test_a_lone_object_has_no_confidence():
    volume = blank(3)
    volume[1, 5:10, 5:10] = 3
    result = link_volume(volume)
    assert result.ids_of(1).tolist() == [0, 0, 0, 1]
    assert result.confidence_of(1).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_ids_ascend_in_order_of_first_appearance():
    volume = blank(3)
    volume[1:, 30:38, 30:38] = 1
    volume[:, 2:9, 2:9] = 5
    volume[1, 20:28, 5:12] = 2
    result = link_volume(volume)
    assert result.ids_of(0).tolist() == [0, 0, 0, 0, 0, 1]
    assert result.ids_of(1).tolist() == [0, 2, 3, 0, 0, 1]


def test_a_jump_between_two_sections_is_undone():
    rng = np.random.default_rng(3)
    section = np.zeros((128, 128), np.int64)
    for label in range(1, 37):  # tubes of about 14 px on a jittered grid of 20 px
        row, column = divmod(label - 1, 6)
        y, x = 4 + 20 * row + rng.integers(0, 3), 4 + 20 * column + rng.integers(0, 3)
        section[y : y + rng.integers(9, 14), x : x + rng.integers(9, 14)] = label
    volume = np.stack([section] * 3 + [np.roll(section, (6, 8), (0, 1))] * 3)
    aligned = link_volume(volume)
    np.testing.assert_array_equal(relabelled(volume, aligned), volume)
    unaligned = relabelled(volume, link_volume(volume, align=False))
    assert not np.array_equal(unaligned, volume)


@st.composite
def small_volumes(draw):
    """Draw volumes whose slices are perturbed copies of one another, with pieces that vanish, fuse and divide."""
    return perturbed_copies(draw(st.integers(0, 2**32 - 1)), slices=draw(st.integers(2, 12)))


def perturbed_copies(seed, slices, side=16, count=8):
    """Repeat a random slice; now and then shift it, drop an object, fuse two, or cut a piece off one."""
    rng = np.random.default_rng(seed)
    base = np.zeros((side, side), np.int64)
    for label in range(1, count + 1):
        y, x = rng.integers(0, side - 4, 2)
        base[y : y + rng.integers(3, 8), x : x + rng.integers(3, 8)] = label
    volume = []
    for _ in range(slices):
        labels = np.roll(base, rng.integers(-1, 2, 2), (0, 1)) if rng.random() < 0.3 else base
        lookup = np.where(rng.random(count + 1) < 0.05, 0, np.arange(count + 1))
        if rng.random() < 0.3:
            lookup[rng.integers(1, count + 1)] = rng.integers(1, count + 1)
        labels = lookup[labels]
        if rng.random() < 0.5:
            half = np.indices(labels.shape)[rng.integers(0, 2)] < rng.integers(2, side - 2)
            labels[half & (labels == rng.integers(1, count + 1))] = count + 1
        volume.append(labels)
    return np.stack(volume)


@settings(deadline=None, max_examples=100)
@given(small_volumes(), st.integers(0, 2), st.integers(1, 3))
def test_the_overlap_graph_equals_brute_force(volume, max_gap, conflict):
    assert_equals_brute_force(volume, max_gap, conflict)


def test_the_overlap_graph_equals_brute_force_where_dendrites_conflict():
    refused = 0
    for seed in range(60):
        volume = perturbed_copies(seed, slices=12)
        assert_equals_brute_force(volume, max_gap=2, conflict=1 + seed % 2)
        strict, lax = (link_volume(volume, align=False, conflict_slices=n).object_count for n in (1 + seed % 2, 99))
        refused += strict > lax
    assert refused >= 3  # else these volumes would test nothing


def assert_equals_brute_force(volume, max_gap, conflict):
    """Compare ids and confidences of every object with those of the oracle."""
    result = link_volume(volume, align=False, max_gap_slices=max_gap, conflict_slices=conflict)
    ids, confidence = link_oracle.link(volume, max_gap=max_gap, conflict=conflict)
    for (z, label), expected in ids.items():
        assert result.ids_of(z)[label] == expected
        assert result.confidence_of(z)[label] == pytest.approx(confidence.get((z, label), 0.0), abs=1e-5)
    assert result.object_count == max(ids.values(), default=0)


@settings(deadline=None, max_examples=50)
@given(small_volumes(), st.sampled_from(["overlap-graph", "iou-greedy"]))
def test_ids_are_complete_and_deterministic(volume, method):
    result = link_volume(volume, method=method)
    again = link_volume(volume, method=method)
    ids = relabelled(volume, result)
    np.testing.assert_array_equal(ids > 0, volume > 0)
    np.testing.assert_array_equal(ids, relabelled(volume, again))
    assert np.unique(result.ids_3d).tolist() == list(range(1, result.object_count + 1))
    firsts = [int(np.flatnonzero(result.ids_3d == i)[0]) for i in range(1, result.object_count + 1)]
    assert firsts == sorted(firsts)


def single_pixels(count, width=2**15):
    """Return `count` objects of one pixel each, two columns apart."""
    column, row = np.arange(count) * 2 % width, np.arange(count) * 2 // width
    run = np.array([[0, 0, 1]], np.int32)
    return Instances(
        ids=np.arange(1, count + 1, dtype=np.uint32),
        boxes_xyxy=np.stack([column, row, column + 1, row + 1], axis=1).astype(np.float32),
        scores=np.ones(count, np.float32),
        predicted_iou=np.ones(count, np.float32),
        areas_px=np.ones(count, np.int64),
        run_lengths=tuple(RunLengths(Window(int(y), int(x), 1, 1), run) for y, x in zip(row, column, strict=True)),
    )


@BOTH
def test_more_objects_than_16_bits_do_not_wrap(method):
    count = 65_537
    instances = single_pixels(count)
    result = link_slices([SliceObjects(0, instances), SliceObjects(1, instances)], LinkOptions(method=method))
    assert result.object_count == count
    np.testing.assert_array_equal(result.ids_of(1), np.arange(count + 1))


def test_what_grows_is_a_few_bytes_an_object():
    result = link_volume(side_by_side(30))
    grown = result.ids_2d.nbytes + result.ids_3d.nbytes + result.confidence.nbytes
    assert grown == 12 * 60


def test_slices_out_of_order_are_refused():
    pieces = [SliceObjects(z, instances_from(blank(1)[0])) for z in (0, 2, 1)]
    with pytest.raises(InvalidArgumentError, match="slice 1 comes after slice 2"):
        link_slices(pieces, LinkOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "forest"}, "no linker 'forest'"),
        ({"max_gap_slices": -1}, "max_gap_slices is -1"),
        ({"conflict_slices": 0}, "conflict_slices is 0"),
        ({"min_probability": 1.0}, "min_probability is 1.0"),
        ({"min_branch_probability": 0.0}, "min_branch_probability is 0.0"),
        ({"min_iou": -0.1}, "min_iou is -0.1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        LinkOptions(**options)
