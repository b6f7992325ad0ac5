"""SAM's decoder for training with every kind of prompt: points, boxes, and the mask of an earlier answer.

It runs on segment_anything's own prompt encoder and on the two-way transformer and the upscaling of the deployed graph,
which shares their parameters and does the same arithmetic in a cheaper order. So what is trained here is what is
deployed, and also what `SamPredictor` computes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dendsam_deploy.models.box_decoder import BoxDecoderGraph
    from dendsam_deploy.training.prompts import PromptSet

MULTIMASK_TOKENS = (1, 2, 3)
SINGLE_MASK_TOKENS = (0,)


class Answer(NamedTuple):
    """Masks of n prompted objects: logits (n, m, S/4, S/4) and predicted IoU (n, m), both float32."""

    logits: Tensor
    iou: Tensor

    def likeliest(self, masks: Tensor) -> Tensor:
        """Return, without a way back, of `masks` (n, m, h, w) those (n, h, w) that the model itself thinks best of."""
        best = self.iou.detach().argmax(1)
        return masks.detach()[torch.arange(len(best), device=best.device), best]


class PromptedDecoder:
    """Decodes objects of several tiles for any prompts.

    Parameters
    ----------
    graph : BoxDecoderGraph
        Whose parameters are used.
    half : torch.dtype or None
        Type of the large products, by torch's autocast; None computes in float32.
    """

    def __init__(self, graph: BoxDecoderGraph, half: torch.dtype | None = None) -> None:
        self.graph, self.half = graph, half

    def __call__(self, embeddings: Tensor, tile_index: Tensor, prompts: PromptSet, *, multimask: bool) -> Answer:
        """Answer prompts.

        Parameters
        ----------
        embeddings : Tensor, shape (b, 256, S/16, S/16), float32
            Encoder output of the tiles.
        tile_index : Tensor, shape (n,), int64
            The tile that each object lies on.
        prompts : PromptSet
            Of n objects.
        multimask : bool
            Return the three masks of an ambiguous prompt in place of the one of a clear prompt.
        """
        on = embeddings.device.type
        with nullcontext() if self.half is None else torch.autocast(on, self.half):
            return self._decode(embeddings, tile_index, prompts, MULTIMASK_TOKENS if multimask else SINGLE_MASK_TOKENS)

    def _decode(self, embeddings: Tensor, tile_index: Tensor, prompts: PromptSet, tokens: tuple[int, ...]) -> Answer:
        graph, decoder = self.graph, self.graph.mask_decoder
        points = None if prompts.points_xy is None else (prompts.points_xy, prompts.labels)
        sparse, dense = graph.prompt_encoder(points=points, boxes=prompts.boxes_xyxy, masks=prompts.masks)
        if prompts.masks is not None:
            # The graph adds the embedding of "no mask" to its tiles; here each prompt has a tile of its own instead.
            no_mask = graph.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            embeddings = embeddings[tile_index] + (dense - no_mask)
            tile_index = torch.arange(len(tile_index), device=tile_index.device)
        decoded = graph.decode_prompts(embeddings, sparse, tile_index)
        cells = torch.unflatten(decoded.image, 1, (graph.grid, graph.grid))
        kernels = torch.stack([decoder.output_hypernetworks_mlps[k](decoded.masks[:, k]) for k in tokens], 2)
        logits = graph.alternative_logits(cells, kernels)
        return Answer(logits.float(), decoded.iou[:, list(tokens)].float())
