"""What of a SAM is trained: all of it, its decoder, or its decoder and adapters of low rank in its encoder.

An adapter adds ``B A x`` to what a linear layer computes of x, with A of shape (rank, in) and B of shape (out, rank),
and B zero at first; the layer itself stays as it is. ``W + B A`` is the same function, so a checkpoint holds only that:
whoever reads it sees a plain SAM.

References
----------
Hu et al. 2021, "LoRA", arXiv:2106.09685. For SAM: Zhang and Liu 2023, arXiv:2304.13785; Teuber et al. 2025,
arXiv:2502.00418 (in micro-sam).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from segment_anything.modeling import Sam

    from dendsam_deploy.training.sam_options import TrainedParts

ADAPTED_LAYERS = ("attn.qkv", "mlp.lin1", "mlp.lin2", "mlp.fc1", "mlp.fc2")
"""Ends of the names of layers that get an adapter; the last two are MobileSAM's."""

_DOWN, _UP = "adapter_down", "adapter_up"


class AdaptedLinear(nn.Linear):
    """A frozen linear layer and what its adapter adds.

    Parameters
    ----------
    linear : nn.Linear
        Its parameters are shared.
    rank : int
        Rank of the adapter, of each part by itself.
    parts : int
        Equal parts of the output with an adapter each: 3 where it is query, key and value.
    generator : torch.Generator
        Source of the starting values.
    """

    def __init__(self, linear: nn.Linear, rank: int, parts: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would make parameters of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        down = torch.empty(parts, rank, self.in_features)
        nn.init.kaiming_uniform_(down.view(-1, self.in_features), a=math.sqrt(5), generator=generator)
        up = torch.zeros(parts, self.out_features // parts, rank)
        self.adapter_down = nn.Parameter(down.to(linear.weight.device))
        self.adapter_up = nn.Parameter(up.to(linear.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        parts, rank, _ = self.adapter_down.shape
        inner = torch.unflatten(functional.linear(input, self.adapter_down.flatten(0, 1)), -1, (parts, rank))
        added = (self.adapter_up @ inner[..., None])[..., 0].flatten(-2)
        adapted: Tensor = functional.linear(input, self.weight, self.bias) + added
        return adapted


def choose_parts(sam: Sam, train: TrainedParts, rank: int, generator: torch.Generator) -> None:
    """Let a part of a model be trained; the rest gets no gradient.

    Parameters
    ----------
    sam : Sam
        Changed in place.
    train : str
        ``whole``, ``decoder`` or ``lora``; in the latter two the image encoder's own parameters are frozen.
    rank : int
        Rank of adapters.
    generator : torch.Generator
        Source of their starting values.
    """
    if train == "whole":
        return
    sam.image_encoder.requires_grad_(False)
    if train == "decoder":
        return
    chosen = [(name, layer) for name, layer in sam.image_encoder.named_modules() if name.endswith(ADAPTED_LAYERS)]
    for name, layer in chosen:
        parent, _, last = name.rpartition(".")
        adapted = AdaptedLinear(layer, rank, 3 if last == "qkv" else 1, generator)
        setattr(sam.image_encoder.get_submodule(parent), last, adapted)


def set_training_mode(sam: Sam, train: TrainedParts) -> None:
    """Put a model into training mode; a frozen encoder stays in evaluation, or its batch norms would go on learning."""
    sam.train()
    if train != "whole":
        sam.image_encoder.eval()


def load_merged(sam: Sam, state: Mapping[str, Tensor]) -> None:
    """Let a model, with or without adapters, have the weights of a plain SAM; its adapters add nothing then."""
    empty = {name: torch.zeros_like(value) for name, value in sam.state_dict().items() if name.endswith(_UP)}
    kept = {name: value for name, value in sam.state_dict().items() if name.endswith(_DOWN)}
    sam.load_state_dict({**state, **empty, **kept})


def merged_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which every adapter is a part of the weight that it adapts."""
    merged = {name: value for name, value in state.items() if not name.endswith((_DOWN, _UP))}
    for name, down in state.items():
        if name.endswith(_DOWN):
            layer = name.removesuffix(_DOWN)
            # In double precision: the rounding of the sum to float32 is then all that distinguishes the two forms.
            added = (state[layer + _UP].double() @ down.double()).flatten(0, 1)
            weight = state[f"{layer}weight"]
            merged[f"{layer}weight"] = (weight.double() + added).to(weight.dtype)
    return merged
