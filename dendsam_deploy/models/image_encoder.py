"""SAM's image encoder as a deployable graph: uint8 tiles in, embeddings out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


class ImageEncoderGraph(nn.Module):
    """Normalisation, padding and image encoder of a SAM for grey tiles.

    Parameters
    ----------
    sam : Sam
        Its image encoder is shared, not copied.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.register_buffer("mean", sam.pixel_mean.reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", sam.pixel_std.reshape(1, 3, 1, 1), persistent=False)

    def forward(self, tiles: Tensor, sizes: Tensor) -> Tensor:
        """Encode tiles.

        Parameters
        ----------
        tiles : Tensor, shape (b, S, S), uint8
            Grey values; what lies outside `sizes` is ignored.
        sizes : Tensor, shape (b, 2), int64
            Valid height and width of each tile, anchored at its top left corner. SAM pads with zeros *after*
            normalisation, so the padding has to be known here.

        Returns
        -------
        Tensor, shape (b, 256, S/16, S/16), float32
        """
        # Three equal channels, as SAM treats a grey image. Converted first: TensorRT does nothing else with uint8.
        image = (tiles.to(torch.float32)[:, None] - self.mean) / self.std
        position = torch.arange(tiles.shape[-1], device=tiles.device)
        inside_y = position < sizes[:, :1]
        inside_x = position < sizes[:, 1:]
        inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
        embeddings: Tensor = self.image_encoder(torch.where(inside, image, 0.0))
        return embeddings
