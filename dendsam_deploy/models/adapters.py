"""Low-rank adapters (LoRA) in SAM's image encoder, and their merging into the weights that they adapt.

An adapted linear layer computes ``W x + b + B (A x)``, with A of shape (r, inputs) and B of shape (outputs, r); the
scale (alpha) of micro-sam's adapters is 1. That is the layer with the weights ``W + B A``. In an attention layer the
rows of W are those of q, k and v one below the other, each of which may have an adapter of its own; in an MLP each of
the two layers has one.

=========================================================  ==========================================================
in the file                                                is
=========================================================  ==========================================================
``attn.qkv.qkv_proj.{weight,bias}``                        W and b of the attention's one linear layer
``attn.qkv.w_{a,b}_linear_{q,k,v}.weight``                 A and B of the rows of q, k or v
``mlp.mlp_layer.lin{1,2}.{weight,bias}``                   W and b of an MLP
``mlp.w_{a,b}_linear_{1,2}.weight``                        A and B of its first or second layer
=========================================================  ==========================================================

References
----------
Hu et al. 2022, "LoRA", arXiv:2106.09685. micro_sam.models.peft_sam of
github.com/computational-cell-analytics/micro-sam, whose names these are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dendsam_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_ADAPTER = re.compile(r"(?P<layer>.+)\.w_(?P<factor>[ab])_linear_(?P<part>[qkv12])\.weight")
_ADAPTED = {".attn.qkv.qkv_proj.": ".attn.qkv.", ".mlp.mlp_layer.": ".mlp."}
_BLOCK = re.compile(r"\.blocks\.(\d+)\.")
_QKV = "qkv"

# Other ways of fine-tuning few parameters, of the same author; those cannot be told from their tensors alone, or
# cannot be merged.
_OTHER_KINDS = {
    "FacTu": "FacT",
    "q_FacTs": "FacT",
    "mlp_proj": "AdaptFormer",
    "down_proj": "AdaptFormer",
    "scale": "SSF",
    "quant_state": "QLoRA",
    "absmax": "QLoRA",
}


class HasShape(Protocol):
    """Anything with a shape: a tensor, or its place in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """The adapters of a checkpoint.

    Parameters
    ----------
    ranks : tuple of int
        Their ranks; one, where all have the same.
    parts : tuple of str
        What they adapt: of ``q``, ``k``, ``v``, ``mlp 1``, ``mlp 2``.
    blocks : tuple of int
        The blocks of the encoder that have any.
    """

    ranks: tuple[int, ...]
    parts: tuple[str, ...]
    blocks: tuple[int, ...]

    def __str__(self) -> str:
        """Return them as a sentence has them."""
        return f"rank {'/'.join(map(str, self.ranks))} on {', '.join(self.parts)} of {len(self.blocks)} blocks"


def plain_name(key: str) -> str:
    """Return the name that a weight of an adapted layer has in SAM itself."""
    for adapted, plain in _ADAPTED.items():
        key = key.replace(adapted, plain)
    return key


def is_adapter(key: str) -> bool:
    """Tell whether a tensor is one factor of an adapter."""
    return _ADAPTER.fullmatch(key) is not None


def other_adapters(keys: Mapping[str, object]) -> str | None:
    """Return the kind of adapters that cannot be merged, where there are some."""
    parts = {part for key in keys if ".blocks." in key for part in key.split(".")}
    return next((kind for part, kind in _OTHER_KINDS.items() if part in parts), None)


def adapter_facts(tensors: Mapping[str, HasShape]) -> AdapterFacts | None:
    """Describe the adapters among tensors, told from their names and shapes; None where there are none."""
    found = {key: match for key in tensors if (match := _ADAPTER.fullmatch(key))}
    if not found:
        return None
    parts = {match["part"] for match in found.values()}
    blocks = {int(block[1]) for key in found if (block := _BLOCK.search(key))}
    ranks = {tensors[key].shape[0] for key, match in found.items() if match["factor"] == "a" and tensors[key].shape}
    return AdapterFacts(
        ranks=tuple(sorted(ranks)),
        parts=tuple(part if part in _QKV else f"mlp {part}" for part in "qkv12" if part in parts),
        blocks=tuple(sorted(blocks)),
    )


def merge_adapters(state: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Merge every adapter into the weights that it adapts.

    Parameters
    ----------
    state : mapping of str to ndarray
        An adapted encoder's tensors by the names of the table above, whatever leads them; others stay as they are.

    Returns
    -------
    dict of str to ndarray
        The same model without adapters, under SAM's own names. A merged weight is computed in float64 and is at least
        float32.

    Raises
    ------
    CheckpointError
        Where an adapter lacks a factor or its layer, or the shapes do not fit one another.
    """
    merged = {plain_name(key): value for key, value in state.items() if not is_adapter(key)}
    for key in state:
        match = _ADAPTER.fullmatch(key)
        if match is None:
            continue
        layer, part = match["layer"], match["part"]
        down, up = (state.get(f"{layer}.w_{factor}_linear_{part}.weight") for factor in "ab")
        target = f"{layer}.weight" if part in _QKV else f"{layer}.lin{part}.weight"
        if down is None or up is None:
            raise CheckpointError(f"{key} has no counterpart: the adapter is incomplete; save the checkpoint again")
        if target not in merged:
            raise CheckpointError(f"{key} adapts {target}, which is missing; save the checkpoint again")
        if match["factor"] == "a":
            merged[target] = _adapted(merged[target], (down, up), part, key)
    return merged


def _adapted(weight: NDArray[Any], factors: tuple[NDArray[Any], NDArray[Any]], part: str, key: str) -> NDArray[Any]:
    """Return the weights of a layer with one adapter merged."""
    down, up = factors
    rows = slice(None)
    if part in _QKV and weight.ndim == 2:
        height = weight.shape[0] // 3
        rows = slice(_QKV.index(part) * height, (_QKV.index(part) + 1) * height)
    fits = (
        weight.ndim == down.ndim == up.ndim == 2
        and up.shape[1] == down.shape[0]
        and weight[rows].shape == (up.shape[0], down.shape[1])
    )
    if not fits:
        raise CheckpointError(
            f"{key}: factors of shape {down.shape} and {up.shape} do not fit a layer of {weight.shape}; "
            "save the checkpoint again"
        )
    adapted = weight.astype(np.float64)
    adapted[rows] += up.astype(np.float64) @ down.astype(np.float64)
    return adapted.astype(np.result_type(weight.dtype, np.float32))
