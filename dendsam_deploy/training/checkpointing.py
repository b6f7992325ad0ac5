"""Blocks of an image encoder that are computed a second time on the way back in place of being remembered."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from torch import nn


def encoder_blocks(sam: Sam) -> list[nn.Module]:
    """Return the transformer blocks of a plain image encoder.

    MobileSAM's has none that could be computed twice: its batch norms would count every tile twice.
    """
    return list(getattr(sam.image_encoder, "blocks", ()))


def recompute_blocks(sam: Sam) -> None:
    """Let every block of the image encoder keep its input alone; gradients stay what they are."""
    for block in encoder_blocks(sam):
        # On the instance: a module around the block would change the names of all its tensors.
        object.__setattr__(block, "forward", partial(checkpoint, block.forward, use_reentrant=False))
