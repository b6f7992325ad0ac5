"""How far a mask depends on the exact box that prompted it: boxes are drawn a little wrong and decoded again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.pipeline.claims import Claim, claim_from_logits, intersection, united
from dendsam_deploy.pipeline.decode import BoxDecoder, Embeddings, boxes_in_tiles, decode_masks, encode_tiles
from dendsam_deploy.pipeline.upsample import upsample_masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.pipeline.prepare import PreparedSlice
    from dendsam_deploy.pipeline.segment import SliceRecipe
    from dendsam_deploy.runtimes.session import Session

_PROMPTS_AT_ONCE = 96
"""Prompts that are decoded and compared together; bounds the memory of a crowded slice."""


@dataclass(frozen=True, slots=True)
class JitterOptions:
    """How wrong boxes are drawn.

    Parameters
    ----------
    repeats : int
        Times that each box is drawn anew.
    fraction : float
        Each edge moves by up to this part of the box's side, either way; 5 to 15 % is the error of a detector.
    seed : int
        Source of the errors, which are those of the slice and do not depend on the order of slices.
    """

    repeats: int = 5
    fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.seed < 0:
            raise InvalidArgumentError(
                f"boxes are drawn anew {self.repeats} times with seed {self.seed}; expected at least once and a seed "
                "of 0 or more"
            )
        if not 0 < self.fraction < 0.5:
            raise InvalidArgumentError(f"the box jitter is {self.fraction}, expected more than 0 and less than 0.5")


def jitter_boxes(boxes_xyxy: NDArray[np.float32], options: JitterOptions, z: int) -> NDArray[np.float32]:
    """Return boxes ``(N, 4)`` drawn wrong in several ways, ``(repeats, N, 4)``, in the same frame."""
    rng = np.random.default_rng([options.seed, z])
    sides = np.tile(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 2)
    shift = rng.uniform(-options.fraction, options.fraction, (options.repeats, *boxes_xyxy.shape)) * sides
    jittered: NDArray[np.float32] = (boxes_xyxy + shift).astype(np.float32)
    return jittered


@dataclass(frozen=True, slots=True)
class Examination:
    """What examines masks, and how.

    Parameters
    ----------
    session : Session
        An open session.
    recipe : SliceRecipe
        How slices are cut and decoded.
    jitter : JitterOptions
        How wrong boxes are drawn.
    """

    session: Session
    recipe: SliceRecipe
    jitter: JitterOptions


@dataclass(frozen=True, slots=True)
class EncodedSlice:
    """A slice and the embeddings that are known of it."""

    prepared: PreparedSlice
    embeddings: Embeddings

    def with_tiles(self, tile_index: NDArray[np.int64], session: Session) -> EncodedSlice:
        """Return it with embeddings of some tiles too; those that are known are not encoded again."""
        known = self.embeddings.tile_index
        if np.isin(tile_index, known).all():
            return self
        wanted = np.union1d(tile_index, known)
        return EncodedSlice(self.prepared, encode_tiles(self.prepared, wanted, session.encoder, session.decoder))


def mask_stability(
    encoded: EncodedSlice,
    boxes_xyxy: NDArray[np.float32],
    examination: Examination,
    z: int,
) -> NDArray[np.float32]:
    """Measure how much the masks of some boxes depend on the boxes.

    Parameters
    ----------
    encoded : EncodedSlice
        The slice.
    boxes_xyxy : ndarray, shape (N, 4), float32
        Boxes inside the slice, slice px.
    examination : Examination
        Of its session only the decoder runs, and the encoder where a tile is not encoded yet.
    z : int
        Number of the slice, which the errors depend on.

    Returns
    -------
    ndarray, shape (N,), float32
        Mean IoU, over the wrong boxes, of their masks with the mask of the box itself; masks are compared before they
        compete for pixels. 0 where the box itself has no mask.
    """
    stability = np.zeros(len(boxes_xyxy), np.float32)
    if not len(boxes_xyxy):
        return stability
    wrong_xyxy = jitter_boxes(boxes_xyxy, examination.jitter, z)
    at_once = max(_PROMPTS_AT_ONCE // (examination.jitter.repeats + 1), 1)
    for start in range(0, len(boxes_xyxy), at_once):
        some = slice(start, start + at_once)
        drawings = np.concatenate([boxes_xyxy[None, some], wrong_xyxy[:, some]])
        first, *others = _decode_drawings(encoded, drawings, examination)
        stability[some] = np.mean(
            [[claim_iou(one, other) for one, other in zip(first, claims, strict=True)] for claims in others], axis=0
        )
    return stability


def claim_iou(one: Claim, other: Claim) -> float:
    """Return the IoU of two masks; 0 where both are empty."""
    window = intersection(one.window, other.window)
    shared = int(np.count_nonzero(np.logical_and(one.part(window), other.part(window))))
    union = one.area_px + other.area_px - shared
    return shared / union if union else 0.0


def _decode_drawings(
    encoded: EncodedSlice, drawings_xyxy: NDArray[np.float32], examination: Examination
) -> list[list[Claim]]:
    """Decode boxes that were drawn in several ways.

    Parameters
    ----------
    encoded : EncodedSlice
        The slice.
    drawings_xyxy : ndarray, shape (D, N, 4), float32
        ``drawings_xyxy[0]`` are the boxes themselves; the tiles that look at them look at all other drawings, too.
    examination : Examination
        What decodes, and how.

    Returns
    -------
    list of list of Claim
        The masks, by drawing and box, slice px.
    """
    session, recipe = examination.session, examination.recipe
    plan, (drawings, boxes, _) = recipe.plan, drawings_xyxy.shape
    box_index, tile_index = plan.views(drawings_xyxy[0])
    encoded = encoded.with_tiles(tile_index, session)
    tiles = np.tile(tile_index, drawings)
    prompts = boxes_in_tiles(drawings_xyxy[:, box_index].reshape(-1, 4), tiles, plan)
    owner = (np.arange(drawings)[:, None] * boxes + box_index).ravel()
    masks = decode_masks(prompts, owner, tiles, encoded.embeddings, BoxDecoder(session.decoder, recipe.decode))
    parts: list[list[Claim]] = [[] for _ in range(drawings * boxes)]
    threshold = recipe.paint.mask_logit
    for index, patch in zip(owner.tolist(), upsample_masks(masks, plan, threshold), strict=True):
        parts[index].append(claim_from_logits(patch, threshold))
    whole = [united(claims) for claims in parts]
    return [whole[row : row + boxes] for row in range(0, len(whole), boxes)]
