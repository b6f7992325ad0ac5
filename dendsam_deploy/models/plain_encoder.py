"""SAM's plain vision transformer as a deployable graph: the same function as segment_anything's, with less to do.

The parameters are those of ``segment_anything.modeling.ImageEncoderViT``, rearranged once when the graph is made:

Grey patches
    A grey image is three equal channels, ``(g - mean_c) / std_c`` each, and zero beyond the tile's valid size. Its
    patch embedding is one convolution of two planes: the grey values, with the kernels summed over the channels and
    divided by ``std_c``, and the plane that is 1 where the tile is valid, with what the means subtract.
Keys and values without bias
    ``q . (W_k x + b_k)`` differs from ``q . W_k x`` by the same number for every key, which the softmax takes out
    again. Attention weights sum to one, so ``b_v`` passes through attention unchanged and joins the bias of the
    projection behind it.
Padding without projections
    Windows of 14 tokens pad a grid of 64 to 70. A padding token is zero before its projections, so its key and value
    are the biases alone: by the point above, zero. The 4096 real tokens are projected and then padded, not 4900.
Relative position without a gather
    The tables of relative positions are gathered, and for other image sizes interpolated, once.

The relative position of ViTDet is ``softmax(s q k^T + q R_h + q R_w)``: each query meets a vector for each row and one
for each column of the keys. It is computed in either of two exact ways:

``added``
    The two products are added to the scores, rows and columns broadcast.
``widened``
    ``[q, q R_h, q R_w] . [s k, onehot(row), onehot(column)]`` is the same number as one product of wider heads, and
    what is left is attention without a mask, for which GPUs have fused kernels.

At half precision the linear layers and attention of the blocks are half. The residual stream, which overflows fp16 in
some checkpoints and wears bf16 down, the norms, the patch embedding and the neck, which take a hundredth of the time,
stay in float32.

References
----------
segment_anything/modeling/image_encoder.py at github.com/facebookresearch/segment-anything; Li et al. 2022, "Exploring
plain vision transformer backbones for object detection", arXiv:2203.16527; for the overflows
github.com/mit-han-lab/efficientvit/issues/142.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from segment_anything.modeling.image_encoder import ImageEncoderViT, get_rel_pos
from torch import Tensor, nn
from torch.nn import functional

from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from segment_anything.modeling.common import LayerNorm2d
    from segment_anything.modeling.image_encoder import Attention, Block

    from dendsam_deploy.bundle.manifest import AttentionForm


def is_plain(sam: Sam) -> bool:
    """Tell whether a SAM has the plain transformer, and not MobileSAM's."""
    return isinstance(sam.image_encoder, ImageEncoderViT)


class PlainEncoder(nn.Module):
    """Normalisation, padding and plain image encoder of a SAM for grey tiles.

    Parameters
    ----------
    sam : Sam
        Its image encoder is copied.
    attention : str
        ``added`` or ``widened``.
    compute : torch.dtype
        Type of the large products.
    """

    def __init__(self, sam: Sam, attention: AttentionForm, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        encoder = sam.image_encoder
        self.grid = encoder.img_size // EMBEDDING_STRIDE_PX
        self.patches = _grey_patch_embedding(sam)
        self.position = nn.Parameter(encoder.pos_embed.detach().clone())
        self.blocks = nn.ModuleList(_Block(block, self.grid, attention, compute) for block in encoder.blocks)
        narrow, narrow_norm, spread, spread_norm = encoder.neck
        self.narrow = _linear(narrow.weight.detach()[:, :, 0, 0], None)
        self.narrow_norm = _layer_norm(narrow_norm)
        self.spread = copy.deepcopy(spread)
        self.spread_norm = _layer_norm(spread_norm)

    def forward(self, tiles: Tensor, sizes: Tensor) -> Tensor:
        """Encode tiles; see `image_encoder.ImageEncoderGraph.forward`."""
        place = torch.arange(tiles.shape[-1], device=tiles.device)
        inside = (place < sizes[:, :1])[:, :, None] & (place < sizes[:, 1:])[:, None, :]
        valid = inside.to(torch.float32)
        planes = torch.stack([tiles.to(torch.float32) * valid, valid], dim=1)
        x = self.patches(planes).permute(0, 2, 3, 1) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.spread(self.narrow_norm(self.narrow(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        embeddings: Tensor = self.spread_norm(x).permute(0, 3, 1, 2)
        return embeddings


class _Block(nn.Module):
    """One transformer block on tokens ``(b, H, W, C)`` float32, attending inside windows or over the whole grid."""

    def __init__(self, block: Block, grid: int, attention: AttentionForm, compute: torch.dtype) -> None:
        super().__init__()
        self.compute, self.grid, self.window = compute, grid, block.window_size or grid
        self.count = -(-grid // self.window)
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attention = _Attention(block.attn, self.window, attention).to(compute)
        self.lin1, self.lin2 = (copy.deepcopy(layer).to(compute) for layer in (block.mlp.lin1, block.mlp.lin2))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._split(part) for part in self.attention.inputs(self.norm1(x).to(self.compute)))
        x = x + self.attention.project(self._join(self.attention(query, key, value))).to(torch.float32)
        hidden = functional.gelu(self.lin1(self.norm2(x).to(self.compute)))
        out: Tensor = x + self.lin2(hidden).to(torch.float32)
        return out

    def _split(self, x: Tensor) -> Tensor:
        """Cut ``(b, H, W, h * d)`` into heads and windows: ``(b * windows, h, w * w, d)``."""
        grid, side, count = x.shape[1], self.window, self.count
        x = functional.pad(x, (0, 0, 0, side * count - grid, 0, side * count - grid))
        x = x.reshape(-1, count, side, count, side, self.attention.heads, self.attention.width)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, self.attention.heads, side * side, self.attention.width)

    def _join(self, x: Tensor) -> Tensor:
        """Undo `_split` and drop the padding."""
        side, count = self.window, self.count
        x = x.reshape(-1, count, count, self.attention.heads, side, side, self.attention.width)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, count * side, count * side, self.attention.channels)
        return x[:, : self.grid, : self.grid]


class _Attention(nn.Module):
    """Multi-head attention with relative position on the tokens of square windows.

    Parameters
    ----------
    attention : segment_anything.modeling.image_encoder.Attention
        Its parameters are copied.
    side : int
        Side of the windows in tokens.
    form : str
        ``added`` or ``widened``.
    """

    rows: Tensor
    columns: Tensor
    places: Tensor

    def __init__(self, attention: Attention, side: int, form: AttentionForm) -> None:
        super().__init__()
        self.heads, self.side, self.form = attention.num_heads, side, form
        self.channels = attention.proj.in_features
        self.width = self.channels // self.heads
        query, key, value = attention.qkv.weight.detach().chunk(3)
        query_bias, _, value_bias = attention.qkv.bias.detach().chunk(3)
        self.query = _linear(query, query_bias)
        self.key = _linear(key * attention.scale, None)
        self.value = _linear(value, None)
        weight, bias = attention.proj.weight.detach(), attention.proj.bias.detach()
        self.project = _linear(weight, bias + weight @ value_bias)
        # (query row, d, key row): one matrix for each row of queries, and one for each column.
        for name, table in (("rows", attention.rel_pos_h), ("columns", attention.rel_pos_w)):
            self.register_buffer(name, get_rel_pos(side, side, table.detach()).transpose(1, 2).contiguous())
        if form == "widened":
            place = torch.arange(side * side)
            onehot = functional.one_hot(torch.stack([place // side, place % side], 1), side).flatten(1)
            self.register_buffer("places", onehot.to(torch.float32))

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens ``(..., C)`` to queries, keys and values of the same shape."""
        return self.query(x), self.key(x), self.value(x)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within windows: ``(n, h, w * w, d)`` each."""
        side = self.side
        grid = torch.unflatten(query, 2, (side, side))
        by_row = grid @ self.rows  # (n, h, y, x, key y)
        by_column = (grid.transpose(2, 3) @ self.columns).transpose(2, 3)  # (n, h, y, x, key x)
        if self.form == "widened":
            wide_query = torch.cat([query, by_row.flatten(2, 3), by_column.flatten(2, 3)], dim=-1)
            places = self.places.expand(key.shape[0], self.heads, -1, -1)
            scores = wide_query @ torch.cat([key, places], dim=-1).transpose(2, 3)
        else:
            scores = torch.unflatten(query @ key.transpose(2, 3), 3, (side, side))
            scores = torch.unflatten(scores, 2, (side, side)) + by_row[..., :, None] + by_column[..., None, :]
            scores = scores.flatten(4, 5).flatten(2, 3)
        return scores.softmax(dim=-1) @ value


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with given parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def _layer_norm(norm: LayerNorm2d) -> nn.LayerNorm:
    """Return segment_anything's LayerNorm2d as the norm of channels-last cells, which engines have an operator for."""
    layer = nn.LayerNorm(norm.weight.shape[0], eps=norm.eps)
    layer.load_state_dict(norm.state_dict())
    return layer


def _grey_patch_embedding(sam: Sam) -> nn.Conv2d:
    """Return the patch embedding of the planes of grey values and validity that equals that of a normalised image."""
    original = sam.image_encoder.patch_embed.proj
    weight = original.weight.detach()
    scaled = weight / sam.pixel_std.reshape(1, 3, 1, 1)
    planes = torch.stack([scaled.sum(dim=1), -(scaled * sam.pixel_mean.reshape(1, 3, 1, 1)).sum(dim=1)], dim=1)
    conv = nn.Conv2d(2, weight.shape[0], original.kernel_size, original.stride)
    conv.weight, conv.bias = nn.Parameter(planes), nn.Parameter(original.bias.detach().clone())
    return conv
