"""The tensors that every bundle's graphs take and return: the contract with programs in any language."""

from __future__ import annotations

from dendsam_deploy.bundle.manifest import Role, TensorSpec
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX, LOGIT_STRIDE_PX

MASKS_PER_CLICK = 4
"""Masks that the decoder for points returns for each prompt: the one that answers several clicks, then three of one."""

EMBEDDING_CHANNELS = 256
"""Width of SAM's image embedding, the same in every published model."""


def graph_inputs(role: Role, tile_size_px: int) -> tuple[TensorSpec, ...]:
    """Return the inputs of a graph in their order; `tile_size_px` is the side of the square tiles."""
    tiles = TensorSpec("tiles", "uint8", ("tiles", tile_size_px, tile_size_px))
    if role == "detector":
        return (tiles,)
    if role == "encoder":
        return (tiles, TensorSpec("sizes", "int64", ("tiles", 2)))
    if role == "points":
        return (
            _embeddings(tile_size_px),
            TensorSpec("points", "float32", ("prompts", "points", 2)),
            TensorSpec("labels", "int64", ("prompts", "points")),
            TensorSpec("tile_index", "int64", ("prompts",)),
        )
    return (
        _embeddings(tile_size_px),
        TensorSpec("boxes", "float32", ("boxes", 4)),
        TensorSpec("tile_index", "int64", ("boxes",)),
        TensorSpec("region", "int64", (1,)),
    )


def graph_outputs(role: Role, tile_size_px: int) -> tuple[TensorSpec, ...]:
    """Return the outputs of a graph in their order; `tile_size_px` is the side of the square tiles."""
    if role == "detector":
        return (
            TensorSpec("boxes", "float32", ("tiles", "candidates", 4)),
            TensorSpec("scores", "float32", ("tiles", "candidates")),
        )
    if role == "encoder":
        return (_embeddings(tile_size_px),)
    if role == "points":
        side = tile_size_px // LOGIT_STRIDE_PX
        return (
            TensorSpec("logits", "float32", ("prompts", MASKS_PER_CLICK, side, side)),
            TensorSpec("iou", "float32", ("prompts", MASKS_PER_CLICK)),
        )
    return (
        TensorSpec("logits", "float32", ("boxes", "4*region", "4*region")),
        TensorSpec("origin", "int64", ("boxes", 2)),
        TensorSpec("iou", "float32", ("boxes",)),
    )


def _embeddings(tile_size_px: int) -> TensorSpec:
    """Return what the encoder hands to the decoder."""
    cells = tile_size_px // EMBEDDING_STRIDE_PX
    return TensorSpec("embeddings", "float32", ("tiles", EMBEDDING_CHANNELS, cells, cells))
