"""The deployable decoder for points against ``SamPredictor.predict_torch``, and proofs that the comparison can fail."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from segment_anything import SamPredictor  # noqa: E402 - after the check for torch

from dendsam_deploy.models.point_decoder import PointDecoderGraph  # noqa: E402
from dendsam_deploy.models.sam import build_sam  # noqa: E402
from dendsam_deploy.models.weights import load_sam  # noqa: E402
from dendsam_deploy.weights import PACKAGED_SAM  # noqa: E402

LIMIT = 1e-3
"""Largest difference of logits, in units of their standard deviation."""

SMALL = 128


@pytest.fixture(scope="module")
def sam():
    """A small SAM with random weights whose attention is not uniform."""
    torch.manual_seed(0)
    sam = build_sam("tiny", SMALL)
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if name.startswith("mask_decoder.") and name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(3)
    return sam


@pytest.fixture(scope="module")
def embeddings():
    return torch.randn(3, 256, SMALL // 16, SMALL // 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predicted(sam, embedding, points, labels):
    """Return logits and IoU that segment_anything's own predictor gives for points on one tile."""
    predictor = SamPredictor(sam)
    predictor.features, predictor.is_image_set = embedding[None], True
    predictor.original_size = predictor.input_size = (sam.image_encoder.img_size,) * 2
    answers = [predictor.predict_torch(points, labels, multimask_output=several) for several in (False, True)]
    return torch.cat([logits for _, _, logits in answers], 1), torch.cat([iou for _, iou, _ in answers], 1)


@torch.no_grad()
def check(graph, sam, embeddings, prompts) -> bool:
    """Tell whether a graph gives what the predictor gives, tile by tile."""
    points, labels, tile_index = prompts
    logits, iou = graph(embeddings, points, labels, tile_index)
    for tile in tile_index.unique().tolist():
        mine = tile_index == tile
        expected, expected_iou = predicted(sam, embeddings[tile], points[mine], labels[mine])
        if logits[mine].shape != expected.shape or iou[mine].shape != expected_iou.shape:
            return False
        if (logits[mine] - expected).abs().max() > LIMIT * expected.std():
            return False
        if (iou[mine] - expected_iou).abs().max() > 1e-5:
            return False
    return True


def random_prompts(count, points, labels=(0, 1), side=SMALL, seed=2):
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(count, points, 2, generator=generator) * side
    kinds = torch.tensor(labels)[torch.randint(len(labels), (count, points), generator=generator)]
    return places, kinds, torch.arange(count) * 7 % 3


@pytest.mark.parametrize("points", [1, 2, 5])
@pytest.mark.parametrize("labels", [(1,), (0,), (0, 1), (-1, 0, 1), (-1,)])
def test_points_of_several_tiles_in_one_call(sam, embeddings, points, labels):
    assert check(PointDecoderGraph(sam), sam, embeddings, random_prompts(9, points, labels))


def test_a_trained_model():
    sam = load_sam(PACKAGED_SAM).sam
    side = sam.image_encoder.img_size
    with torch.no_grad():
        embedding = sam.image_encoder(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(4)))
    points, labels, _ = random_prompts(4, 3, side=side)
    assert check(PointDecoderGraph(sam), sam, embedding, (points, labels, torch.zeros(4, dtype=torch.int64)))


@torch.no_grad()
def test_no_prompts(sam, embeddings):
    none = torch.zeros(0, dtype=torch.int64)
    logits, iou = PointDecoderGraph(sam)(embeddings, torch.zeros(0, 2, 2), none.reshape(0, 2), none)
    assert logits.shape == (0, 4, SMALL // 4, SMALL // 4)
    assert iou.shape == (0, 4)


@torch.no_grad()
def test_padding_is_not_without_effect(sam, embeddings):
    """Why prompts of different lengths need calls of their own: segment_anything itself answers differently."""
    points, labels, _ = random_prompts(1, 2, (1,))
    padded = torch.cat([labels, torch.full((1, 1), -1)], 1), torch.cat([points, torch.zeros(1, 1, 2)], 1)
    alone, _ = predicted(sam, embeddings[0], points, labels)
    longer, _ = predicted(sam, embeddings[0], padded[1], padded[0])
    assert (alone - longer).abs().max() > LIMIT * alone.std()


class NoPadding(PointDecoderGraph):
    def _tokens(self, points, labels):
        return super()._tokens(points, labels)[:, :-1]


class SwappedLabels(PointDecoderGraph):
    def _tokens(self, points, labels):
        return super()._tokens(points, torch.where(labels >= 0, 1 - labels, labels))


class PlacedPadding(PointDecoderGraph):
    def _tokens(self, points, labels):
        return super()._tokens(points, labels.clamp(min=0))


class HalfPixel(PointDecoderGraph):
    def _tokens(self, points, labels):
        return super()._tokens(points - 0.5, labels)


class OtherMasks(PointDecoderGraph):
    def __init__(self, sam):
        super().__init__(sam)
        straight = self.decoder.alternative_logits
        self.decoder.alternative_logits = lambda cells, kernels: straight(cells, kernels.roll(1, 2))


@pytest.mark.parametrize("wrong", [NoPadding, SwappedLabels, PlacedPadding, HalfPixel, OtherMasks])
def test_the_comparison_notices(sam, embeddings, wrong):
    prompts = random_prompts(6, 3, (-1, 0, 1))
    assert check(PointDecoderGraph(sam), sam, embeddings, prompts)
    assert not check(wrong(sam), sam, embeddings, prompts)


def test_the_labels_are_those_of_segment_anything(sam):
    """A point in the object and one beside it differ by their learnt embeddings and by nothing else."""
    points = torch.tensor([[[20.0, 30.0]]])
    inside, beside = (PointDecoderGraph(sam)._tokens(points, torch.tensor([[label]]))[0, 0] for label in (1, 0))
    kinds = sam.prompt_encoder.point_embeddings
    np.testing.assert_allclose((inside - beside).detach(), (kinds[1].weight - kinds[0].weight)[0].detach(), atol=1e-6)
