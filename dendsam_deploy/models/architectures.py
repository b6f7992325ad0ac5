"""The architectures of SAM by name: their dimensions, known without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ModelType = Literal["vit_b", "vit_l", "vit_h", "vit_t", "tiny"]
MODEL_TYPES: tuple[ModelType, ...] = get_args(ModelType)


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Dimensions of a plain vision transformer; windows and patches in tokens and px."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int
    default_image_size: int


# vit_t is a TinyViT, not a plain vision transformer: see models/tiny_vit.py.
ENCODER_SHAPES: dict[ModelType, EncoderShape] = {
    "vit_b": EncoderShape(768, 12, 12, (2, 5, 8, 11), 14, 1024),
    "vit_l": EncoderShape(1024, 24, 16, (5, 11, 17, 23), 14, 1024),
    "vit_h": EncoderShape(1280, 32, 16, (7, 15, 23, 31), 14, 1024),
    "tiny": EncoderShape(192, 8, 3, (3, 7), 8, 512),
}


def default_image_size(model_type: ModelType) -> int:
    """Return the side, in px, of the input for which a model type was designed."""
    shape = ENCODER_SHAPES.get(model_type)
    return shape.default_image_size if shape else 1024
