"""What one batch teaches: the two training protocols, each as a sequence of losses to go back from.

Both work on embeddings that were cut off from the encoder. The trainer goes back from each loss as soon as it is there
and through the encoder once at the end, so that the memory of a lesson is that of its largest part, and the gradient
is that of the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional

from dendsam_deploy.geometry import LOGIT_STRIDE_PX
from dendsam_deploy.models.box_decoder import CELLS_PER_TOKEN
from dendsam_deploy.training.losses import DenseHints, MaskLosses, best_alternative, iterative_losses, mask_losses
from dendsam_deploy.training.prompts import PromptSet, corrective_points
from dendsam_deploy.training.samples import boxes_by_region, dense_targets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from dendsam_deploy.models.box_decoder import BoxDecoderGraph, DecodedTokens
    from dendsam_deploy.training.batches import Batch
    from dendsam_deploy.training.prompted_decoder import PromptedDecoder
    from dendsam_deploy.training.samples import Tile


class Part(NamedTuple):
    """A part of a lesson: its `loss`, a scalar, and the mean `iou` of its masks with the weight of this mean."""

    loss: Tensor
    iou: float
    weight: float


class Lesson(Protocol):
    """How a batch is learnt from."""

    def parts(self, embeddings: Tensor, batch: Batch, rng: np.random.Generator) -> Iterator[Part]:
        """Yield the losses of a batch, whose sum is its loss; each may be freed before the next is made.

        Parameters
        ----------
        embeddings : Tensor, shape (b, 256, S/16, S/16), float32
            Encoder output of the batch's tiles.
        batch : Batch
            Tiles, objects and first prompts.
        rng : numpy.random.Generator
            Source of all choices.
        """


@dataclass(frozen=True, slots=True)
class BoxLesson:
    """One prompt for each object, answered through the very graph that is deployed and compared on the box's region.

    Parameters
    ----------
    graph : BoxDecoderGraph
        The decoder.
    hints : DenseHints or None
        Lets the embedding learn about borders and centres too, for encoders that start from little.
    """

    graph: BoxDecoderGraph
    hints: DenseHints | None = None

    def parts(self, embeddings: Tensor, batch: Batch, rng: np.random.Generator) -> Iterator[Part]:
        """Yield one part: Dice loss, twice the cross entropy, error of the predicted IoU, and the hints."""
        losses = self._mask_losses(embeddings, batch)
        loss = (losses.dice + 2 * losses.cross_entropy + losses.iou_error).mean()
        hints = _hint_loss(self.hints, embeddings, batch)
        yield Part(loss if hints is None else loss + hints, float(losses.iou.mean()), 1.0)

    def _mask_losses(self, embeddings: Tensor, batch: Batch) -> MaskLosses:
        """Decode every prompt of a batch and compare with the truth, object by object."""
        embed = self.graph.point_tokens if batch.use_points else self.graph.box_tokens
        tile_index = _tensor(batch.tile_index, embeddings.device)
        prompts = _tensor(batch.prompts, embeddings.device)
        decoded = self.graph.decode_prompts(embeddings, embed(prompts), tile_index)
        groups = boxes_by_region(batch.boxes_xyxy, self.graph.grid)
        parts = [self._region_losses(decoded, batch, side, rows) for side, rows in groups]
        return MaskLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _region_losses(self, decoded: DecodedTokens, batch: Batch, side: int, rows: NDArray[np.intp]) -> MaskLosses:
        """Compare the masks of some prompts with the truth on regions of one size."""
        device = decoded.image.device
        index = torch.from_numpy(rows).to(device)
        boxes = _tensor(batch.boxes_xyxy[rows], device)
        origin = self.graph.region_origin(boxes, torch.tensor(side, device=device))
        cells = self.graph.region_tokens(decoded.image[index], origin, torch.arange(side, device=device))
        covered = batch.coverage(rows, origin.cpu().numpy() * CELLS_PER_TOKEN, side * CELLS_PER_TOKEN)
        truth = _tensor(covered, device)
        # SAM answers a box with its first mask token and a point with the best of the other three.
        tokens = (1, 2, 3) if batch.use_points else (0,)
        perceptrons = self.graph.mask_decoder.output_hypernetworks_mlps
        kernels = torch.stack([perceptrons[token](decoded.masks[index, token]) for token in tokens], 2)
        logits = self.graph.alternative_logits(cells, kernels).unbind(1)
        alternatives = [
            mask_losses(mask, truth, decoded.iou[index, token]) for mask, token in zip(logits, tokens, strict=True)
        ]
        return best_alternative(alternatives)


@dataclass(frozen=True, slots=True)
class IterativeLesson:
    """Interactive training as of DendriteSAM by micro-sam: a first prompt, then points where the mask is wrong.

    Masks are compared with the truth at the resolution of the tile. Only the answer to a first point is the best of
    three masks. Each round adds a positive and a negative point to every object, and each tile's objects get the
    logits of their last answer as mask prompt, or not.

    Parameters
    ----------
    decoder : PromptedDecoder
        The decoder.
    rounds : int
        Answers in all, the one to the first prompt included.
    mask_fraction : float
        How often an answer after the first is given the one before.
    objects_at_once : int
        Objects whose masks are in memory together.
    hints : DenseHints or None
        As of `BoxLesson`.

    References
    ----------
    micro_sam/training/sam_trainer.py at github.com/computational-cell-analytics/micro-sam; Archit et al. 2025,
    doi:10.1038/s41592-024-02580-4.
    """

    decoder: PromptedDecoder
    rounds: int = 8
    mask_fraction: float = 0.5
    objects_at_once: int = 32
    hints: DenseHints | None = None

    def parts(self, embeddings: Tensor, batch: Batch, rng: np.random.Generator) -> Iterator[Part]:
        """Yield Dice loss and error of the predicted IoU of some objects in one round after the other; hints first."""
        hints = _hint_loss(self.hints, embeddings, batch)
        if hints is not None:
            yield Part(hints, 0.0, 0.0)
        device = embeddings.device
        truth = batch.object_masks()
        target, tile_index = _tensor(truth, device).float(), _tensor(batch.tile_index, device)
        sizes = np.array([tile.size_hw for tile in batch.tiles])[batch.tile_index]
        prompts = _first_prompts(batch, device)
        earlier: Tensor | None = None
        for turn in range(self.rounds):
            with_mask = rng.random(len(batch.tiles)) < (self.mask_fraction if turn else 0)
            answers = torch.zeros(len(truth), *([LOGIT_STRIDE_PX * self.decoder.graph.grid] * 2), device=device)
            masks = np.zeros_like(truth)
            for rows, is_masked in self._groups(with_mask[batch.tile_index]):
                index = torch.from_numpy(rows).to(device)
                some = prompts.take(index)
                if is_masked and earlier is not None:
                    some = PromptSet(some.points_xy, some.labels, some.boxes_xyxy, earlier[index][:, None])
                multimask = turn == 0 and batch.use_points
                answer = self.decoder(embeddings, tile_index[index], some, multimask=multimask)
                fine = _upsampled(answer.logits)
                if turn + 1 < self.rounds:  # nothing follows the last answer
                    answers[index] = answer.likeliest(answer.logits)
                    masks[rows] = (answer.likeliest(fine) > 0).cpu().numpy()
                losses = iterative_losses(fine, target[index], answer.iou)
                weight = len(rows) / (len(truth) * self.rounds)
                yield Part((losses.dice + losses.iou_error).mean() * weight, float(losses.iou.mean()), weight)
            earlier = answers
            if turn + 1 < self.rounds:
                more = corrective_points(truth, masks, sizes, rng)
                prompts = prompts.corrected(_tensor(more.points_xy, device), _tensor(more.labels, device))

    def _groups(self, is_masked: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.intp], bool]]:
        """Yield the rows to decode together: with a mask prompt or without, and not too many."""
        for kind in (False, True):
            rows = np.flatnonzero(is_masked == kind)
            if len(rows):
                for part in np.array_split(rows, math.ceil(len(rows) / self.objects_at_once)):
                    yield part, kind


def _hint_loss(hints: DenseHints | None, embeddings: Tensor, batch: Batch) -> Tensor | None:
    """Return the loss of the hints on those tiles of a batch that are labelled densely, where there are any."""
    # A hint speaks of every pixel, so it would call an object without a label background.
    dense = [index for index in range(len(batch.tiles)) if index not in batch.sparse]
    if hints is None or not dense:
        return None
    loss: Tensor = hints(embeddings[dense], *_dense_targets([batch.tiles[i] for i in dense], embeddings.device))
    return 0.5 * loss


def _first_prompts(batch: Batch, device: torch.device) -> PromptSet:
    """Return the prompts that a batch was drawn with: a positive point or a box for each object."""
    prompts = _tensor(batch.prompts, device)
    if not batch.use_points:
        return PromptSet(boxes_xyxy=prompts)
    return PromptSet(prompts[:, None], torch.ones(len(prompts), 1, dtype=torch.int64, device=device))


def _upsampled(logits: Tensor) -> Tensor:
    """Bring logits ``(n, m, S/4, S/4)`` to the resolution of the tile, as SAM does."""
    return functional.interpolate(logits, scale_factor=LOGIT_STRIDE_PX, mode="bilinear", align_corners=False)


def _dense_targets(tiles: Sequence[Tile], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return borders, offsets and where these hold, for all tiles."""
    border, offset, inside = zip(*(dense_targets(tile, LOGIT_STRIDE_PX) for tile in tiles), strict=True)
    return _tensor(np.stack(border), device), _tensor(np.stack(offset), device), _tensor(np.stack(inside), device)


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
