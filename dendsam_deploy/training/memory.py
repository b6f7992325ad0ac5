"""How much memory a training step needs, counted without taking any, and how much there is.

The model is run on torch's ``meta`` device, which knows the shape of every tensor and holds none, while autograd says
what it would keep for the way back.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from dendsam_deploy.models.box_decoder import BoxDecoderGraph
from dendsam_deploy.models.image_encoder import ImageEncoderGraph
from dendsam_deploy.training.checkpointing import encoder_blocks
from dendsam_deploy.training.prompted_decoder import PromptedDecoder
from dendsam_deploy.training.prompts import PromptSet

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from torch import Tensor

HALF_SHARE = 0.6
"""What half precision leaves of the encoder's activations: norms and the residual stream stay in float32."""

FRAGMENTS = 1.1
PASSING_BLOCKS = 3
"""What a step takes at its peak besides what it keeps: a tenth for fragments, and results on the way, which are about
three times what the largest block keeps (measured on ViT-B at 512 and 768 px with and without recomputation: 0.9 to 1.3
times what was estimated)."""


class StepMemory(NamedTuple):
    """Bytes of a training step.

    Parameters
    ----------
    fixed : int
        Gradients, the optimiser's moments and the averaged weights, whatever the batch.
    blocks : tuple of int
        What is kept of each block of the encoder for one tile.
    block_inputs : int
        What is kept of all of them where they are computed a second time.
    rest : int
        What else is kept of the encoder for one tile.
    object : int
        What is kept of the decoder for one object.
    """

    fixed: int
    blocks: tuple[int, ...]
    block_inputs: int
    rest: int
    object: int

    def tile(self, objects: int, *, checkpointing: bool, half: bool) -> int:
        """Return the bytes at the peak of a step for one more tile, with so many objects decoded at once."""
        largest = max(self.blocks, default=0)
        blocks = self.block_inputs + largest if checkpointing else sum(self.blocks)
        share = HALF_SHARE if half else 1
        kept = (blocks + self.rest) * share + objects * self.object
        return round(FRAGMENTS * kept + PASSING_BLOCKS * largest * share)


def step_memory(sam: Sam) -> StepMemory:
    """Count what a training step of a model keeps; frozen parameters count as such."""
    encoder, decoder = ImageEncoderGraph(sam), BoxDecoderGraph(sam)
    size = int(sam.image_encoder.img_size)
    tiles = torch.empty(1, size, size, dtype=torch.uint8, device="meta")
    sizes = torch.empty(1, 2, dtype=torch.int64, device="meta")
    blocks = encoder_blocks(sam)
    kept = _Kept()
    before: list[int] = []
    after: list[int] = []
    with ExitStack() as stack:
        for block in blocks:
            for hook in (
                block.register_forward_pre_hook(lambda *_: before.append(kept.bytes)),
                block.register_forward_hook(lambda *_: after.append(kept.bytes)),
            ):
                stack.callback(hook.remove)
        embeddings = kept.run(encoder, tiles, sizes)
    of_blocks = tuple(end - start for start, end in zip(before, after, strict=True))
    rest = kept.bytes - sum(of_blocks)
    inputs = len(blocks) * (size // 16) ** 2 * (int(sam.image_encoder.pos_embed.shape[-1]) if blocks else 0) * 4
    decoding = _Kept()
    objects = 4
    boxes = torch.empty(objects, 4, device="meta")
    index = torch.zeros(objects, dtype=torch.int64, device="meta")
    decoding.run(_Decoding(decoder), embeddings.detach().requires_grad_(), boxes, index)
    trained = sum(p.numel() * p.element_size() for p in sam.parameters() if p.requires_grad)
    return StepMemory(4 * trained, of_blocks, inputs, rest, decoding.bytes // objects)


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError, AttributeError):
        return None


class _Decoding(nn.Module):
    """The decoder for boxes as a module."""

    def __init__(self, graph: BoxDecoderGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, embeddings: Tensor, boxes: Tensor, tile_index: Tensor) -> Tensor:
        """Return mask logits."""
        decoder = PromptedDecoder(self.graph)
        return decoder(embeddings, tile_index, PromptSet(boxes_xyxy=boxes), multimask=False).logits


class _Kept:
    """Counts what autograd keeps besides the parameters; nothing is counted twice."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.bytes = 0

    def run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """Run a module that shares the model's parameters on the meta device."""
        state = {
            name: torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)
            for name, value in [*module.named_parameters(), *module.named_buffers()]
        }
        self._seen |= {_storage(value) for value in state.values()}
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda value: value):
            result: Tensor = functional_call(module, state, inputs)
        return result

    def _keep(self, value: Tensor) -> Tensor:
        key = _storage(value)
        if key not in self._seen:
            self._seen.add(key)
            self.bytes += value.untyped_storage().nbytes()
        return value


def _storage(value: Tensor) -> int:
    """Return what tells a tensor's storage from all others that exist; on the meta device none has an address."""
    return int(value.untyped_storage()._cdata)
