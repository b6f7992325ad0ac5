"""One slice through tiles, detector, encoder, decoder and painter, with synthetic graphs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_session import (
    CountingFunction,
    decode_ellipses,
    detect_discs,
    draw_discs,
    encode_by_pooling,
    make_manifest,
    make_session,
)

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError, ParityError
from dendsam_deploy.geometry import Frame, tile_grid
from dendsam_deploy.instances import Detections, box_iou
from dendsam_deploy.pipeline.decode import boxes_in_tiles
from dendsam_deploy.pipeline.detect import DetectOptions, clip_to_slice, detect_objects
from dendsam_deploy.pipeline.prepare import TilePlan, plan_tiles, prepare_slice
from dendsam_deploy.pipeline.segment import SliceOptions, decode_boxes, segment_slice

DISCS = [(10.0, 12.0, 6.0), (40.0, 50.0, 9.0), (60.0, 80.0, 7.0), (100.0, 30.0, 8.0), (64.0, 33.0, 8.0)]
USUAL = SliceOptions()


def boxes_of(discs: list[tuple[float, float, float]]) -> np.ndarray:
    return np.array([(x - r, y - r, x + r, y + r) for y, x, r in discs], np.float32).reshape(-1, 4)


def test_every_disc_of_a_slice_larger_than_a_tile_is_found_once():
    image = draw_discs((128, 150), DISCS)
    labels, instances = segment_slice(image, make_session(), None, USUAL)
    assert len(instances) == len(DISCS)
    for y, x, radius in DISCS:
        label = labels[int(y), int(x)]
        assert label > 0
        assert (labels == label).sum() == pytest.approx(np.pi * radius**2, rel=0.2)
    assert ((labels > 0) == (image > 0)).mean() > 0.99


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_objects_within_the_overlap_are_found_once_wherever_the_tiles_cut(seed: int):
    """Discs of up to the overlap in diameter, at random places; the tiles' cut pieces must all be dropped."""
    rng = np.random.default_rng(seed)
    discs: list[tuple[float, float, float]] = []
    for y, x, r in zip(rng.uniform(13, 147, 40), rng.uniform(13, 187, 40), rng.uniform(5, 11.5, 40), strict=True):
        if all(np.hypot(y - v, x - u) > r + s + 3 for v, u, s in discs):
            discs.append((y, x, r))
    image = draw_discs((160, 200), discs)
    session = make_session()
    prepared = prepare_slice(image, plan_tiles(image.shape, session.manifest.preprocessing, None, None))
    found = detect_objects(prepared, session.detector, DetectOptions(0.3, 0.7))
    assert len(found) == len(discs)
    assert box_iou(boxes_of(discs), found.boxes_xyxy).max(axis=1).min() > 0.8


def test_an_object_larger_than_the_overlap_is_stitched():
    image = draw_discs((64, 150), [(32.0, 75.0, 27.0)])
    labels, instances = segment_slice(image, make_session(), None, USUAL)
    assert len(plan_tiles((64, 150), make_manifest().preprocessing, None, None).tiles) > 2
    assert len(instances) == 1
    assert labels[32, 52] == labels[32, 97] == 1


def test_tiles_without_boxes_are_not_encoded_and_empty_slices_run_no_graph():
    encoder, decoder = CountingFunction(encode_by_pooling), CountingFunction(decode_ellipses)
    session = make_session(encoder=encoder, decoder=decoder)
    labels, instances = segment_slice(np.zeros((128, 150), np.uint8), session, None, USUAL)
    assert not labels.any()
    assert len(instances) == len(encoder.calls) == len(decoder.calls) == 0
    segment_slice(draw_discs((128, 150), DISCS[:1]), session, None, USUAL)
    assert [call["tiles"] for call in encoder.calls] == [(1, 64, 64)]


def test_boxes_of_one_region_size_are_decoded_together_in_bounded_batches():
    decoder = CountingFunction(decode_ellipses)
    discs = [(8 + 13 * (i // 11), 8 + 13 * (i % 11), 4.0) for i in range(66)]
    _, instances = segment_slice(draw_discs((90, 150), discs), make_session(decoder=decoder), None, USUAL)
    assert len(instances) == 66
    counts = [call["boxes"][0] for call in decoder.calls]
    assert sum(counts) == 66
    assert max(counts) <= 16
    assert len(counts) == 5


def test_given_boxes_replace_the_detector():
    detector = CountingFunction(detect_discs)
    image = draw_discs((128, 150), DISCS)
    detections = Detections(boxes_of(DISCS[:2]), np.array([0.1, 0.2], np.float32))
    _, instances = segment_slice(image, make_session(detector=detector), detections, USUAL)
    assert len(instances) == 2
    assert not detector.calls


def test_thresholds_of_the_manifest_are_defaults():
    image = draw_discs((64, 64), [(20.0, 20.0, 8.0), (44.0, 44.0, 4.0)])
    assert len(segment_slice(image, make_session(), None, USUAL)[1]) == 2
    assert len(segment_slice(image, make_session(), None, SliceOptions(min_area_px=50))[1]) == 1
    assert len(segment_slice(image, make_session(), None, SliceOptions(detection_score=0.97))[1]) == 1


def test_the_least_area_is_converted_from_model_to_slice_pixels():
    """12 model px are 48 slice px at half the size."""
    image = draw_discs((128, 128), [(30.0, 30.0, 5.0), (80.0, 80.0, 16.0)])
    session = make_session(make_manifest(zoom=0.5))
    _, everything = segment_slice(image, session, None, SliceOptions(min_area_px=0))
    small, large = sorted(everything.areas_px)
    assert 12 < small < 48 < large
    _, usual = segment_slice(image, session, None, USUAL)
    assert usual.areas_px.tolist() == [large]


@pytest.mark.parametrize("zoom", [0.5, 1.0, 1.7])
def test_boxes_and_masks_come_back_in_slice_pixels(zoom: float):
    image = draw_discs((120, 100), [(60.0, 40.0, 14.0)])
    labels, instances = segment_slice(image, make_session(), None, SliceOptions(zoom=zoom))
    np.testing.assert_allclose(instances.boxes_xyxy[0], [26, 46, 54, 74], atol=2.5 / zoom)
    rows, columns = np.nonzero(labels)
    assert rows.mean() == pytest.approx(59.5, abs=1)
    assert columns.mean() == pytest.approx(39.5, abs=1)


def test_decode_boxes_returns_each_mask_whole_and_in_order():
    image = draw_discs((128, 150), DISCS)
    boxes = np.concatenate([boxes_of(DISCS[:2]), boxes_of(DISCS[:1])])
    masks = decode_boxes(image, make_session(), boxes, USUAL)
    assert [mask.predicted_iou for mask in masks] == pytest.approx([0.9] * 3)
    for mask, (y, x, radius) in zip(masks, [*DISCS[:2], DISCS[0]], strict=True):
        full = np.zeros(image.shape, bool)
        full[mask.window.slices] = mask.mask
        rows, columns = np.indices(image.shape) + 0.5
        truth = np.hypot(rows - y, columns - x) < radius
        assert (full & truth).sum() / (full | truth).sum() > 0.75
    assert decode_boxes(image, make_session(), np.zeros((0, 4), np.float32), USUAL) == []


def wide_disc() -> tuple[np.ndarray, np.ndarray]:
    """A disc of twice the overlap around the place where four tiles meet, and its box."""
    image = draw_discs((104, 104), [(52.0, 52.0, 46.0)])
    return image, boxes_of([(52.0, 52.0, 46.0)])


def ellipse_of(tile: tuple[int, int, int, int], box: np.ndarray) -> tuple[float, float, float, float]:
    """The part of a box that a tile sees."""
    return tuple(np.concatenate([np.maximum(box[:2], tile[:2]), np.minimum(box[2:], tile[2:])]))


def test_a_given_box_that_no_tile_sees_whole_is_decoded_in_every_tile_that_it_meets():
    image, box = wide_disc()
    tiles = plan_tiles(image.shape, make_manifest().preprocessing, None, None).tiles
    assert len(tiles) == 4
    # The synthetic decoder fills each part of the box with an ellipse; the object is their union.
    expected = np.zeros(image.shape, bool)
    y, x = np.indices(image.shape) + 0.5
    for tile in tiles:
        read = tile.read
        x0, y0, x1, y1 = ellipse_of((read.x0, read.y0, read.x1, read.y1), box[0])
        expected |= ((x - (x0 + x1) / 2) / (x1 - x0) * 2) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0) * 2) ** 2 < 1
    (whole,) = decode_boxes(image, make_session(), box, USUAL)
    found = np.zeros(image.shape, bool)
    found[whole.window.slices] = whole.mask
    assert (found & expected).sum() / (found | expected).sum() > 0.97
    labels, instances = segment_slice(image, make_session(), Detections(box, np.ones(1, np.float32)), USUAL)
    assert len(instances) == 1
    np.testing.assert_array_equal(labels > 0, found)


def test_a_box_that_its_tile_sees_whole_is_decoded_once():
    decoder = CountingFunction(decode_ellipses)
    image = draw_discs((104, 104), [(30.0, 52.0, 11.0)])
    decode_boxes(image, make_session(decoder=decoder), boxes_of([(30.0, 52.0, 11.0)]), USUAL)
    assert [call["boxes"] for call in decoder.calls] == [(1, 4)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_every_box_is_shown_to_its_owner_and_to_all_tiles_only_if_it_leaves_the_owner(seed: int):
    rng = np.random.default_rng(seed)
    plan = plan_tiles((130, 170), make_manifest().preprocessing, None, None)
    low = rng.uniform(0, (160, 120), (20, 2))
    high = np.minimum(low + rng.uniform(2, 120, (20, 2)), (170, 130))
    boxes = np.concatenate([low, high], axis=1).astype(np.float32)
    box_index, tile_index = plan.views(boxes)
    for number, (box, owner) in enumerate(zip(boxes, plan.owners(boxes), strict=True)):
        shown = {int(tile) for tile in tile_index[box_index == number]}
        assert owner in shown
        seen = plan.tiles[owner].read
        is_whole = box[0] >= seen.x0 - 1 and box[1] >= seen.y0 - 1 and box[2] <= seen.x1 + 1 and box[3] <= seen.y1 + 1
        meets = {
            index
            for index, tile in enumerate(plan.tiles)
            if min(box[2], tile.own.x1) > max(box[0], tile.own.x0)
            and min(box[3], tile.own.y1) > max(box[1], tile.own.y0)
        }
        assert shown == ({owner} if is_whole else meets)


def test_decode_boxes_refuses_boxes_outside_the_slice():
    boxes = np.array([[0, 0, 10, 10], [200, 200, 220, 220]], np.float32)
    with pytest.raises(InvalidArgumentError, match="1 of 2 boxes"):
        decode_boxes(np.zeros((64, 64), np.uint8), make_session(), boxes, USUAL)


def test_boxes_that_hang_over_the_border_are_cut_and_invisible_ones_dropped():
    plan = TilePlan(Frame((40, 60), (40, 60)), tuple(tile_grid((40, 60), 64, 8)), 64)
    boxes = np.array([[-5, -5, 10, 10], [50, 30, 99, 99], [70, 0, 80, 10], [5, 5, 5.4, 20]], np.float32)
    clipped = clip_to_slice(Detections(boxes, np.arange(4, dtype=np.float32)), plan)
    np.testing.assert_array_equal(clipped.boxes_xyxy, [[0, 0, 10, 10], [50, 30, 60, 40]])
    np.testing.assert_array_equal(clipped.scores, [0, 1])


def test_every_box_is_decoded_in_the_tile_that_owns_its_centre():
    plan = plan_tiles((128, 150), make_manifest().preprocessing, None, None)
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, [140, 118], (200, 2))
    boxes = np.concatenate([corners, corners + 8], axis=1).astype(np.float32)
    owners = plan.owners(boxes)
    local = boxes_in_tiles(boxes, owners, plan)
    for box, owner, inside in zip(boxes, owners, local, strict=True):
        tile = plan.tiles[owner]
        assert tile.own.x0 <= (box[0] + box[2]) / 2 < tile.own.x1
        assert tile.own.y0 <= (box[1] + box[3]) / 2 < tile.own.y1
        np.testing.assert_allclose(inside + np.array([tile.read.x0, tile.read.y0] * 2), box, atol=1e-4)


def test_a_slice_smaller_than_a_tile_is_padded_with_zeros_and_its_size_is_told():
    encoder = CountingFunction(encode_by_pooling)
    image = draw_discs((30, 40), [(15.0, 20.0, 8.0)])
    session = make_session(encoder=encoder)
    prepared = prepare_slice(image, plan_tiles((30, 40), session.manifest.preprocessing, None, None))
    inputs = prepared.tile_inputs(0)
    assert inputs["sizes"].tolist() == [[30, 40]]
    np.testing.assert_array_equal(inputs["tiles"][0, :30, :40], image)
    assert inputs["tiles"].sum() == image.sum()
    assert len(segment_slice(image, session, None, USUAL)[1]) == 1


def test_voxel_sizes_decide_the_zoom():
    preprocessing = make_manifest(model_pixel_size_nm=10.0).preprocessing
    assert plan_tiles((100, 80), preprocessing, (40.0, 5.0, 20.0), None).frame.model_hw == (50, 160)
    assert plan_tiles((100, 80), preprocessing, None, None).frame.model_hw == (100, 80)
    assert plan_tiles((100, 80), preprocessing, (40.0, 5.0, 20.0), 2.0).frame.model_hw == (200, 160)


def test_an_absurd_voxel_size_is_refused_before_anything_is_allocated():
    """352778 nm is 72 dpi, which image editors write."""
    preprocessing = make_manifest(model_pixel_size_nm=10.0).preprocessing
    with pytest.raises(InvalidArgumentError, match="set the voxel size or the zoom"):
        plan_tiles((1000, 1000), preprocessing, (1.0, 352778.0, 352778.0), None)


@pytest.mark.parametrize("role", ["detector", "encoder", "decoder"])
def test_nan_from_a_graph_is_an_error_and_not_an_empty_slice(role: str):
    functions = {"detector": detect_discs, "encoder": encode_by_pooling, "decoder": decode_ellipses}

    def broken(inputs):
        outputs = functions[role](inputs)
        name = {"detector": "scores", "encoder": "embeddings", "decoder": "logits"}[role]
        outputs[name].flat[0] = np.nan
        return outputs

    with pytest.raises(ParityError, match=f"the {role} graph at fp32 returned NaN"):
        segment_slice(draw_discs((64, 64), DISCS[:1]), make_session(**{role: broken}), None, USUAL)


def test_borrowed_outputs_are_copied():
    """A runner that overwrites its outputs in the next call, as engines with bound buffers do."""
    session = make_session()
    buffers: dict[tuple, dict[str, np.ndarray]] = {}

    class Borrowing:
        engine, device, borrows_outputs = "borrowing", "cpu", True

        def __init__(self, runner):
            self.runner, self.spec = runner, runner.spec

        def run(self, inputs):
            fresh = self.runner.run(inputs)
            kept = buffers.setdefault((self.spec.role, *(v.shape for v in fresh.values())), fresh)
            for name, value in fresh.items():
                kept[name][...] = value
            return kept

    image = draw_discs((128, 150), DISCS)
    borrowing = replace(
        session, **{role: Borrowing(getattr(session, role)) for role in ("detector", "encoder", "decoder")}
    )
    np.testing.assert_array_equal(
        segment_slice(image, borrowing, None, USUAL)[0], segment_slice(image, session, None, USUAL)[0]
    )


def test_a_bundle_without_detector_asks_for_boxes():
    session = replace(make_session(), detector=None)
    with pytest.raises(MissingCapabilityError, match="--boxes"):
        segment_slice(np.zeros((64, 64), np.uint8), session, None, USUAL)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint16), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_only_uint8_images_are_taken(image: np.ndarray):
    with pytest.raises(InvalidArgumentError):
        segment_slice(image, make_session(), None, USUAL)


@pytest.mark.parametrize("options", [{"detection_score": 1.5}, {"nms_iou": -0.1}, {"min_area_px": float("nan")}])
def test_impossible_thresholds_are_refused(options: dict[str, float]):
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        SliceOptions(**options)
