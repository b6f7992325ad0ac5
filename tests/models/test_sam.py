"""SAM models of every type against segment_anything's own builders."""

import pytest
import torch
from segment_anything import sam_model_registry

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.models.architectures import MODEL_TYPES, default_image_size
from dendsam_deploy.models.sam import build_sam, initialise


def shapes(sam):
    return {name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()}


@pytest.mark.parametrize("model_type", ["vit_b", "vit_l", "vit_h"])
def test_official_types_equal_those_of_segment_anything(model_type):
    with torch.device("meta"):  # shapes without memory
        mine, theirs = build_sam(model_type), sam_model_registry[model_type]()
    assert shapes(mine) == shapes(theirs)
    assert str(mine) == str(theirs)  # layers with their constants
    assert [block.window_size for block in mine.image_encoder.blocks] == [
        block.window_size for block in theirs.image_encoder.blocks
    ]
    assert mine.image_encoder.img_size == theirs.image_encoder.img_size == default_image_size(model_type)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_image_size_decides_the_grid(model_type):
    with torch.device("meta"):
        sam = build_sam(model_type, 128)
        assert sam.image_encoder(torch.zeros(1, 3, 128, 128)).shape == (1, 256, 8, 8)
    assert sam.prompt_encoder.image_embedding_size == (8, 8)
    assert sam.prompt_encoder.input_image_size == (128, 128)
    assert not sam.training


def test_tiny_is_small_enough_to_package():
    with torch.device("meta"):
        sam = build_sam("tiny")
    assert sam.image_encoder.img_size == default_image_size("tiny") == 512
    assert sum(parameter.numel() for parameter in sam.parameters()) < 9_000_000


@pytest.mark.parametrize("size", [0, -16, 48, 100, 1000, 4112])
def test_impossible_image_sizes_are_refused(size):
    with pytest.raises(InvalidArgumentError, match=f"image size of {size} px is not possible; choose a multiple of 16"):
        build_sam("tiny", size)


def test_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(InvalidArgumentError, match="unknown model type 'vit_x'; choose one of vit_b, vit_l"):
        build_sam("vit_x")


def test_initialisation_depends_on_the_generator_alone():
    models = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        sam = build_sam("tiny", 64)
        initialise(sam, torch.Generator().manual_seed(7))
        models.append(sam.image_encoder)
    first, second = models
    assert torch.equal(first.pos_embed, second.pos_embed)
    assert all(
        torch.equal(a.attn.qkv.weight, b.attn.qkv.weight) for a, b in zip(first.blocks, second.blocks, strict=True)
    )
    assert 0.015 < first.pos_embed.detach().std() < 0.025
