"""Stability of masks under wrong boxes, against ellipses that are drawn without the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_session import (
    CountingFunction,
    Tensors,
    decode_ellipses,
    draw_discs,
    ellipse_logits,
    encode_by_pooling,
    make_manifest,
    make_session,
)

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Detections
from dendsam_deploy.pipeline.claims import Claim
from dendsam_deploy.pipeline.prepare import prepare_slice
from dendsam_deploy.pipeline.scored_masks import score_slice
from dendsam_deploy.pipeline.segment import SliceOptions, make_recipe
from dendsam_deploy.pipeline.stability import Examination, JitterOptions, claim_iou, jitter_boxes

SHAPE_HW = (64, 64)
DISCS = [(20.0, 20.0, 8.0), (42.0, 40.0, 11.0)]


def examined(session, given=None, *, jitter=None, shape_hw=SHAPE_HW, discs=DISCS):
    """Scores of slice 3, which shows discs."""
    recipe = make_recipe(shape_hw, session.manifest, SliceOptions())
    prepared = prepare_slice(draw_discs(shape_hw, discs), recipe.plan)
    return score_slice(prepared, given, Examination(session, recipe, jitter or JitterOptions()), 3)


def ellipse(box: np.ndarray) -> np.ndarray:
    """The pixels whose centres lie in the ellipse inside a box."""
    y, x = (np.arange(side) + 0.5 for side in SHAPE_HW)
    return ellipse_logits(box, y[:, None], x[None]) > 0


def decode_whole_tiles(inputs: dict[str, np.ndarray]) -> Tensors:
    """The same mask whatever the box: a decoder that does not listen."""
    outputs = decode_ellipses(inputs)
    y, x = np.indices(outputs["logits"].shape[1:])
    for logits, origin in zip(outputs["logits"], outputs["origin"], strict=True):
        inside = (abs(y + origin[0] - 8) < 4) & (abs(x + origin[1] - 8) < 4)
        logits[:] = np.where(inside, 8.0, -8.0)
    return outputs


def test_stability_is_the_mean_iou_with_the_mask_of_the_box_itself() -> None:
    jitter = JitterOptions(repeats=4, fraction=0.12, seed=5)
    scored = examined(make_session(), jitter=jitter)
    boxes = scored.instances.boxes_xyxy
    wrong = jitter_boxes(boxes, jitter, 3)
    assert len(boxes) == 2
    for row, box in enumerate(boxes):
        exact = ellipse(box)
        ious = [(exact & ellipse(one)).sum() / (exact | ellipse(one)).sum() for one in wrong[:, row]]
        # The decoder's grid is 4 px wide, so the masks differ from the drawn ellipses by parts of a pixel.
        assert scored.stability[row] == pytest.approx(np.mean(ious), abs=0.03)
        assert scored.stability[row] < 0.97


def test_a_mask_that_ignores_its_box_is_perfectly_stable() -> None:
    scored = examined(make_session(decoder=decode_whole_tiles))
    np.testing.assert_array_equal(scored.stability, 1)


def test_larger_errors_make_masks_less_stable() -> None:
    little, much = (
        examined(make_session(), jitter=JitterOptions(fraction=fraction)).stability for fraction in (0.03, 0.3)
    )
    assert (little > much + 0.1).all()


def test_wrong_boxes_depend_on_seed_and_slice_alone() -> None:
    boxes = np.array([[10, 10, 30, 50], [0, 0, 4, 4]], np.float32)
    first = jitter_boxes(boxes, JitterOptions(repeats=200, fraction=0.1), 7)
    np.testing.assert_array_equal(first, jitter_boxes(boxes, JitterOptions(repeats=200, fraction=0.1), 7))
    assert not np.array_equal(first, jitter_boxes(boxes, JitterOptions(repeats=200, fraction=0.1), 8))
    assert not np.array_equal(first, jitter_boxes(boxes, JitterOptions(repeats=200, fraction=0.1, seed=1), 7))
    error = np.abs(first - boxes).max(axis=0)
    sides = np.array([[20, 40, 20, 40], [4, 4, 4, 4]])
    assert (error <= 0.1 * sides + 1e-5).all()
    assert (error > 0.09 * sides).all()


def test_the_encoder_sees_each_tile_once() -> None:
    encoder = CountingFunction(encode_by_pooling)
    decoder = CountingFunction(decode_ellipses)
    session = make_session(encoder=encoder, decoder=decoder)
    scored = examined(session, shape_hw=(100, 110), discs=[*DISCS, (80.0, 90.0, 9.0)])
    assert len(scored.instances) == 3
    plan = make_recipe((100, 110), session.manifest, SliceOptions()).plan
    _, tiles = plan.views(scored.instances.boxes_xyxy)
    assert sum(call["tiles"][0] for call in encoder.calls) == len(np.unique(tiles)) > 1
    assert sum(call["boxes"][0] for call in decoder.calls) >= 3 + 3 * 6


def test_an_object_of_two_tiles_is_examined_in_both() -> None:
    # Wider than the overlap: each tile sees a part, and the joint box may belong to a tile that no part needed.
    given = Detections(np.array([[8, 20, 100, 44]], np.float32), np.ones(1, np.float32))
    scored = examined(make_session(make_manifest(64, 16)), given, shape_hw=(64, 110))
    assert len(scored.instances) >= 1
    assert (scored.stability > 0.5).all()


def test_a_slice_without_boxes_runs_no_decoder() -> None:
    decoder = CountingFunction(decode_ellipses)
    scored = examined(make_session(decoder=decoder), discs=[])
    assert (len(scored.instances), len(scored.stability), decoder.calls) == (0, 0, [])


def test_crowded_slices_are_examined_in_portions(monkeypatch) -> None:
    whole = examined(make_session())
    monkeypatch.setattr("dendsam_deploy.pipeline.stability._PROMPTS_AT_ONCE", 6)
    np.testing.assert_array_equal(examined(make_session()).stability, whole.stability)


def test_iou_of_claims() -> None:
    one = Claim(Window(0, 0, 4, 4), np.full((4, 4), 9, np.uint8))
    other = Claim(Window(2, 0, 4, 4), np.full((4, 4), 1, np.uint8))
    nothing = Claim(Window(0, 0, 0, 0), np.zeros((0, 0), np.uint8))
    assert claim_iou(one, other) == pytest.approx(8 / 24)
    assert claim_iou(one, nothing) == claim_iou(nothing, nothing) == 0


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"fraction": 0.0}, {"fraction": 0.5}, {"seed": -1}])
def test_senseless_options_are_refused(wrong) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        JitterOptions(**wrong)
