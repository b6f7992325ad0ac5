"""The rearranged encoder against segment_anything's own, in both forms and every type."""

import pytest
import torch

from dendsam_deploy.models.plain_encoder import PlainEncoder, is_plain
from dendsam_deploy.models.reference import encode_tiles
from dendsam_deploy.models.sam import build_sam

FORMS = ("added", "widened")


def random_sam(model_type, side):
    """A SAM of which no parameter is zero or one, as position tables, biases and norms are in a new one."""
    torch.manual_seed(1)
    sam = build_sam(model_type, side)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sam.image_encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "rel_pos" in name or name == "pos_embed" or name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "norm" in name or name in ("neck.1.weight", "neck.3.weight"):
                parameter.copy_(1 + 0.2 * noise)
    return sam


@pytest.fixture(scope="module")
def sam():
    """A grid of 10 cells in windows of 8: windows are padded at the right and at the bottom."""
    return random_sam("tiny", 160)


@pytest.fixture(scope="module")
def tiles():
    return torch.randint(0, 256, (3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


SIZES = torch.tensor([[160, 160], [97, 160], [33, 1]])


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_equals_segment_anything(sam, tiles, form):
    assert relative(PlainEncoder(sam, form)(tiles, SIZES), encode_tiles(sam, tiles, SIZES)) < 1e-5


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_equals_segment_anything_for_the_published_shapes(form):
    """ViT-H has heads of 80: the scale of its scores is no power of two."""
    sam = random_sam("vit_b", 240)
    tiles = torch.randint(0, 256, (1, 240, 240), dtype=torch.uint8)
    sizes = torch.tensor([[240, 201]])
    assert relative(PlainEncoder(sam, form)(tiles, sizes), encode_tiles(sam, tiles, sizes)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("compute", "limit"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_half_precision_is_close_and_leaves_through_the_door_as_float32(sam, tiles, form, compute, limit):
    found = PlainEncoder(sam, form, compute)(tiles, SIZES)
    expected = encode_tiles(sam, tiles, SIZES)
    assert found.dtype == torch.float32
    assert 1e-6 < relative(found, expected) < limit


@torch.no_grad()
def test_a_residual_stream_beyond_the_range_of_fp16_survives(tiles):
    """Published checkpoints reach magnitudes beyond 65504 there; a graph that is half throughout returns infinity."""
    sam = random_sam("tiny", 160)
    sam.image_encoder.pos_embed.mul_(1e6)
    expected = encode_tiles(sam, tiles, SIZES)
    found = PlainEncoder(sam, "added", torch.float16)(tiles, SIZES)
    assert torch.isfinite(found).all()
    assert relative(found, expected) < 0.01


@torch.no_grad()
def test_the_weights_of_the_model_stay_as_they_are(sam, tiles):
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    PlainEncoder(sam, "widened", torch.float16)(tiles, SIZES)
    assert all(torch.equal(before[name], tensor) for name, tensor in sam.state_dict().items())
    assert {tensor.dtype for tensor in sam.state_dict().values()} == {torch.float32}


def mutated(change):
    sam = random_sam("tiny", 160)
    with torch.no_grad():
        change(sam.image_encoder)
    return sam


MISTAKES = {
    "no relative bias in one layer": lambda e: e.blocks[5].attn.rel_pos_w.zero_(),
    "no relative bias in one window layer": lambda e: e.blocks[1].attn.rel_pos_h.zero_(),
    "no value bias": lambda e: e.blocks[2].attn.qkv.bias[-192:].zero_(),
    "no query bias": lambda e: e.blocks[2].attn.qkv.bias[:192].zero_(),
    "no position": lambda e: e.pos_embed.zero_(),
    "last block skipped": lambda e: e.blocks[7].attn.proj.weight.zero_(),
}


@torch.no_grad()
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(sam, tiles, mistake):
    wrong = PlainEncoder(mutated(MISTAKES[mistake]), "added")(tiles, SIZES)
    assert relative(wrong, encode_tiles(sam, tiles, SIZES)) > 1e-3


@torch.no_grad()
def test_a_bias_of_the_keys_changes_nothing(sam, tiles):
    """What the graph leaves out, segment_anything's own encoder can do without as well."""
    without = mutated(lambda e: [block.attn.qkv.bias[192:384].zero_() for block in e.blocks])
    assert relative(encode_tiles(without, tiles, SIZES), encode_tiles(sam, tiles, SIZES)) < 1e-5


def test_mobile_sam_has_another_encoder(sam):
    assert is_plain(sam)
    assert not is_plain(build_sam("vit_t", 128))
