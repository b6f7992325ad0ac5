"""MobileSAM's image encoder: timm's TinyViT-5M, arranged and named as in MobileSAM's checkpoints; the home of ``timm``.

MobileSAM departs from TinyViT in two points: the last downsampling keeps the resolution, so that an input of S px gives
S/16 cells, and SAM's neck replaces the classifier.

References
----------
Wu et al. 2022, "TinyViT", arXiv:2207.10666. Zhang et al. 2023, "Faster Segment Anything", arXiv:2306.14289;
github.com/ChaoningZhang/MobileSAM.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import Attention, ConvNorm, TinyVit, TinyVitBlock
from torch import nn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WIDTHS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
HEADS = (2, 4, 5, 10)
WINDOWS = (7, 7, 14, 7)
"""Channels, blocks, attention heads and window sides (cells) of the four layers; the first layer is convolutional."""

NECK_CHANNELS = 256
CLASSES = 1000


class TinyViTEncoder(nn.Module):
    """TinyViT-5M between SAM's input and SAM's decoder.

    Its parameters bear the names that they have in MobileSAM's checkpoints.

    Parameters
    ----------
    image_size : int
        Side S of the square input, px; a multiple of 16.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.img_size = image_size  # the name under which SamPredictor looks for it
        source: Any = TinyVit(
            num_classes=0, embed_dims=WIDTHS, depths=DEPTHS, num_heads=HEADS, window_sizes=WINDOWS, drop_path_rate=0.0
        )
        stem, stages = source.patch_embed, source.stages
        self.patch_embed = nn.Sequential(OrderedDict(seq=nn.Sequential(stem.conv1, stem.act, stem.conv2)))
        stages[3].downsample.conv2.conv.stride = (1, 1)
        # In timm a downsampling opens a stage; in MobileSAM it closes the layer before. The computation is the same.
        self.layers = nn.Sequential(
            nn.Sequential(OrderedDict(blocks=stages[0].blocks, downsample=stages[1].downsample)),
            AttentionLayer(stages[1].blocks, stages[2].downsample),
            AttentionLayer(stages[2].blocks, stages[3].downsample),
            AttentionLayer(stages[3].blocks, None),
        )
        # MobileSAM's files carry a classifier along. Keeping it keeps their table of tensors; nothing computes with it.
        self.norm_head = nn.LayerNorm(WIDTHS[-1])
        self.head = nn.Linear(WIDTHS[-1], CLASSES)
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], NECK_CHANNELS, kernel_size=1, bias=False),
            LayerNorm2d(NECK_CHANNELS),
            nn.Conv2d(NECK_CHANNELS, NECK_CHANNELS, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(NECK_CHANNELS),
        )
        for module in list(self.modules()):
            _adopt_parts(module)

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images.

        Parameters
        ----------
        images : Tensor, shape (b, 3, S, S), float32
            As ``Sam.preprocess`` returns them.

        Returns
        -------
        Tensor, shape (b, 256, S/16, S/16), float32
        """
        embeddings: Tensor = self.neck(self.layers(self.patch_embed(images)))
        return embeddings


class AttentionLayer(nn.Module):
    """Window-attention blocks, which work channels-last, and the downsampling behind them, which does not.

    Parameters
    ----------
    blocks : nn.Sequential
        Blocks of timm.
    downsample : nn.Module or None
        None keeps the output of the last block.
    """

    def __init__(self, blocks: nn.Sequential, downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Turn features ``(b, c, h, w)`` into ``(b, c', h', w')``."""
        x = self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x if self.downsample is None else self.downsample(x)


class PlainAttention(Attention):
    """timm's attention without its cache.

    In evaluation timm keeps the biases that it gathered first, even when the weights change.
    """

    attention_bias_idxs: Tensor

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """Gather the biases ``(heads, n, n)`` of all pairs of a window's n cells from the table of distances."""
        biases: Tensor = self.attention_biases[:, self.attention_bias_idxs]
        return biases


def _adopt_parts(parent: nn.Module) -> None:
    """Replace children of a module whose names or behaviour differ from MobileSAM's."""
    for name, child in list(parent.named_children()):
        if isinstance(child, ConvNorm):
            setattr(parent, name, nn.Sequential(OrderedDict(c=child.conv, bn=child.bn)))
    if isinstance(parent, TinyVitBlock):
        window = (parent.window_size, parent.window_size)
        heads = parent.num_heads
        parent.attn = PlainAttention(parent.dim, parent.dim // heads, heads, attn_ratio=1, resolution=window)
