"""Tensors that stay on a device: the same labels, and nothing on the bus that need not be there."""

from __future__ import annotations

import numpy as np
import pytest
from resident_session import Bus, FarRunner, FarTensor, move_away
from scipy.ndimage import gaussian_filter
from synthetic_session import CountingFunction, draw_discs, encode_by_pooling, make_manifest, make_session

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.instances import Detections
from dendsam_deploy.pipeline.clock import StageClock
from dendsam_deploy.pipeline.decode import Embeddings
from dendsam_deploy.pipeline.infer import tile_batches
from dendsam_deploy.pipeline.prepare import plan_tiles, prepare_slice
from dendsam_deploy.pipeline.segment import SliceOptions, find_masks, make_recipe, segment_slice
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.portable_binding import BoundRunner
from dendsam_deploy.runtimes.session import Session

DISCS = [(10.0, 12.0, 6.0), (40.0, 50.0, 9.0), (64.0, 33.0, 8.0), (150.0, 180.0, 9.0), (100.0, 30.0, 8.0)]
SHAPE = (170, 200)
USUAL = SliceOptions()


def test_a_slice_goes_up_once_and_its_embeddings_never_come_down():
    image = draw_discs(SHAPE, DISCS)
    tiles = len(plan_tiles(SHAPE, make_manifest().preprocessing, None, None).tiles)
    bus = Bus()
    labels, instances = segment_slice(image, move_away(make_session(), bus), None, USUAL)
    expected, _ = segment_slice(image, make_session(), None, USUAL)
    np.testing.assert_array_equal(labels, expected)
    assert len(instances) == len(DISCS)
    assert [row for row in bus.up if row[1] in ("upload", "tiles")] == [("detector", "upload", tiles)]
    assert {name for _, name, _ in bus.up} == {"upload", "sizes", "boxes", "tile_index", "region"}
    assert {(role, name) for role, name, _ in bus.down} == {
        ("detector", "boxes"), ("detector", "scores"), ("decoder", "logits"), ("decoder", "origin"), ("decoder", "iou")
    }  # fmt: skip


def test_tiles_without_boxes_are_not_encoded_on_a_device_either():
    encoder = CountingFunction(encode_by_pooling)
    session = move_away(make_session(encoder=encoder), Bus())
    plan = plan_tiles(SHAPE, make_manifest().preprocessing, None, None)
    boxes = np.array([(x - r, y - r, x + r, y + r) for y, x, r in DISCS[:4]], np.float32)
    wanted = np.unique(plan.views(boxes)[1])
    assert len(wanted) < len(plan.tiles)
    assert (np.diff(wanted) > 1).any(), "tiles between them are not wanted"
    segment_slice(draw_discs(SHAPE, DISCS[:4]), session, None, USUAL)
    assert sum(call["tiles"][0] for call in encoder.calls) == len(wanted)
    assert max(call["tiles"][0] for call in encoder.calls) > 1
    encoder.calls.clear()
    segment_slice(np.zeros(SHAPE, np.uint8), session, None, USUAL)
    assert not encoder.calls


@pytest.mark.parametrize(
    ("far", "is_uploaded", "embeddings_come_down"),
    [
        (("detector",), False, False),
        (("encoder",), False, True),
        (("decoder",), False, False),
        (("detector", "encoder"), True, True),
        (("encoder", "decoder"), False, False),
    ],
)
def test_runners_of_two_places_meet_on_the_host(far: tuple[str, ...], is_uploaded: bool, embeddings_come_down: bool):
    image = draw_discs(SHAPE, DISCS)
    bus = Bus()
    labels, _ = segment_slice(image, move_away(make_session(), bus, far), None, USUAL)
    np.testing.assert_array_equal(labels, segment_slice(image, make_session(), None, USUAL)[0])
    assert any(name == "upload" for _, name, _ in bus.up) == is_uploaded
    assert any(name == "embeddings" for _, name, _ in bus.down) == embeddings_come_down


def test_given_boxes_upload_only_the_tiles_that_look_at_them():
    bus = Bus()
    boxes = np.array([[4, 6, 20, 18]], np.float32)
    segment_slice(
        draw_discs(SHAPE, DISCS), move_away(make_session(), bus), Detections(boxes, np.ones(1, np.float32)), USUAL
    )
    assert [row for row in bus.up if row[1] in ("upload", "tiles")] == [("encoder", "tiles", 1)]


@pytest.mark.parametrize(
    ("tiles", "expected"),
    [
        ([], []),
        ([4], [(0, 1)]),
        ([0, 1, 2, 3, 4, 5, 6], [(0, 3), (3, 6), (6, 7)]),
        ([0, 1, 3, 4, 5, 6, 9], [(0, 2), (2, 5), (5, 6), (6, 7)]),
    ],
)
def test_batches_hold_consecutive_tiles_up_to_what_a_device_wants(tiles: list[int], expected: list[tuple[int, int]]):
    session = make_session()
    index = np.array(tiles, np.int64)
    far = FarRunner(session.encoder, Bus(), rows_per_call=3)
    assert [(rows.start, rows.stop) for rows in tile_batches(index, far)] == expected
    assert [(rows.start, rows.stop) for rows in tile_batches(index, session.encoder)] == [
        (row, row + 1) for row in range(len(tiles))
    ]


def test_embeddings_of_some_tiles_are_picked_or_cut_out():
    values = np.arange(5.0, dtype=np.float32).reshape(5, 1, 1, 1)
    index = np.array([2, 3, 5, 8, 9])
    wanted = np.array([3, 8, 8, 3])
    picked, rows = Embeddings(values, index).of_tiles(wanted)
    assert picked[rows, 0, 0, 0].tolist() == [1, 3, 3, 1]
    assert len(picked) == 2
    cut, rows = Embeddings(FarTensor(values), index).of_tiles(wanted)
    assert cut.hidden[rows, 0, 0, 0].tolist() == [1, 3, 3, 1]
    assert cut.shape[0] == 3


def test_onnx_graphs_whose_tensors_stay_find_the_same_masks_to_the_bit(exported):
    """The runner of a GPU, here on the CPU, against the plain one."""
    bundle = Bundle.open(exported.bundle)

    class BoundInThePlainBatches(BoundRunner):
        rows_per_call = property(lambda self: 16 if self.spec.role == "decoder" else 1)

    def session_of(kind: type[OnnxRunner]) -> Session:
        detector, encoder, decoder = (
            kind(bundle.graph_path(role, "fp32"), bundle.manifest.graph(role, "fp32"), RunnerOptions(threads=1))
            for role in ("detector", "encoder", "decoder")
        )
        return Session(bundle.manifest, encoder, decoder, detector)

    image = np.clip(128 + 900 * gaussian_filter(np.random.default_rng(0).normal(size=(300, 420)), 4), 0, 255)
    recipe = make_recipe(image.shape, bundle.manifest, SliceOptions(detection_score=0.0, zoom=1.0))
    prepared = prepare_slice(image.astype(np.uint8), recipe.plan)
    found = []
    for kind in (OnnxRunner, BoundInThePlainBatches):
        with session_of(kind) as session:
            found.append(find_masks(prepared, session, None, recipe, StageClock()))
    (boxes, plain), (bound_boxes, bound) = found
    assert len(np.unique(plain.tile_index)) > 4
    np.testing.assert_array_equal(bound_boxes.boxes_xyxy, boxes.boxes_xyxy)
    np.testing.assert_array_equal(bound.predicted_iou, plain.predicted_iou)
    for ours, theirs in zip(bound.logits, plain.logits, strict=True):
        np.testing.assert_array_equal(ours, theirs)
