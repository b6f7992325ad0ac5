"""SAM's box decoder as a deployable graph: many boxes of many tiles at once, and only the arithmetic that a box needs.

The graph equals ``SamPredictor.predict_torch(boxes=..., multimask_output=False)`` to rounding: mask token 0, no padding
point, no mask prompt. It is a reordering, not an approximation, of segment_anything's modules, whose parameters it
shares, so the same module is trained and exported. What is reordered, with P image tokens of width C = 256 and T = 7
prompt tokens (one for the IoU, four for masks, two box corners) in H = 8 heads of width D = 16:

Few queries
    Token-to-image attention needs ``q . (W_k x + b_k)`` for H T = 56 query rows and P image tokens. Projecting the
    queries back, ``(W_k^T q) . x``, avoids projecting the image; ``q . b_k`` is the same for all image tokens and
    cancels in the softmax. Values are aggregated before they are projected, ``W_v (sum_p a_p x_p) + b_v``, because the
    weights sum to one.
Few keys
    Image-to-token attention folds in the same way: ``W_q`` into the token keys and ``W_o`` into the token values.
First layer once
    Until the first image-to-token attention, the image tokens do not depend on the box. Their projections are made once
    per tile.
Local upscaling
    The transposed convolutions with kernel = stride = 2, the layer norm and the GELU never look at a neighbouring cell.
    They run on the cells of the box's region alone.
Two tokens at the end
    After the last attention only the first mask token and the IoU token are read, so the others are left out of it.
Biases through the softmax
    The weights of a head sum to one, so an eighth of the output projection's bias in each folded value is that bias.

At half precision only what is as long as the image is half: its tokens, their scores and the upscaling. The 7 prompt
tokens, and all that is made of them alone, stay in float32.

References
----------
segment_anything/modeling/{mask_decoder,transformer,prompt_encoder}.py at github.com/facebookresearch/segment-anything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX, LOGIT_STRIDE_PX

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from segment_anything.modeling.common import LayerNorm2d
    from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock

CELLS_PER_TOKEN = EMBEDDING_STRIDE_PX // LOGIT_STRIDE_PX


class DecodedTokens(NamedTuple):
    """What the two-way transformer makes of n prompts.

    `masks` (n, m, C) are the first m mask tokens, `iou` (n, 4) the predicted IoU of all, `image` (n, P, C) the image
    tokens as each prompt left them.
    """

    masks: Tensor
    iou: Tensor
    image: Tensor


class BoxDecoderGraph(nn.Module):
    """The decoder of a SAM for box prompts.

    Parameters
    ----------
    sam : Sam
        Its prompt encoder and mask decoder are shared, not copied.
    compute : torch.dtype
        Type of what is as long as the image.
    """

    image_position: Tensor

    def __init__(self, sam: Sam, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.compute = compute
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.grid = sam.prompt_encoder.image_embedding_size[0]
        with torch.no_grad():
            position = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
        self.register_buffer("image_position", position, persistent=False)

    def forward(
        self, embeddings: Tensor, boxes: Tensor, tile_index: Tensor, region: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode boxes to mask logits on a region around each.

        Parameters
        ----------
        embeddings : Tensor, shape (b, 256, S/16, S/16), float32
            Encoder output of the tiles.
        boxes : Tensor, shape (n, 4), float32
            Corners ``(x0, y0, x1, y1)`` in tile px.
        tile_index : Tensor, shape (n,), int64
            The tile that each box belongs to.
        region : Tensor, shape (1,), int64
            Side of the region in embedding cells, 1 to S/16.

        Returns
        -------
        logits : Tensor, shape (n, 4 * region, 4 * region), float32
            Mask logits on the region's part of the S/4 grid.
        origin : Tensor, shape (n, 2), int64
            Row and column of the region's first cell in the S/4 grid.
        iou : Tensor, shape (n,), float32
            Predicted IoU.
        """
        decoded = self.decode_prompts(embeddings, self.box_tokens(boxes), tile_index, masks=1)
        kernel = self.mask_decoder.output_hypernetworks_mlps[0](decoded.masks[:, 0])
        side = region[0]
        origin = self.region_origin(boxes, side)
        cells = self.region_tokens(decoded.image, origin, torch.arange(side.item(), device=boxes.device))
        return self.mask_logits(cells, kernel), origin * CELLS_PER_TOKEN, decoded.iou[:, 0]

    def box_tokens(self, boxes: Tensor) -> Tensor:
        """Return the two corner tokens ``(n, 2, C)`` of boxes ``(n, 4)`` in tile px, as SAM's prompt encoder does."""
        corners = self._position_of(boxes.reshape(-1, 2, 2))
        kinds = torch.cat([self.prompt_encoder.point_embeddings[k].weight for k in (2, 3)])
        return corners + kinds

    def point_tokens(self, points: Tensor) -> Tensor:
        """Return tokens ``(n, 2, C)`` of one foreground point ``(n, 2)`` each, in tile px, with SAM's padding point."""
        point = self._position_of(points[:, None]) + self.prompt_encoder.point_embeddings[1].weight
        padding = self.prompt_encoder.not_a_point_embed.weight.expand_as(point)
        return torch.cat([point, padding], dim=1)

    def decode_prompts(
        self, embeddings: Tensor, prompt_tokens: Tensor, tile_index: Tensor, masks: int | None = None
    ) -> DecodedTokens:
        """Run the two-way transformer for prompts ``(n, k, C)`` on the embeddings of their tiles.

        `masks` is the number of mask tokens that are wanted; None takes all four.
        """
        decoder = self.mask_decoder
        count = decoder.num_mask_tokens if masks is None else masks
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(prompt_tokens.shape[0], -1, -1), prompt_tokens], dim=1)
        image = (embeddings.flatten(2).transpose(1, 2) + self.prompt_encoder.no_mask_embed.weight).to(self.compute)

        queries, keys = self._first_layer(tokens, image, tile_index)
        for layer in decoder.transformer.layers[1:]:
            queries, keys = self._later_layer(layer, queries, keys, tokens)
        final = decoder.transformer.final_attn_token_to_image
        queries, tokens = queries[:, : 1 + count], tokens[:, : 1 + count]  # the IoU token comes first
        queries = queries + _few_queries(final, queries + tokens, self._placed(keys), keys)
        queries = decoder.transformer.norm_final_attn(queries)
        return DecodedTokens(queries[:, 1:], decoder.iou_prediction_head(queries[:, 0]), keys)

    def region_origin(self, boxes: Tensor, side: Tensor) -> Tensor:
        """Return the first cell ``(n, 2)``, (y, x), of the region of `side` embedding cells centred on each box."""
        centre_xy = (boxes[:, :2] + boxes[:, 2:]) / (2 * EMBEDDING_STRIDE_PX)
        # Clamped before it is an integer: TensorRT has no clamp for those.
        first = torch.clamp(torch.floor(centre_xy.flip(1) - side / 2 + 0.5), min=0).to(torch.int64)
        return torch.minimum(first, self.grid - side)

    def region_tokens(self, image: Tensor, origin: Tensor, offsets: Tensor) -> Tensor:
        """Pick the image tokens ``(n, r, r, C)`` of each region out of ``(n, P, C)``; `offsets` is ``arange(r)``."""
        rows = origin[:, 0, None] + offsets
        columns = origin[:, 1, None] + offsets
        first = torch.arange(image.shape[0], device=image.device) * self.grid**2
        index = first[:, None, None] + rows[:, :, None] * self.grid + columns[:, None, :]
        return image.reshape(-1, image.shape[2])[index]

    def mask_logits(self, cells: Tensor, kernel: Tensor) -> Tensor:
        """Upscale region tokens ``(n, r, r, C)`` and multiply by each mask's kernel ``(n, C/8)``: ``(n, 4r, 4r)``."""
        fine = self._upscaled(cells)
        logits = (fine @ kernel.to(fine.dtype)[:, :, None]).to(kernel.dtype)
        count, side = cells.shape[0], cells.shape[1]
        logits = logits.reshape(count, side, side, 2, 2, 2, 2)
        return logits.permute(0, 1, 3, 5, 2, 4, 6).reshape(count, side * CELLS_PER_TOKEN, side * CELLS_PER_TOKEN)

    def alternative_logits(self, cells: Tensor, kernels: Tensor) -> Tensor:
        """Do the same for m masks of each region: kernels ``(n, C/8, m)`` give ``(n, m, 4r, 4r)``."""
        fine = self._upscaled(cells)
        logits = (fine @ kernels.to(fine.dtype)).to(kernels.dtype).transpose(1, 2)
        masks, side = kernels.shape[2], cells.shape[1]
        logits = logits.reshape(-1, masks, side, side, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return logits.reshape(-1, masks, side * CELLS_PER_TOKEN, side * CELLS_PER_TOKEN)

    def _upscaled(self, cells: Tensor) -> Tensor:
        """Upscale region tokens ``(n, r, r, C)`` to 4 x 4 cells each: ``(n, r * r * 16, C/8)``.

        Cells are in the order (y, x) of the tokens, then the (y, x) of the first and of the second upscaling.
        """
        first, norm, activation, second, _ = self.mask_decoder.output_upscaling
        hidden = activation(_norm(norm, _subcells(cells, first.weight, first.bias)))
        fine: Tensor = activation(_subcells(hidden, second.weight, second.bias))
        return fine.flatten(1, 4)

    def _placed(self, image: Tensor) -> Tensor:
        """Add the position encoding to image tokens ``(..., P, C)``."""
        return image + self.image_position.to(image.dtype)

    def _position_of(self, points_xy: Tensor) -> Tensor:
        """Encode positions ``(n, k, 2)`` in tile px by SAM's random Fourier features; SAM adds half a pixel."""
        matrix = self.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        unit = (points_xy + 0.5) / (self.grid * EMBEDDING_STRIDE_PX)
        angle = 2 * math.pi * ((2 * unit - 1) @ matrix)
        return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)

    def _first_layer(self, tokens: Tensor, image: Tensor, tile_index: Tensor) -> tuple[Tensor, Tensor]:
        """Run the first block; what depends on the image alone is computed per tile and then picked per box."""
        layer = self.mask_decoder.transformer.layers[0]
        queries = layer.norm1(layer.self_attn(q=tokens, k=tokens, v=tokens))
        attention, back = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        placed = self._placed(image)

        keys = _heads(_project(attention.k_proj, placed), attention.num_heads)[tile_index]
        values = _heads(_project(attention.v_proj, image), attention.num_heads)[tile_index]
        query = _heads(attention.q_proj(queries + tokens), attention.num_heads)
        mixed = _attend(query.to(keys.dtype), keys, values).to(query.dtype)
        queries = layer.norm2(queries + attention.out_proj(mixed.transpose(1, 2).flatten(2)))
        queries = layer.norm3(queries + layer.mlp(queries))

        image_query = _heads(_project(back.q_proj, placed), back.num_heads)[tile_index]
        token_key = _heads(back.k_proj(queries + tokens), back.num_heads) / math.sqrt(image_query.shape[-1])
        scores = image_query @ token_key.to(image_query.dtype).transpose(2, 3)
        weights = scores.softmax(dim=-1).transpose(1, 2).flatten(2)
        update = weights @ _folded_values(back, queries).to(weights.dtype)
        return queries, _norm(layer.norm4, image[tile_index] + update)

    def _later_layer(
        self, layer: TwoWayAttentionBlock, queries: Tensor, keys: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run a block whose image tokens already differ from box to box."""
        placed = queries + tokens
        queries = layer.norm1(queries + layer.self_attn(q=placed, k=placed, v=queries))
        keys_placed = self._placed(keys)
        attended = _few_queries(layer.cross_attn_token_to_image, queries + tokens, keys_placed, keys)
        queries = layer.norm2(queries + attended)
        queries = layer.norm3(queries + layer.mlp(queries))
        update = _few_keys(layer.cross_attn_image_to_token, keys_placed, queries + tokens, queries)
        return queries, _norm(layer.norm4, keys + update)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split ``(n, t, h * d)`` into heads ``(n, h, t, d)``."""
    return torch.unflatten(x, 2, (heads, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention over ``(n, h, t, d)``; written out so that every engine sees plain matrix products."""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    return scores.softmax(dim=-1) @ value


def _per_head(weight: Tensor, heads: int) -> Tensor:
    """View a projection's weight ``(h * d, C)`` as ``(h, d, C)``."""
    return weight.reshape(heads, -1, weight.shape[1])


def _head_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each head of ``(n, h, t, d)`` by its own matrix of ``(h, d, e)``: ``(n, h, t, e)``.

    Equals ``x @ weight``. The prompts become rows of one product per head: onnxruntime cannot broadcast over n = 0.
    """
    rows = x.transpose(0, 1).flatten(1, 2)
    return torch.unflatten(rows @ weight, 1, (-1, x.shape[2])).transpose(0, 1)


def _few_queries(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from few tokens ``(n, t, C)`` to many ``(n, p, C)`` without projecting the many.

    Equals ``attention(q=query, k=key, v=value)`` of segment_anything.
    """
    heads = attention.num_heads
    q = _heads(attention.q_proj(query), heads)
    folded = _head_product(q / math.sqrt(q.shape[-1]), _per_head(attention.k_proj.weight, heads)).flatten(1, 2)
    scores = folded.to(key.dtype) @ key.transpose(1, 2)
    mixed = torch.unflatten((scores.softmax(dim=-1) @ value).to(q.dtype), 1, (heads, -1))
    projected = _head_product(mixed, _per_head(attention.v_proj.weight, heads).transpose(1, 2))
    attended: Tensor = attention.out_proj(projected.transpose(1, 2).flatten(2) + attention.v_proj.bias)
    return attended


def _few_keys(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from many tokens ``(n, p, C)`` to few ``(n, t, C)`` without projecting the many.

    Equals ``attention(q=query, k=key, v=value)`` of segment_anything.
    """
    heads = attention.num_heads
    k = _heads(attention.k_proj(key), heads)
    k = k / math.sqrt(k.shape[-1])
    folded = _head_product(k, _per_head(attention.q_proj.weight, heads)).flatten(1, 2).to(query.dtype)
    bias = _head_product(k, attention.q_proj.bias.reshape(heads, -1, 1)).flatten(1).to(query.dtype)
    scores = query @ folded.transpose(1, 2) + bias[:, None]
    weights = torch.unflatten(scores, 2, (heads, -1)).softmax(dim=-1).flatten(2)
    attended: Tensor = weights @ _folded_values(attention, value).to(weights.dtype)
    return attended


def _folded_values(attention: Attention, value: Tensor) -> Tensor:
    """Project few value tokens ``(n, t, C)`` through the value and the output projection: ``(n, h * t, C)``.

    The bias of the output projection is in them too, a part for each head.
    """
    heads = attention.num_heads
    projected = _heads(attention.v_proj(value), heads)
    out = _per_head(attention.out_proj.weight.transpose(0, 1), heads)
    folded: Tensor = _head_product(projected, out).flatten(1, 2) + attention.out_proj.bias / heads
    return folded


def _project(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer in the type of `x`."""
    return functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _norm(layer: nn.LayerNorm | LayerNorm2d, x: Tensor) -> Tensor:
    """Apply the parameters of a norm to the last axis, in the type of `x`."""
    weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
    normed: Tensor = functional.layer_norm(x, x.shape[-1:], weight, bias, layer.eps)
    return normed


def _subcells(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a transposed convolution of kernel = stride = 2 to channels-last cells ``(..., c)``: ``(..., 4, c')``.

    Parameters
    ----------
    x : Tensor, shape (..., c)
        Cells.
    weight : Tensor, shape (c, c', 2, 2)
        Kernel of the convolution.
    bias : Tensor, shape (c',)
        Its bias.
    """
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    return torch.unflatten(x @ matrix.to(x.dtype), -1, (4, weight.shape[1])) + bias.to(x.dtype)
