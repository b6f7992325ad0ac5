"""SAM's decoder for clicks as a deployable graph: several points of an object, in it or beside it, give four masks.

The graph equals ``SamPredictor.predict_torch(point_coords, point_labels, multimask_output=...)`` to rounding, for the
same points and labels: its first mask without multimask output, the others with it. It shares the two-way transformer
of `box_decoder`; what differs from a box is that

- points that belong to the object, points that do not, and padding have embeddings of their own, and padding has no
  position;
- without a box segment_anything appends one point of padding to every prompt. The graph does so, too: nothing has to be
  appended by the caller. Further padding takes part in attention, there as here, so prompts with different numbers of
  points equal single predictions only where each number has a call of its own;
- all mask tokens are read. Token 0 answers what several points, which are clear together, ask for. Tokens 1 to 3 answer
  a single point, of which nobody knows whether it means the whole, a part or a smaller part: whoever wants one mask
  takes that of the highest predicted IoU;
- where the object ends is not known beforehand, so that masks cover the whole grid.

References
----------
segment_anything/modeling/{mask_decoder,prompt_encoder}.py and segment_anything/predictor.py at
github.com/facebookresearch/segment-anything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX
from dendsam_deploy.models.box_decoder import BoxDecoderGraph

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

MASKS_PER_PROMPT = 4
"""Masks that a prompt gives: SAM's single mask, then its multimask output."""

_BESIDE, _INSIDE = 0, 1
"""Labels of points, and their places in the prompt encoder's list of embeddings; -1 is padding."""


class PointDecoderGraph(nn.Module):
    """The decoder of a SAM for point prompts, in float32.

    Parameters
    ----------
    sam : Sam
        Its prompt encoder and mask decoder are shared, not copied.
    """

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.decoder = BoxDecoderGraph(sam)

    def forward(self, embeddings: Tensor, points: Tensor, labels: Tensor, tile_index: Tensor) -> tuple[Tensor, Tensor]:
        """Decode points to mask logits.

        Parameters
        ----------
        embeddings : Tensor, shape (b, 256, S/16, S/16), float32
            Encoder output of the tiles.
        points : Tensor, shape (n, p, 2), float32
            Points ``(x, y)`` in tile px, whole numbers at the centres of pixels as in segment_anything.
        labels : Tensor, shape (n, p), int64
            1 for a point of the object, 0 for one beside it, -1 for padding.
        tile_index : Tensor, shape (n,), int64
            The tile that each prompt belongs to.

        Returns
        -------
        logits : Tensor, shape (n, 4, S/4, S/4), float32
            Logits of the masks.
        iou : Tensor, shape (n, 4), float32
            Their predicted IoU.
        """
        decoded = self.decoder.decode_prompts(embeddings, self._tokens(points, labels), tile_index)
        perceptrons = self.decoder.mask_decoder.output_hypernetworks_mlps
        kernels = torch.stack([perceptrons[token](decoded.masks[:, token]) for token in range(MASKS_PER_PROMPT)], dim=2)
        cells = torch.unflatten(decoded.image, 1, (self.decoder.grid, self.decoder.grid))
        return self.decoder.alternative_logits(cells, kernels), decoded.iou

    def _tokens(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return the tokens ``(n, p + 1, C)`` of points, the padding that segment_anything appends included."""
        encoder = self.decoder.prompt_encoder
        padding = encoder.not_a_point_embed.weight
        unit = (points + 0.5) / (self.decoder.grid * EMBEDDING_STRIDE_PX)
        angle = 2 * math.pi * ((2 * unit - 1) @ encoder.pe_layer.positional_encoding_gaussian_matrix)
        position = torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
        kind = labels[:, :, None]
        inside, beside = (position + encoder.point_embeddings[place].weight for place in (_INSIDE, _BESIDE))
        tokens = torch.where(kind == _INSIDE, inside, torch.where(kind == _BESIDE, beside, padding))
        return torch.cat([tokens, padding.expand(points.shape[0], 1, -1)], dim=1)
