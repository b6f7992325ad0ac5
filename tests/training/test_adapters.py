"""What of a model is trained, and adapters that are the same function once merged."""

from __future__ import annotations

import copy

import pytest
import torch

from dendsam_deploy.models.sam import build_sam, initialise
from dendsam_deploy.training.adapters import AdaptedLinear, choose_parts, merged_state, set_training_mode
from dendsam_deploy.training.averages import MovingAverage


def model(model_type="tiny", size=64):
    torch.manual_seed(0)
    sam = build_sam(model_type, size)
    initialise(sam, torch.Generator().manual_seed(0))
    return sam


def adapted(model_type="tiny", size=64, rank=3):
    """Return a model whose adapters have learnt something."""
    sam = model(model_type, size)
    choose_parts(sam, "lora", rank, torch.Generator().manual_seed(1))
    for name, parameter in sam.named_parameters():
        if name.endswith("adapter_up"):
            parameter.data.normal_(std=0.1)
    return sam


def trained_names(sam):
    return {name for name, parameter in sam.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("model_type", "size"), [("tiny", 64), ("vit_t", 64)])
def test_merged_weights_are_the_same_function(model_type, size):
    sam = adapted(model_type, size).double().eval()
    plain = build_sam(model_type, size).double().eval()
    plain.load_state_dict(merged_state(sam.state_dict()))
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    before = model(model_type, size).double().eval().image_encoder(x)
    with torch.no_grad():
        ours, theirs = sam.image_encoder(x), plain.image_encoder(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (ours - before).abs().max() > 1e-2, "the adapters did nothing"


def test_merging_in_single_precision_rounds_once():
    sam = adapted()
    layer = sam.image_encoder.blocks[0].mlp.lin1
    added = layer.adapter_up[0].double() @ layer.adapter_down[0].double()
    expected = (layer.weight.double() + added).float()
    assert torch.equal(merged_state(sam.state_dict())["image_encoder.blocks.0.mlp.lin1.weight"], expected)


def test_query_key_and_value_have_adapters_of_their_own():
    sam = adapted(rank=2)
    layer = sam.image_encoder.blocks[1].attn.qkv
    width = layer.in_features
    added = merged_state(sam.state_dict())["image_encoder.blocks.1.attn.qkv.weight"] - layer.weight
    assert [int(torch.linalg.matrix_rank(part, rtol=1e-3)) for part in added.split(width)] == [2, 2, 2]
    assert int(torch.linalg.matrix_rank(added, rtol=1e-3)) == 6


def test_a_merged_state_has_the_names_of_a_plain_sam():
    assert merged_state(adapted().state_dict()).keys() == model().state_dict().keys()


def test_new_adapters_change_nothing():
    sam = model()
    x = torch.randn(1, 3, 64, 64)
    expected = sam.image_encoder(x)
    choose_parts(sam, "lora", 4, torch.Generator().manual_seed(0))
    assert torch.equal(sam.image_encoder(x), expected)
    merged, before = merged_state(sam.state_dict()), model().state_dict()
    assert all(torch.equal(merged[name], value) for name, value in before.items())


class TestParts:
    def test_the_whole_model(self):
        sam = model()
        choose_parts(sam, "whole", 4, torch.Generator())
        assert trained_names(sam) == {name for name, _ in sam.named_parameters()}

    def test_the_decoder(self):
        sam = model()
        choose_parts(sam, "decoder", 4, torch.Generator())
        assert trained_names(sam) == {
            name for name, _ in sam.named_parameters() if not name.startswith("image_encoder.")
        }

    def test_adapters_and_decoder(self):
        sam = model()
        choose_parts(sam, "lora", 4, torch.Generator().manual_seed(0))
        encoder = {name for name in trained_names(sam) if name.startswith("image_encoder.")}
        assert encoder
        assert all("adapter_" in name for name in encoder)
        layers = [module for module in sam.image_encoder.modules() if isinstance(module, AdaptedLinear)]
        assert len(layers) == 8 * 3  # qkv and two of the MLP in each of the eight blocks

    def test_a_frozen_encoder_is_not_put_into_training_mode(self):
        """MobileSAM's batch norms would go on learning without any gradient."""
        sam = model("vit_t")
        set_training_mode(sam, "decoder")
        before = {name: value.clone() for name, value in sam.image_encoder.named_buffers()}
        sam.image_encoder(torch.randn(2, 3, 64, 64))
        assert all(torch.equal(value, before[name]) for name, value in sam.image_encoder.named_buffers())
        set_training_mode(sam, "whole")
        sam.image_encoder(torch.randn(2, 3, 64, 64))
        assert not all(torch.equal(value, before[name]) for name, value in sam.image_encoder.named_buffers())

    def test_an_average_holds_what_is_trained(self):
        sam = model()
        choose_parts(sam, "decoder", 4, torch.Generator())
        average = MovingAverage(sam)
        assert average.values.keys() == trained_names(sam)
        other = copy.deepcopy(sam)
        assert average.state(other).keys() == other.state_dict().keys()
