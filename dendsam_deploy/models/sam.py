"""Segment Anything models of every supported size, built from the modules of the segment_anything package.

``tiny`` is a small vision transformer of the same shape as SAM's own, fit for training on a workstation without a GPU;
everything behind its encoder is SAM unchanged, so one decoder graph serves all types.

References
----------
Kirillov et al. 2023, "Segment Anything", arXiv:2304.02643; github.com/facebookresearch/segment-anything.
"""

from __future__ import annotations

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX
from dendsam_deploy.models.architectures import (
    ENCODER_SHAPES,
    MODEL_TYPES,
    EncoderShape,
    ModelType,
    default_image_size,
)
from dendsam_deploy.models.tiny_vit import TinyViTEncoder

SMALLEST_IMAGE_PX = 64
LARGEST_IMAGE_PX = 4096
"""Attention over the whole image needs memory with the fourth power of its side; 4096 px is beyond today's GPUs."""

EMBEDDING_CHANNELS = 256
PIXEL_MEAN_RGB = (123.675, 116.28, 103.53)
PIXEL_STD_RGB = (58.395, 57.12, 57.375)


def build_sam(model_type: ModelType, image_size: int | None = None) -> Sam:
    """Build a SAM with random weights, in evaluation mode.

    Parameters
    ----------
    model_type : str
        One of `MODEL_TYPES`.
    image_size : int, optional
        Side of the square input in px, a multiple of 16. By default the one that the type was designed for.

    Returns
    -------
    segment_anything.modeling.Sam

    Raises
    ------
    InvalidArgumentError
        If the type is unknown or the size is impossible.
    """
    if model_type not in MODEL_TYPES:
        raise InvalidArgumentError(f"unknown model type {model_type!r}; choose one of {', '.join(MODEL_TYPES)}")
    size = default_image_size(model_type) if image_size is None else image_size
    if not SMALLEST_IMAGE_PX <= size <= LARGEST_IMAGE_PX or size % EMBEDDING_STRIDE_PX:
        raise InvalidArgumentError(
            f"an image size of {size} px is not possible; choose a multiple of {EMBEDDING_STRIDE_PX} "
            f"from {SMALLEST_IMAGE_PX} to {LARGEST_IMAGE_PX}"
        )
    encoder = TinyViTEncoder(size) if model_type == "vit_t" else _plain_encoder(ENCODER_SHAPES[model_type], size)
    grid = size // EMBEDDING_STRIDE_PX
    sam = Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=EMBEDDING_CHANNELS,
            image_embedding_size=(grid, grid),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBEDDING_CHANNELS, mlp_dim=2048, num_heads=8),
            transformer_dim=EMBEDDING_CHANNELS,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=list(PIXEL_MEAN_RGB),
        pixel_std=list(PIXEL_STD_RGB),
    )
    return sam.eval()


def _plain_encoder(shape: EncoderShape, image_size: int) -> ImageEncoderViT:
    """Build segment_anything's own image encoder."""
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        out_chans=EMBEDDING_CHANNELS,
        use_rel_pos=True,
        window_size=shape.window,
        global_attn_indexes=shape.global_blocks,
    )


@torch.no_grad()
def initialise(sam: Sam, generator: torch.Generator) -> None:
    """Give a model fit starting weights for training from nothing.

    segment_anything leaves the position embedding at zero and linear layers at torch's default, which is meant for
    shallow networks. Here linear layers of the encoder and the position embedding get the truncated normal distribution
    of standard deviation 0.02 that vision transformers are trained from.

    References
    ----------
    Dosovitskiy et al. 2021, arXiv:2010.11929, and the initialisation of timm and detectron2's ViTDet.
    """
    for module in sam.image_encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    position = getattr(sam.image_encoder, "pos_embed", None)
    if position is not None:
        nn.init.trunc_normal_(position, std=0.02, generator=generator)
