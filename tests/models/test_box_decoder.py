"""The deployable box decoder against ``SamPredictor.predict_torch``, and proofs that the comparison can fail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything import SamPredictor, sam_model_registry

from dendsam_deploy.models.box_decoder import BoxDecoderGraph
from dendsam_deploy.models.sam import build_sam
from dendsam_deploy.models.weights import load_sam
from dendsam_deploy.weights import PACKAGED_SAM

LIMIT = 1e-3
"""Largest difference of logits, in units of their standard deviation."""

SMALL = 128
"""Side of a tile whose grid has 8 x 8 cells, px."""


@pytest.fixture(scope="module")
def sam():
    """Return a small SAM with random weights; its decoder is that of every type."""
    torch.manual_seed(0)
    return spread(build_sam("tiny", SMALL))


@pytest.fixture(scope="module")
def embeddings():
    return torch.randn(3, 256, SMALL // 16, SMALL // 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def spread(sam):
    """Enlarge the attention's projections, so that attention is not uniform as it is with torch's starting weights."""
    for name, parameter in sam.mask_decoder.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(3)
    return sam


def random_boxes(count, side, seed=2):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 0.8 * side
    size = (0.02 + 0.4 * torch.rand(count, 2, generator=generator)) * side
    return torch.cat([corner, corner + size], 1)


def predicted(sam, embedding, boxes):
    """Return logits and IoU of ``SamPredictor.predict_torch`` for boxes on one tile, as published."""
    predictor = SamPredictor(sam)
    side = sam.image_encoder.img_size
    predictor.features, predictor.is_image_set = embedding[None], True
    predictor.original_size = predictor.input_size = (side, side)
    parts = [predictor.predict_torch(None, None, some, multimask_output=False) for some in boxes.split(8)]
    return torch.cat([logits[:, 0] for _, _, logits in parts]), torch.cat([iou[:, 0] for _, iou, _ in parts])


def reference(sam, embeddings, boxes, tile_index):
    """Return whole mask grids and IoU of boxes on several tiles, one tile after the other."""
    side = embeddings.shape[-1] * 4
    logits, iou = torch.zeros(len(boxes), side, side), torch.zeros(len(boxes))
    for tile in tile_index.unique():
        logits[tile_index == tile], iou[tile_index == tile] = predicted(
            sam, embeddings[tile], boxes[tile_index == tile]
        )
    return logits, iou


def worst(found, expected):
    """Return the largest difference in standard deviations of what is expected."""
    return float((found - expected).abs().max() / expected.std())


def whole(grid):
    return torch.tensor([grid])


@pytest.mark.slow
@torch.no_grad()
def test_the_decoder_of_vit_b_for_1_3_17_and_64_boxes():
    torch.manual_seed(3)
    sam = spread(build_sam("tiny", 1024))
    with torch.device("meta"):
        official = sam_model_registry["vit_b"]()
    assert str(sam.mask_decoder) == str(official.mask_decoder)
    assert str(sam.prompt_encoder) == str(official.prompt_encoder)
    embedding, boxes = torch.randn(256, 64, 64), random_boxes(64, 1024)
    logits, iou = predicted(sam, embedding, boxes)
    decoder = BoxDecoderGraph(sam)
    for count, region in [(1, 64), (3, 32), (17, 16), (64, 8)]:
        index = torch.zeros(count, dtype=torch.int64)
        found, origin, found_iou = decoder(embedding[None], boxes[:count], index, torch.tensor([region]))
        assert worst(found, cropped(logits[:count], origin, region)) < LIMIT
        assert (found_iou - iou[:count]).abs().max() < 1e-5


@torch.no_grad()
def test_a_trained_model():
    sam = load_sam(PACKAGED_SAM).sam
    side = sam.image_encoder.img_size
    embedding = sam.image_encoder(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(4)))
    boxes = random_boxes(8, side)
    logits, iou = predicted(sam, embedding[0], boxes)
    index = torch.zeros(8, dtype=torch.int64)
    found, _, found_iou = BoxDecoderGraph(sam)(embedding, boxes, index, whole(side // 16))
    assert worst(found, logits) < LIMIT
    assert worst(found_iou, iou) < LIMIT


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 17, 64])
def test_boxes_of_several_tiles_in_one_call(sam, embeddings, count):
    boxes = random_boxes(count, SMALL)
    index = torch.arange(count) * 7 % 3
    logits, iou = reference(sam, embeddings, boxes, index)
    found, origin, found_iou = BoxDecoderGraph(sam)(embeddings, boxes, index, whole(8))
    assert worst(found, logits) < LIMIT
    assert (found_iou - iou).abs().max() < 1e-5
    assert not origin.any()


@torch.no_grad()
def test_no_boxes(sam, embeddings):
    none = torch.zeros(0, dtype=torch.int64)
    logits, origin, iou = BoxDecoderGraph(sam)(embeddings, torch.zeros(0, 4), none, torch.tensor([2]))
    assert logits.shape == (0, 8, 8)
    assert origin.shape == (0, 2)
    assert origin.dtype == torch.int64
    assert iou.shape == (0,)


BORDERS = [
    (0, 0, SMALL, SMALL),
    (0, 0, 1, 1),
    (SMALL - 1, SMALL - 1, SMALL, SMALL),
    (SMALL - 9, 0, SMALL, 9),
    (0, 40, 3, SMALL),
    (-12.5, -3, 20, 30),
    (100, 90, SMALL + 40, SMALL + 7),
    (30, 30, 30, 30),
]


@torch.no_grad()
@pytest.mark.parametrize("region", range(1, 9))
def test_a_region_is_a_window_of_the_whole_grid(sam, embeddings, region):
    boxes = torch.cat([torch.tensor(BORDERS, dtype=torch.float32), random_boxes(5, SMALL)])
    index = torch.arange(len(boxes)) % 3
    logits, iou = reference(sam, embeddings, boxes, index)
    found, origin, found_iou = BoxDecoderGraph(sam)(embeddings, boxes, index, torch.tensor([region]))
    assert found.shape == (len(boxes), 4 * region, 4 * region)
    assert worst(found, cropped(logits, origin, region)) < LIMIT
    assert (found_iou - iou).abs().max() < 1e-5


with torch.device("meta"):  # nothing but the size of its grid is needed
    LARGE_GRID = BoxDecoderGraph(build_sam("tiny", 1024))


@settings(deadline=None, max_examples=200)
@given(data=st.data(), region=st.integers(1, 64))
def test_regions_lie_in_the_grid_and_are_centred(data, region):
    """A region is at most half a cell off the box's centre, unless the tile ends there."""
    numbers = st.floats(-100, 1124, width=32)
    boxes = torch.tensor([data.draw(st.tuples(numbers, numbers, numbers, numbers))])
    origin = LARGE_GRID.region_origin(boxes, torch.tensor(region))[0]
    for axis, first in enumerate(origin.tolist()):
        centre = float(boxes[0, 1 - axis].double() + boxes[0, 3 - axis].double()) / 32
        assert 0 <= first <= 64 - region
        off = abs(first + region / 2 - centre)
        assert off <= 0.5 + 1e-4 or first in (0, 64 - region)


def cropped(logits, origin, region):
    side = 4 * region
    corners = zip(logits, origin.tolist(), strict=True)
    return torch.stack([mask[y : y + side, x : x + side] for mask, (y, x) in corners])


@torch.no_grad()
def test_points_equal_the_multimask_answer(sam, embeddings):
    points = torch.tensor([[10.0, 100.0], [64, 64], [0, 127]])
    predictor = SamPredictor(sam)
    predictor.features, predictor.is_image_set = embeddings[:1], True
    predictor.original_size = predictor.input_size = (SMALL, SMALL)
    labels = torch.ones(3, 1, dtype=torch.int64)
    _, iou, logits = predictor.predict_torch(points[:, None], labels, multimask_output=True)
    decoder = BoxDecoderGraph(sam)
    decoded = decoder.decode_prompts(embeddings[:1], decoder.point_tokens(points), torch.zeros(3, dtype=torch.int64))
    cells = decoder.region_tokens(decoded.image, torch.zeros(3, 2, dtype=torch.int64), torch.arange(8))
    for token in (1, 2, 3):
        kernel = sam.mask_decoder.output_hypernetworks_mlps[token](decoded.masks[:, token])
        assert worst(decoder.mask_logits(cells, kernel), logits[:, token - 1]) < LIMIT
    torch.testing.assert_close(decoded.iou[:, 1:], iou, atol=1e-5, rtol=0)


def test_gradients_equal_those_through_the_original_modules(sam):
    """Training through the graph is training SAM."""
    torch.manual_seed(5)
    embedding = torch.randn(1, 256, 8, 8)
    boxes, weight = random_boxes(4, SMALL), torch.randn(4, 32, 32)
    index = torch.zeros(4, dtype=torch.int64)

    def through_the_graph(features):
        logits, _, iou = BoxDecoderGraph(sam)(features, boxes, index, whole(8))
        return logits, iou

    def through_the_original(features):
        sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
        position = sam.prompt_encoder.get_dense_pe()
        logits, iou = sam.mask_decoder(features, position, sparse, dense, multimask_output=False)
        return logits[:, 0], iou[:, 0]

    found = gradients(sam, through_the_graph, embedding, weight)
    expected = gradients(sam, through_the_original, embedding, weight)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * scale, name


def gradients(sam, model, embedding, weight):
    """Return the gradient of a scalar by the decoder's parameters and the embedding; unused ones are zero."""
    features = embedding.clone().requires_grad_()
    logits, iou = model(features)
    total = (logits * weight).mean() + iou.square().sum()
    named = {"embedding": features} | {
        name: tensor
        for name, tensor in sam.named_parameters()
        if name.startswith(("prompt_encoder.", "mask_decoder.")) and tensor.requires_grad
    }
    every = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(named.items(), every, strict=True)
    }


class WrongToken(BoxDecoderGraph):
    def decode_prompts(self, embeddings, prompt_tokens, tile_index, masks):
        decoded = super().decode_prompts(embeddings, prompt_tokens, tile_index)
        return decoded._replace(masks=decoded.masks.roll(-1, 1))


class PaddingPoint(BoxDecoderGraph):
    def box_tokens(self, boxes):
        padding = self.prompt_encoder.not_a_point_embed.weight.expand(len(boxes), 1, -1)
        return torch.cat([super().box_tokens(boxes), padding], 1)


class HalfPixel(BoxDecoderGraph):
    def box_tokens(self, boxes):
        return super().box_tokens(boxes - 0.5)


class NextCell(BoxDecoderGraph):
    def region_tokens(self, image, origin, offsets):
        return super().region_tokens(image, (origin + 1) % 6, offsets)


@torch.no_grad()
@pytest.mark.parametrize("wrong", [WrongToken, PaddingPoint, HalfPixel, NextCell])
def test_the_comparison_notices(sam, embeddings, wrong):
    boxes, index = random_boxes(6, SMALL), torch.arange(6) % 3
    logits, _ = reference(sam, embeddings, boxes, index)
    for graph, is_right in ((BoxDecoderGraph, True), (wrong, False)):
        found, origin, _ = graph(sam)(embeddings, boxes, index, torch.tensor([2]))
        assert (worst(found, cropped(logits, origin, 2)) < LIMIT) == is_right
