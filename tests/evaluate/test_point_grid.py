"""The grid of points against segment_anything's own automatic mask generator."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from segment_anything import SamAutomaticMaskGenerator  # noqa: E402 - after the check for torch
from segment_anything.utils.amg import build_point_grid, calculate_stability_score  # noqa: E402

from dendsam_deploy.errors import InvalidArgumentError  # noqa: E402
from dendsam_deploy.evaluate import point_grid as grid_module  # noqa: E402
from dendsam_deploy.evaluate.point_grid import GridOptions, find_grid_masks, grid_points  # noqa: E402
from dendsam_deploy.geometry import Frame, Tile, Window, tile_grid  # noqa: E402
from dendsam_deploy.models.point_decoder import PointDecoderGraph  # noqa: E402
from dendsam_deploy.models.reference import encode_tiles  # noqa: E402
from dendsam_deploy.models.weights import load_sam  # noqa: E402
from dendsam_deploy.pipeline.decode import Embeddings  # noqa: E402
from dendsam_deploy.pipeline.prepare import TilePlan  # noqa: E402
from dendsam_deploy.pipeline.upsample import upsample_masks  # noqa: E402
from dendsam_deploy.runtimes.runner import CallableRunner  # noqa: E402
from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom  # noqa: E402
from dendsam_deploy.weights import PACKAGED_SAM  # noqa: E402

SIDE = 256
IMAGE = make_phantom(PhantomOptions(shape_zyx=(1, SIDE, SIDE), seed=4)).raw[0]


@pytest.fixture(scope="module")
def sam():
    """The packaged model: masks of its points are local, some stable, some not."""
    return load_sam(PACKAGED_SAM, SIDE).sam.eval()


def decoder_of(sam, spy=None) -> CallableRunner:
    from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs  # noqa: PLC0415 - as its only user
    from dendsam_deploy.bundle.manifest import GraphSpec  # noqa: PLC0415

    graph = PointDecoderGraph(sam)
    names = ("embeddings", "points", "labels", "tile_index")

    @torch.no_grad()
    def decode(inputs):
        if spy is not None:
            spy.append(len(inputs["points"]))
        logits, iou = graph(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in names))
        return {"logits": logits.numpy(), "iou": iou.numpy()}

    spec = GraphSpec("points", "fp32", 0, (), graph_inputs("points", SIDE), graph_outputs("points", SIDE))
    return CallableRunner(spec, decode)


def one_tile(height=SIDE, width=SIDE) -> TilePlan:
    frame = Frame((height, width), (height, width))
    return TilePlan(frame, tuple(tile_grid((height, width), SIDE, 32)), SIDE)


def embedded(sam, image) -> Embeddings:
    height, width = image.shape
    tile = np.zeros((1, SIDE, SIDE), np.uint8)
    tile[0, :height, :width] = image
    values = encode_tiles(sam, torch.from_numpy(tile), torch.tensor([[height, width]])).numpy()
    return Embeddings(values, np.zeros(1, np.int64))


def generated(sam, image, options: GridOptions):
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=options.points_per_side,
        pred_iou_thresh=options.predicted_iou,
        stability_score_thresh=options.stability,
        stability_score_offset=options.stability_offset,
        box_nms_thresh=options.nms_iou,
    )
    return generator.generate(np.repeat(image[:, :, None], 3, axis=2))


CASES = [
    GridOptions(8, predicted_iou=0.3, stability=0.7, nms_iou=0.7),
    GridOptions(8, predicted_iou=0.5, stability=0.8, nms_iou=0.5),
    GridOptions(6, predicted_iou=0.3, stability=0.5, stability_offset=0.5, nms_iou=0.9),
]


@pytest.mark.parametrize("options", CASES)
def test_it_keeps_what_the_generator_of_segment_anything_keeps(sam, options):
    expected = generated(sam, IMAGE, options)
    plan = one_tile()
    found = find_grid_masks(embedded(sam, IMAGE), decoder_of(sam), plan, sam.mask_threshold, options)
    assert 2 <= len(expected) < found.counts.confident
    assert found.counts.distinct == len(expected) == len(found.masks)
    masks = np.zeros((len(found.masks), SIDE, SIDE), bool)
    for mask, patch in zip(masks, upsample_masks(found.masks, plan, sam.mask_threshold), strict=True):
        mask[patch.window.slices] = patch.logits > sam.mask_threshold
    by_iou = sorted(expected, key=lambda one: -one["predicted_iou"])
    np.testing.assert_allclose(found.masks.predicted_iou, [one["predicted_iou"] for one in by_iou], atol=1e-5)
    for mask, box, one in zip(masks, found.detections.boxes_xyxy, by_iou, strict=True):
        assert np.count_nonzero(mask ^ one["segmentation"]) <= 3  # a rounding at the threshold
        x, y, width, height = one["bbox"]  # segment_anything's boxes end at the centres of the last pixels
        assert np.abs(box - [x, y, x + width + 1, y + height + 1]).max() <= 1


def test_each_filter_is_counted(sam):
    loose, strict = (
        find_grid_masks(embedded(sam, IMAGE), decoder_of(sam), one_tile(), 0.0, GridOptions(6, iou, 0.6)).counts
        for iou in (0.4, 0.999)
    )
    assert (loose.points, loose.masks) == (36, 108)
    assert loose.masks > loose.confident > loose.stable > loose.distinct > 0
    assert (strict.confident, strict.stable, strict.distinct) == (0, 0, 0)
    assert loose.highest_iou == strict.highest_iou > 0.3


def test_stability_is_that_of_segment_anything(sam):
    """A mask whose stability lies at the limit is kept, one just below it is not."""
    options = GridOptions(4, predicted_iou=0.0, stability=0.0, nms_iou=1.0)
    embeddings, decoder = embedded(sam, IMAGE), decoder_of(sam)
    points = torch.from_numpy(grid_points(one_tile().tiles[0], SIDE, 4))[:, None]
    with torch.no_grad():
        logits, iou = PointDecoderGraph(sam)(
            torch.from_numpy(embeddings.values), points, torch.ones(16, 1, dtype=int), torch.zeros(16, dtype=int)
        )
    logits, iou = logits[:, 1:], iou[:, 1:]
    fine = torch.nn.functional.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)
    scores = calculate_stability_score(fine[iou > 0], 0.0, 1.0)
    scores = scores[~scores.isnan()]  # of masks without any pixel, which both sides drop
    limit = float(scores.median())
    some = dataclasses.replace(options, stability=limit)
    kept = find_grid_masks(embeddings, decoder, one_tile(), 0.0, some).counts.stable
    assert abs(kept - int((scores >= limit).sum())) <= 1


def test_the_grid_is_that_of_segment_anything():
    tile = Tile(Window(0, 0, SIDE, SIDE), Window(0, 0, SIDE, SIDE))
    np.testing.assert_allclose(grid_points(tile, SIDE, 5), build_point_grid(5) * SIDE, rtol=1e-6)


@pytest.mark.parametrize("side", [1, 7, 32])
def test_tiles_share_the_work_and_leave_nothing_out(side):
    """Every point lies in its tile's own window; together they cover the slice with about the density of one tile."""
    height, width = 600, 420
    points = []
    for tile in tile_grid((height, width), SIDE, 32):
        own = grid_points(tile, SIDE, side) + np.array([tile.read.x0, tile.read.y0])
        assert (own >= [tile.own.x0, tile.own.y0]).all()
        assert (own < [tile.own.x1, tile.own.y1]).all()
        points.append(own)
    everything = np.concatenate(points)
    assert len(np.unique(everything, axis=0)) == len(everything)
    if side == 32:  # enough of them to count
        assert len(everything) == pytest.approx(height * width * (side / SIDE) ** 2, rel=0.05)


def test_points_of_padding_are_not_asked_about(sam):
    image, calls = IMAGE[:140, :180], []
    found = find_grid_masks(
        embedded(sam, image), decoder_of(sam, calls), one_tile(140, 180), 0.0, GridOptions(16, 0, 0)
    )
    assert found.counts.points == sum(calls) == 9 * 11
    boxes = found.detections.boxes_xyxy
    assert (boxes >= 0).all()
    assert (boxes <= [180, 140, 180, 140]).all()


def test_only_what_a_mask_needs_is_kept(sam):
    found = find_grid_masks(embedded(sam, IMAGE), decoder_of(sam), one_tile(), 0.0, CASES[0])
    for mask, (y, x) in zip(found.masks.logits, found.masks.origins_yx.tolist(), strict=True):
        assert mask.shape[0] == mask.shape[1] <= SIDE // 4 - max(y, x)
        assert (mask > 0).any()


@pytest.mark.parametrize(
    "options",
    [{"points_per_side": 0}, {"predicted_iou": 1.1}, {"stability": -0.1}, {"nms_iou": 2}, {"stability_offset": -1}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidArgumentError, match="expected"):
        GridOptions(**options)


class Careless:
    """A filter that asks for something else."""

    def __init__(self, **changes):
        self.changes = changes
        self.judge = grid_module._stable

    def __call__(self, logits, predicted_iou, tile, plan, rule):
        threshold, options = rule
        return self.judge(logits, predicted_iou, tile, plan, (threshold, dataclasses.replace(options, **self.changes)))


def test_a_wrong_filter_would_show(sam, monkeypatch):
    expected = len(generated(sam, IMAGE, CASES[0]))
    for changes in ({"predicted_iou": 0.0, "nms_iou": 1.0}, {"stability": 0.0}):
        careless = dataclasses.replace(CASES[0], **changes)
        found = find_grid_masks(embedded(sam, IMAGE), decoder_of(sam), one_tile(), 0.0, careless)
        assert found.counts.distinct != expected
    monkeypatch.setattr(grid_module, "_stable", Careless(stability_offset=0.5))
    assert find_grid_masks(embedded(sam, IMAGE), decoder_of(sam), one_tile(), 0.0, CASES[0]).counts.distinct != expected
