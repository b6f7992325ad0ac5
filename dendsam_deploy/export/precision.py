"""The ladder of precisions: what is tried, in which order, where a graph at half precision fails its proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.export.draft import (
    decoder_graph,
    detector_graphs,
    differences,
    encoder_graph,
    failed_engines,
    is_refused,
)
from dendsam_deploy.export.quantise import with_int8
from dendsam_deploy.models.plain_encoder import is_plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from segment_anything.modeling import Sam

    from dendsam_deploy.bundle.manifest import AttentionForm, Precision
    from dendsam_deploy.export.draft import Draft

Tell = Callable[[str], None]
"""Takes a sentence about something that went another way than asked for."""

_DTYPES: Mapping[Precision, torch.dtype] = MappingProxyType(
    # What is quantised is marked in a float32 graph.
    {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
)


@dataclass(frozen=True, slots=True)
class Rung:
    """What the graphs of one precision compute in, and how their encoder computes relative position, if it does."""

    precision: Precision
    attention: AttentionForm | None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the large products."""
        return _DTYPES[self.precision]

    def __str__(self) -> str:
        return f"{self.precision} with relative position {self.attention}"


LADDER = (Rung("fp16", "widened"), Rung("bf16", "widened"), Rung("fp16", "added"), Rung("bf16", "added"))
"""Fused attention first, because that is what half precision is for; fp32, which is always there, ends it."""


def rungs_from(precision: Precision) -> tuple[Rung, ...]:
    """Return what is tried where a half precision is asked for, that precision first."""
    first = next(index for index, rung in enumerate(LADDER) if rung.precision == precision)
    return LADDER[first:]


def check_precisions(sam: Sam, model_type: str, precisions: Sequence[Precision]) -> None:
    """Raise unless weights have graphs at all of some precisions; to be asked before hours are spent on the first.

    Raises
    ------
    InvalidArgumentError
        For MobileSAM, whose encoder has graphs at fp32 only.
    """
    others = [precision for precision in precisions if precision != "fp32"]
    if others and not is_plain(sam):
        raise InvalidArgumentError(
            f"{model_type} has no encoder graph at {others[0]}, only at fp32; leave --precision out"
        )


def with_precision(draft: Draft, precision: Precision, tell: Tell) -> Draft:
    """Add the graphs of a half precision to a bundle, or of the first one down the ladder that passes its proof.

    Parameters
    ----------
    draft : Draft
        The bundle.
    precision : str
        What was asked for.
    tell : callable
        Told what failed and what took its place.

    """
    if precision == "fp32":
        return draft
    if precision == "int8":
        return with_int8(draft, tell)
    for rung in rungs_from(precision):
        if draft.manifest.graph("encoder", rung.precision) is not None:
            tell(f"{precision}: the bundle has {rung.precision} already, which is next")
            return draft
        made = _with_rung(draft, rung, tell)
        if made is not None:
            return made
    tell(f"{precision}: nothing on the ladder passed its proof; the bundle does without")
    return draft


def _with_rung(draft: Draft, rung: Rung, tell: Tell) -> Draft | None:
    """Add the graphs of one rung; None where they fail."""
    folder = draft.writer.folder
    made = (
        encoder_graph(draft.weights, rung, folder),
        decoder_graph(draft.weights, rung, folder),
        *detector_graphs(draft.weights, rung, folder),
    )
    candidate, found = draft.with_graphs(made).judged(rung.precision)
    if is_refused(found):
        tell(f"{rung} {differences(found)}; not published")
        draft.discard(made)
        return None
    for sentence in failed_engines(found):
        tell(sentence)
    if draft.gate is not None and not found.rows:
        tell(
            f"{rung}: no engine of this machine runs it, so it is unproven; run `dendsam-deploy verify` where one does"
        )
    return candidate
