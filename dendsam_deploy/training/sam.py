"""Fine-tuning of SAM on labelled slices with the boxes that a detector draws, through the very graph that is deployed.

One step: cut tiles, encode them, draw a few objects of each, prompt the decoder with their boxes (or, in some steps,
one point each) and compare its logits with the truth on each box's region. Sections are split into contiguous blocks;
the checkpoint that segments the held-out block best is kept.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.geometry import LOGIT_STRIDE_PX
from dendsam_deploy.models.box_decoder import CELLS_PER_TOKEN, BoxDecoderGraph, DecodedTokens
from dendsam_deploy.models.image_encoder import ImageEncoderGraph
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.training import judge
from dendsam_deploy.training.averages import MovingAverage
from dendsam_deploy.training.batches import Batch, draw_batch
from dendsam_deploy.training.device import check_device, tiles_that_fit
from dendsam_deploy.training.losses import DenseHints, MaskLosses, best_alternative, mask_losses
from dendsam_deploy.training.samples import Tile, boxes_by_region, dense_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from segment_anything.modeling import Sam

    from dendsam_deploy.training.sam_options import SamTrainingOptions
    from dendsam_deploy.training.source import TrainingSource


@dataclass(frozen=True, slots=True)
class TrainedSam:
    """The best state of a training run and how it came about."""

    state: dict[str, Tensor]
    held_out_iou: float
    first_held_out_iou: float
    steps: int
    seconds: float
    history: tuple[judge.Judgement, ...]


class TrainingState(NamedTuple):
    """Everything that an interrupted run needs to go on exactly where it was; plain values and tensors only.

    The tensors are those of the run itself: who keeps a state beyond the callback copies it.
    """

    step: int
    elapsed_s: float
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    hints: dict[str, Tensor]
    optimiser: dict[str, object]
    best: dict[str, Tensor]
    history: list[tuple[int, float, float]]


CheckpointCallback = Callable[[TrainingState], None]


class SamTrainer:
    """The training loop over any number of labelled volumes.

    Parameters
    ----------
    sam : Sam
        Model to train, changed in place.
    sources : sequence of TrainingSource
        Volumes, drawn from in proportion to their weights.
    options : SamTrainingOptions
        Schedule and batch.
    with_hints : bool
        Train the encoder on borders and object centres too; for encoders that start from little.

    Raises
    ------
    InvalidArgumentError, MissingCapabilityError
        If the device is none, or not on this machine.
    VolumeError
        If the held-out slices show nothing to judge by.
    """

    def __init__(
        self, sam: Sam, sources: Sequence[TrainingSource], options: SamTrainingOptions, *, with_hints: bool
    ) -> None:
        check_device(options.device)
        self.options, self.sources = options, tuple(sources)
        self.device = torch.device(options.device)
        self.sam = sam.to(self.device)
        self.encoder, self.decoder = ImageEncoderGraph(self.sam), BoxDecoderGraph(self.sam).to(self.device)
        self.hints = DenseHints(256).to(self.device) if with_hints else None
        rate = options.learning_rate or (4e-4 if with_hints else 1e-5)
        parameters = [*self.sam.parameters(), *(self.hints.parameters() if self.hints else ())]
        self.optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
        self.peak_rate = rate
        self.average = MovingAverage(self.sam)
        self._judged_tiles = [
            tile
            for source in self.sources
            if source.held_out is not None
            for tile in judge.judged_tiles(source.held_out, source.recipe, options.judge_slices)
        ]
        if not self._judged_tiles:
            raise VolumeError("the held-out slices show no object to judge by; hold out others")
        if options.tiles_per_step is None:
            self.options = dataclasses.replace(options, tiles_per_step=self._fitting_tiles())

    def run(
        self,
        progress: ProgressCallback = no_progress,
        resume: TrainingState | None = None,
        checkpoint: CheckpointCallback | None = None,
    ) -> TrainedSam:
        """Train to the end of the schedule and return the weights that did best on the held-out slices.

        Parameters
        ----------
        progress : callable
            Told about every step.
        resume : TrainingState, optional
            Where an interrupted run stopped.
        checkpoint : callable, optional
            Given the `TrainingState` after every judgement.
        """
        history = [judge.Judgement(*row) for row in resume.history] if resume else []
        step, elapsed_before = (resume.step, resume.elapsed_s) if resume else (0, 0.0)
        if resume:
            self._restore(resume)
        best = dict(resume.best) if resume else self._averaged_state()
        if not history:
            history.append(judge.Judgement(0, 0.0, self.held_out_iou()))
        started = last_judged = time.monotonic()
        loss_mean, iou_mean = math.nan, math.nan
        while (done := self._fraction_done(step, elapsed_before + time.monotonic() - started)) < 1:
            loss, iou = self._step(step, done)
            step += 1
            loss_mean = loss if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * loss
            iou_mean = iou if math.isnan(iou_mean) else 0.98 * iou_mean + 0.02 * iou
            elapsed = elapsed_before + time.monotonic() - started
            done = self._fraction_done(step, elapsed)
            left = elapsed / 60 * (1 - min(done, 1)) / done
            held_out = max(entry.held_out_iou for entry in history)
            note = (
                f"step {step}, loss {loss_mean:.3f}, IoU {iou_mean:.3f}, held-out {held_out:.3f}, {left:.1f} min left"
            )
            progress(Progress("train", min(done, 1), 1.0, note))
            if self._judgement_is_due(step, time.monotonic() - last_judged):
                best = self._judged(step, elapsed, history, best)
                if checkpoint is not None:
                    checkpoint(self._snapshot(step, elapsed, history, best))
                last_judged = time.monotonic()
        elapsed = elapsed_before + time.monotonic() - started
        if history[-1].step < step:
            best = self._judged(step, elapsed, history, best)
        winner = max(history, key=lambda entry: entry.held_out_iou)
        return TrainedSam(best, winner.held_out_iou, history[0].held_out_iou, step, elapsed, tuple(history))

    def held_out_iou(self) -> float:
        """Return the mean IoU, with exact boxes, of the averaged weights over the judged objects of all sources."""
        with self.average.swapped_in(self.sam):
            return float(judge.box_prompt_iou(self.encoder, self.decoder, self._judged_tiles).mean())

    def _judged(
        self, step: int, elapsed: float, history: list[judge.Judgement], best: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Judge the averaged weights, note it, and return the best weights so far."""
        iou = self.held_out_iou()
        improved = iou >= max(entry.held_out_iou for entry in history)
        history.append(judge.Judgement(step, elapsed, iou))
        return self._averaged_state() if improved else best

    def _averaged_state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.average.state(self.sam).items()}

    def _fraction_done(self, step: int, elapsed_s: float) -> float:
        by_step = step / self.options.steps if self.options.steps else 0.0
        by_time = elapsed_s / (60 * self.options.minutes) if self.options.minutes else 0.0
        return max(by_step, by_time)

    def _judgement_is_due(self, step: int, since_s: float) -> bool:
        options = self.options
        if options.minutes is None and options.steps is not None:
            return step % (options.judge_steps or math.ceil(options.steps / 10)) == 0
        return since_s > 60 * options.judge_minutes

    def _step(self, step: int, done: float) -> tuple[float, float]:
        """Take one optimiser step; return its loss and the mean IoU of its masks."""
        warm = min(1.0, (step + 1) / 100)
        for group in self.optimiser.param_groups:
            group["lr"] = self.peak_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        batch = draw_batch(self.sources, self.options, np.random.default_rng([self.options.seed, step]))
        loss, iou = self._loss(batch)
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.sam.parameters(), 1.0)
        self.optimiser.step()
        self.average.update(self.sam)
        return float(loss.detach()), float(iou)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and the mean IoU of its masks."""
        images = self._tensor(np.stack([tile.image for tile in batch.tiles]))
        sizes = torch.tensor([tile.size_hw for tile in batch.tiles], device=self.device)
        self.sam.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            embeddings = self.encoder(images, sizes)
        embeddings = embeddings.float()
        losses = self._mask_losses(embeddings, batch)
        loss = (losses.dice + 2 * losses.cross_entropy + losses.iou_error).mean()
        if self.hints is not None:
            loss = loss + 0.5 * self.hints(embeddings, *self._dense_targets(batch.tiles))
        return loss, losses.iou.mean()

    def _fitting_tiles(self) -> int:
        """Return how many tiles to encode in a step; on a GPU one is tried out."""
        if self.device.type == "cpu":
            return 1
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        one = dataclasses.replace(self.options, tiles_per_step=1)
        torch.autograd.backward(self._loss(draw_batch(self.sources, one, np.random.default_rng(one.seed)))[0])
        peak = torch.cuda.max_memory_allocated(self.device) - before
        self.optimiser.zero_grad(set_to_none=True)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.sam.parameters())
        # Gradients and two moments of AdamW, each as large as the weights.
        return tiles_that_fit(free_bytes, 3 * weights, peak)

    def _dense_targets(self, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor, Tensor]:
        """Return borders, offsets and where these hold, for all tiles."""
        border, offset, inside = zip(*(dense_targets(tile, LOGIT_STRIDE_PX) for tile in tiles), strict=True)
        return self._tensor(np.stack(border)), self._tensor(np.stack(offset)), self._tensor(np.stack(inside))

    def _mask_losses(self, embeddings: Tensor, batch: Batch) -> MaskLosses:
        """Decode every prompt of a batch and compare with the truth, object by object."""
        embed = self.decoder.point_tokens if batch.use_points else self.decoder.box_tokens
        tile_index = torch.from_numpy(batch.tile_index).to(self.device)
        decoded = self.decoder.decode_prompts(embeddings, embed(self._tensor(batch.prompts)), tile_index)
        groups = boxes_by_region(batch.boxes_xyxy, self.decoder.grid)
        parts = [self._region_losses(decoded, batch, side, rows) for side, rows in groups]
        return MaskLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _region_losses(self, decoded: DecodedTokens, batch: Batch, side: int, rows: NDArray[np.intp]) -> MaskLosses:
        """Compare the masks of some prompts with the truth on regions of one size."""
        index = torch.from_numpy(rows).to(self.device)
        boxes = self._tensor(batch.boxes_xyxy[rows])
        origin = self.decoder.region_origin(boxes, torch.tensor(side, device=self.device))
        cells = self.decoder.region_tokens(decoded.image[index], origin, torch.arange(side, device=self.device))
        truth = self._tensor(batch.coverage(rows, origin.cpu().numpy() * CELLS_PER_TOKEN, side * CELLS_PER_TOKEN))
        # SAM answers a box with its first mask token and a point with the best of the other three.
        alternatives = []
        for token in (1, 2, 3) if batch.use_points else (0,):
            kernel = self.sam.mask_decoder.output_hypernetworks_mlps[token](decoded.masks[index, token])
            logits = self.decoder.mask_logits(cells, kernel)
            alternatives.append(mask_losses(logits, truth, decoded.iou[index, token]))
        return best_alternative(alternatives)

    def _snapshot(
        self, step: int, elapsed_s: float, history: list[judge.Judgement], best: dict[str, Tensor]
    ) -> TrainingState:
        return TrainingState(
            step,
            elapsed_s,
            self.sam.state_dict(),
            self.average.values,
            self.hints.state_dict() if self.hints else {},
            self.optimiser.state_dict(),
            best,
            [dataclasses.astuple(entry) for entry in history],
        )

    def _restore(self, state: TrainingState) -> None:
        self.sam.load_state_dict(state.model)
        # The graph holds what it has computed from the model's position encoding.
        self.decoder = BoxDecoderGraph(self.sam).to(self.device)
        self.average.values = {name: value.to(self.device) for name, value in state.average.items()}
        self.average.updates = state.step
        if self.hints is not None:
            self.hints.load_state_dict(state.hints)
        self.optimiser.load_state_dict(state.optimiser)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
