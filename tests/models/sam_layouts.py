"""SAM checkpoints in the key layouts of the programs that make them, with random weights."""

from __future__ import annotations

import copy
import functools
import pathlib
import sys
import types
from collections import OrderedDict

import torch
from torch import nn

from dendsam_deploy.models.sam import build_sam


def random_sam(model_type="tiny", image_size=64, seed=0):
    """A SAM whose every parameter is random, so that none can be forgotten unnoticed; each call gives another copy."""
    return copy.deepcopy(_random_sam(model_type, image_size, seed))


@functools.cache
def _random_sam(model_type, image_size, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = build_sam(model_type, image_size)
        with torch.no_grad():
            for parameter in sam.parameters():
                if parameter.numel() > 1 and parameter.std() == 0:
                    parameter.normal_(std=0.1)
    return sam.eval()


def led(state, leader):
    """The state dict with something before every name."""
    return OrderedDict((f"{leader}{key}", value) for key, value in state.items())


def unetr_state(sam):
    """A UNETR of torch_em around SAM's image encoder, with some of the names of its convolutional decoder."""
    encoder = led(sam.image_encoder.state_dict(), "encoder.")
    decoder = {
        "decoder.blocks.0.block.1.weight": torch.randn(8, 8, 3, 3),
        "decoder.samplers.0.block.0.weight": torch.randn(8, 8, 2, 2),
        "deconv1.block.0.weight": torch.randn(8, 8, 2, 2),
        "base.block.1.weight": torch.randn(8, 8, 3, 3),
        "out_conv.weight": torch.randn(3, 8, 1, 1),
    }
    return OrderedDict(encoder | decoder)


def decoder_state(sam):
    """What micro-sam keeps of a UNETR beside SAM: all but its encoder."""
    return OrderedDict((key, value) for key, value in unetr_state(sam).items() if not key.startswith("encoder."))


class ForeignPackage:
    """A package that exists while checkpoints are written, and not when they are read."""

    def __enter__(self):
        package, module = types.ModuleType("torch_em"), types.ModuleType("torch_em.segmentation")

        class SegmentationDataset:
            def __init__(self, paths):
                self.paths = paths

        class Sampler:
            def __reduce__(self):
                return module.rebuild_sampler, (3, {"p": 0.5}), {"seed": 7}

        def rebuild_sampler(count, options):
            raise AssertionError("a foreign function was called")

        for thing in (SegmentationDataset, Sampler, rebuild_sampler):
            thing.__module__, thing.__qualname__ = "torch_em.segmentation", thing.__name__
            setattr(module, thing.__name__, thing)
        package.segmentation = module
        sys.modules["torch_em"], sys.modules["torch_em.segmentation"] = package, module
        return module

    def __exit__(self, *reason):
        del sys.modules["torch_em"], sys.modules["torch_em.segmentation"]


def training_checkpoint(sam, module, *, leader="sam."):
    """What torch_em's trainer of micro-sam saves: names led by ``sam.``, an optimiser, and objects of its own."""
    optimizer = torch.optim.AdamW(sam.parameters(), lr=1e-5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=3)
    for parameter in list(sam.parameters())[:2]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "iteration": 2000,
        "epoch": 99,
        "best_epoch": 80,
        "best_metric": torch.tensor(0.125).numpy()[()],
        "current_metric": 0.25,
        "model_state": led(sam.state_dict(), leader),
        "optimizer_state": optimizer.state_dict(),
        "scheduler_state": scheduler.state_dict(),
        "decoder_state": decoder_state(sam),
        "init": {
            "train_dataset": module.SegmentationDataset(["a.tif", "b.tif"]),
            "sampler": module.Sampler(),
            "optimizer": optimizer,
            "path": pathlib.PurePosixPath("/data/train"),
        },
        "train_time": 12.5,
        "timestamp": "2024-05-05-10-10-10",
    }


class AttentionAdapter(nn.Module):
    """A linear layer of q, k and v with an adapter for some of them: an oracle that never forms the sum of weights."""

    def __init__(self, qkv, rank, parts, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.qkv_proj, self.parts = qkv, parts
        self.width = qkv.out_features // 3
        for part in parts:
            for name, shape in (("a", (rank, qkv.in_features)), ("b", (self.width, rank))):
                layer = nn.Linear(shape[1], shape[0], bias=False)
                layer.weight = nn.Parameter(torch.randn(shape, generator=generator) * 0.5)
                setattr(self, f"w_{name}_linear_{part}", layer)

    def forward(self, x):
        found = list(self.qkv_proj(x).split(self.width, dim=-1))
        for place, part in enumerate("qkv"):
            if part in self.parts:
                down, up = getattr(self, f"w_a_linear_{part}"), getattr(self, f"w_b_linear_{part}")
                found[place] = found[place] + up(down(x))
        return torch.cat(found, dim=-1)


class MlpAdapter(nn.Module):
    """Both layers of an MLP with an adapter each: an oracle as above."""

    def __init__(self, mlp, rank, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mlp_layer = mlp
        for index, linear in ((1, mlp.lin1), (2, mlp.lin2)):
            for name, shape in (("a", (rank, linear.in_features)), ("b", (linear.out_features, rank))):
                layer = nn.Linear(shape[1], shape[0], bias=False)
                layer.weight = nn.Parameter(torch.randn(shape, generator=generator) * 0.5)
                setattr(self, f"w_{name}_linear_{index}", layer)

    def forward(self, x):
        x = self.mlp_layer.act(self.mlp_layer.lin1(x) + self.w_b_linear_1(self.w_a_linear_1(x)))
        return self.mlp_layer.lin2(x) + self.w_b_linear_2(self.w_a_linear_2(x))


def adapt(sam, blocks, parts="qv", rank=3, *, with_mlp=False):
    """Put adapters into the blocks of an image encoder, as micro-sam's peft_sam does."""
    for index in blocks:
        block = sam.image_encoder.blocks[index]
        if parts:
            block.attn.qkv = AttentionAdapter(block.attn.qkv, rank, parts, seed=index)
        if with_mlp:
            block.mlp = MlpAdapter(block.mlp, rank, seed=100 + index)
    return sam.eval()
