"""The deployable encoder against ``Sam.preprocess`` and the original image encoder."""

import pytest
import torch
from segment_anything import SamPredictor

from dendsam_deploy.models.image_encoder import ImageEncoderGraph
from dendsam_deploy.models.sam import build_sam, initialise

SIDE = 128


@pytest.fixture(scope="module", params=["tiny", "vit_t"])
def sam(request):
    torch.manual_seed(0)
    sam = build_sam(request.param, SIDE)
    initialise(sam, torch.Generator().manual_seed(1))
    return sam


@pytest.fixture(scope="module")
def tiles():
    """Return smooth tiles; rubbish beyond their valid sizes must not matter."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    waves = torch.stack([torch.sin(y / a) * torch.cos(x / b) for a, b in ((5, 9), (20, 3), (7, 7))])
    return (127 + 120 * waves).to(torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[(128, 128)] * 3, [(128, 70), (40, 128), (1, 1)], [(33, 16), (127, 127), (64, 64)]])
def test_equals_segment_anything(sam, tiles, sizes):
    found = ImageEncoderGraph(sam)(tiles, torch.tensor(sizes))
    assert found.shape == (3, 256, SIDE // 16, SIDE // 16)
    for tile, (height, width), embedding in zip(tiles, sizes, found, strict=True):
        rgb = tile[None, None, :height, :width].expand(-1, 3, -1, -1)
        expected = sam.image_encoder(sam.preprocess(rgb))[0]
        assert (embedding - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_equals_the_features_of_sam_predictor(sam, tiles):
    predictor = SamPredictor(sam)
    predictor.set_image(tiles[0, :, :96].numpy()[..., None].repeat(3, 2))
    found = ImageEncoderGraph(sam)(tiles[:1], torch.tensor([[128, 96]]))
    assert (found - predictor.features).abs().max() < 1e-4 * predictor.features.abs().max()


@torch.no_grad()
def test_the_comparison_notices_a_size_that_is_one_pixel_off(sam, tiles):
    graph = ImageEncoderGraph(sam)
    right, wrong = (graph(tiles[:1], torch.tensor([[128, width]])) for width in (96, 97))
    assert (right - wrong).abs().max() > 1e-3 * right.abs().max()
