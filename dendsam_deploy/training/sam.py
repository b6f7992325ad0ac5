"""Fine-tuning of SAM on labelled slices: the loop around a protocol.

One step: cut tiles, encode them, prompt some objects of each and learn from the answers as the protocol says
(`lessons`). Sections are split into contiguous blocks; the checkpoint that segments the held-out block best, prompted
by exact boxes, is kept.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.models.box_decoder import BoxDecoderGraph
from dendsam_deploy.models.image_encoder import ImageEncoderGraph
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.training import judge
from dendsam_deploy.training.adapters import choose_parts, load_merged, merged_state, set_training_mode
from dendsam_deploy.training.averages import MovingAverage
from dendsam_deploy.training.batches import Batch, BatchRecipe, draw_batch
from dendsam_deploy.training.checkpointing import recompute_blocks
from dendsam_deploy.training.course import CheckpointCallback, Course, TrainedSam, TrainingState
from dendsam_deploy.training.device import check_device
from dendsam_deploy.training.launcher import Alone, Team
from dendsam_deploy.training.lessons import BoxLesson, IterativeLesson, Lesson
from dendsam_deploy.training.losses import DenseHints
from dendsam_deploy.training.plan import HALF_TYPES, TrainingPlan, plan_training
from dendsam_deploy.training.prompted_decoder import PromptedDecoder
from dendsam_deploy.training.randomness import random_states, restore_random_states
from dendsam_deploy.training.rates import make_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from segment_anything.modeling import Sam

    from dendsam_deploy.training.sam_options import SamTrainingOptions
    from dendsam_deploy.training.source import TrainingSource

KEEP_AFTER_S = 60.0
"""Time after which the state of a run is kept between judgements, too."""


class SamTrainer:
    """The training loop over any number of labelled volumes.

    Parameters
    ----------
    sam : Sam
        Model to train, changed in place.
    sources : sequence of TrainingSource
        Volumes, drawn from in proportion to their weights. Those without held-out slices only teach.
    options : SamTrainingOptions
        Schedule, protocol and batch.
    with_hints : bool
        For encoders that start from little: a higher learning rate, and borders and object centres as further targets
        of the encoder.
    team : Team
        The processes that train together.

    Raises
    ------
    InvalidArgumentError, MissingCapabilityError
        If the device is none, or not on this machine.
    VolumeError
        If the held-out slices show nothing to judge by.
    """

    def __init__(
        self,
        sam: Sam,
        sources: Sequence[TrainingSource],
        options: SamTrainingOptions,
        *,
        with_hints: bool,
        team: Team | None = None,
    ) -> None:
        check_device(options.device)
        self.options, self.sources, self.team = options, tuple(sources), team or Alone()
        self.device = torch.device(options.device)
        self.sam = sam
        choose_parts(sam, options.train, options.lora_rank, torch.Generator().manual_seed(options.seed))
        set_training_mode(sam, options.train)
        self.judged_tiles = self._judged_tiles()
        self.plan: TrainingPlan = self.team.agree(plan_training(sam, options, is_young=with_hints))
        if self.plan.checkpointing:
            recompute_blocks(sam)
        sam.to(self.device)
        self.encoder, self.decoder = ImageEncoderGraph(sam), BoxDecoderGraph(sam).to(self.device)
        self.hints = DenseHints(256).to(self.device) if with_hints else None
        trained = [*sam.parameters(), *(self.hints.parameters() if self.hints else ())]
        self._trained = [parameter for parameter in trained if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self._trained,
            lr=self.plan.learning_rate,
            weight_decay=self.plan.weight_decay,
            betas=(0.9, self.plan.second_moment),
        )
        self.rate = make_rate(self.plan.rate, self.optimiser, self.plan.learning_rate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.plan.precision == "fp16")
        self.average = MovingAverage(sam, self.plan.average_decay)
        self.lesson = self._lesson()

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
        course = self._course(resume)
        started, earlier = time.monotonic(), course.elapsed_s
        last_judged = last_kept = started
        keep_after_s, is_stuck = KEEP_AFTER_S, False
        while (done := self.team.agree(self._fraction_done(course))) < 1:
            is_stuck = course.is_stuck(self.options.patience)
            if is_stuck:
                break
            course.take(self.take_step(course.step, done), earlier + time.monotonic() - started)
            progress(self._progress(course))
            if self.team.agree(self._judgement_is_due(course.step, time.monotonic() - last_judged)):
                self._judge(course)
                last_judged, last_kept = time.monotonic(), -math.inf
            course.elapsed_s = earlier + time.monotonic() - started
            begun = time.monotonic()
            if checkpoint is not None and begun - last_kept > keep_after_s:
                checkpoint(self._snapshot(course))
                last_kept = time.monotonic()
                keep_after_s = max(KEEP_AFTER_S, 20 * (last_kept - begun))  # large models take a while to write
        if course.history[-1].step < course.step:
            self._judge(course)
        winner = max(reversed(course.history), key=lambda entry: entry.held_out_iou)  # of equally good ones the last
        return TrainedSam(
            state=course.best,
            held_out_iou=winner.held_out_iou,
            first_held_out_iou=course.history[0].held_out_iou,
            best_step=winner.step,
            steps=course.step,
            seconds=course.elapsed_s,
            stopped_early=is_stuck,
            history=tuple(course.history),
            first_scores=course.first_scores,
        )

    def held_out_iou(self) -> float:
        """Return the mean IoU, with exact boxes, of the averaged weights over the judged objects of all sources."""
        if self.team.rank:
            return self.team.agree(0.0)
        with self.average.swapped_in(self.sam):
            scores = judge.box_prompt_iou(self.encoder, self.decoder, (tile for _, tile in self.judged_tiles))
        return self.team.agree(float(scores.mean()))

    def scores(self) -> dict[judge.PromptKind, NDArray[np.float64]]:
        """Return the IoU of every judged object by the kind of its prompt, of the averaged weights."""
        if self.team.rank:
            return self.team.agree({})
        with self.average.swapped_in(self.sam):
            tiles = (tile for _, tile in self.judged_tiles)
            return self.team.agree(judge.prompted_iou(self.encoder, self.decoder, tiles))

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Let the model have the weights of a plain SAM, which was trained from it; training is over then."""
        load_merged(self.sam, state)
        self.decoder = BoxDecoderGraph(self.sam).to(self.device)
        self.average = MovingAverage(self.sam, 0.0)

    def averaged_state(self) -> dict[str, Tensor]:
        """Return the averaged weights as the state dict of a plain SAM, on the CPU."""
        state = merged_state(self.average.state(self.sam))
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def _judged_tiles(self) -> list[tuple[str, judge.JudgedTile]]:
        """Return what judges, with the name of the volume that it is from."""
        options = self.options
        tiles = [
            (source.name, tile)
            for source in self.sources
            if source.held_out is not None
            for tile in judge.judged_tiles(source.held_out, source.recipe, options.judge_slices, options.min_object_px)
        ]
        if not tiles:
            raise VolumeError("the held-out slices show no object to judge by; hold out others")
        return tiles

    def _lesson(self) -> Lesson:
        if self.plan.protocol == "boxes":
            return BoxLesson(self.decoder, self.hints)
        decoder = PromptedDecoder(self.decoder, HALF_TYPES[self.plan.precision])
        options, at_once = self.options, self.plan.objects_at_once
        return IterativeLesson(decoder, options.rounds, options.mask_fraction, at_once, self.hints)

    def _course(self, resume: TrainingState | None) -> Course:
        """Begin, or go on where a run stopped."""
        if resume is None:
            scores: dict[str, float] = {kind: float(found.mean()) for kind, found in self.scores().items()}
            first = judge.Judgement(0, 0.0, scores["box"])
            return Course(0, 0.0, (math.nan, math.nan), [first], self.averaged_state(), scores)
        self._restore(resume)
        history = [judge.Judgement(*row) for row in resume.history]
        best = dict(resume.best)
        return Course(resume.step, resume.elapsed_s, resume.means, history, best, resume.first_scores)

    def _judge(self, course: Course) -> None:
        """Judge the averaged weights and note it; keep them if they are as good as the best."""
        iou = self.held_out_iou()
        if iou >= max(entry.held_out_iou for entry in course.history):
            state = self.averaged_state()
            if all(bool(value.isfinite().all()) for value in state.values()):
                course.best = state
        rate = float(self.optimiser.param_groups[0]["lr"])
        course.history.append(judge.Judgement(course.step, course.elapsed_s, iou, *course.means, rate))
        self.rate.judged(iou)

    def _fraction_done(self, course: Course) -> float:
        by_step = course.step / self.options.steps if self.options.steps else 0.0
        by_time = course.elapsed_s / (60 * self.options.minutes) if self.options.minutes else 0.0
        return max(by_step, by_time)

    def _judgement_is_due(self, step: int, since_s: float) -> bool:
        options = self.options
        if options.minutes is None and options.steps is not None:
            return step % (options.judge_steps or math.ceil(options.steps / 10)) == 0
        return since_s > 60 * options.judge_minutes

    def _progress(self, course: Course) -> Progress:
        done = min(self._fraction_done(course), 1.0)
        left = course.elapsed_s / 60 * (1 - done) / done
        held_out = max(entry.held_out_iou for entry in course.history)
        (loss, iou), step = course.means, course.step
        text = f"step {step}, loss {loss:.3f}, IoU {iou:.3f}, held-out {held_out:.3f}, {left:.1f} min left"
        return Progress("train", done, 1.0, text)

    def take_step(self, step: int, done: float) -> tuple[float, float]:
        """Take one optimiser step; return its loss and the mean IoU of its masks."""
        self.rate.before_step(step, done)
        set_training_mode(self.sam, self.options.train)
        self.optimiser.zero_grad(set_to_none=True)
        learnt = []
        for turn in range(self.plan.accumulate):
            part = turn * self.team.size + self.team.rank
            rng = np.random.default_rng([self.options.seed, step, part])
            use_points = self._uses_points(step + part, rng)
            learnt.append(self._learn(draw_batch(self.sources, self._recipe(), rng, use_points=use_points), rng))
        self.team.average_gradients(self._trained)
        self.scaler.unscale_(self.optimiser)
        if math.isfinite(self.plan.clip_norm):
            torch.nn.utils.clip_grad_norm_(self._trained, self.plan.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.average.update(self.sam)
        losses, ious = zip(*learnt, strict=True)
        loss, iou = self.team.mean((sum(losses) / len(losses), sum(ious) / len(ious)))
        # With fp16 a single overflow is part of the game, and its step is left out by the scaler.
        if not math.isfinite(loss) and not self.scaler.is_enabled():
            raise InvalidArgumentError(
                f"the training diverged: the loss of step {step + 1} is {loss}; lower the learning rate "
                f"({self.plan.learning_rate:g}), and begin anew with --no-resume"
            )
        return loss, iou

    def _learn(self, batch: Batch, rng: np.random.Generator) -> tuple[float, float]:
        """Add the gradient of a batch, a share of the step's; return the loss and the mean IoU."""
        images = self._tensor(np.stack([tile.image for tile in batch.tiles]))
        sizes = torch.tensor([tile.size_hw for tile in batch.tiles], device=self.device)
        half = HALF_TYPES[self.plan.precision]
        with torch.autocast(self.device.type, half or torch.bfloat16, enabled=half is not None):
            embeddings = self.encoder(images, sizes)
        embeddings = embeddings.float()
        cut = embeddings.detach().requires_grad_(embeddings.requires_grad)
        loss, iou, weight = 0.0, 0.0, 0.0
        for part in self.lesson.parts(cut, batch, rng):
            torch.autograd.backward(self.scaler.scale(part.loss / self.plan.accumulate))
            loss += float(part.loss.detach())
            iou += part.weight * part.iou
            weight += part.weight
        if cut.grad is not None:
            torch.autograd.backward(embeddings, cut.grad)
        return loss, iou / weight

    def _uses_points(self, turn: int, rng: np.random.Generator) -> bool:
        """Tell whether a batch prompts with points: with a probability, or as published every second one."""
        if self.plan.protocol == "published":
            return turn % 2 == 0
        return bool(rng.random() < self.options.point_fraction)

    def _recipe(self) -> BatchRecipe:
        plan = self.plan
        return BatchRecipe(
            tiles=plan.tiles_per_step,
            objects_per_tile=plan.objects_per_tile,
            box_jitter=plan.box_jitter,
            exact_fraction=plan.exact_fraction,
            thickest_fraction=0.5 if plan.protocol == "boxes" else 0.0,
            min_object_px=self.options.min_object_px,
        )

    def _snapshot(self, course: Course) -> TrainingState:
        return TrainingState(
            step=course.step,
            elapsed_s=course.elapsed_s,
            means=course.means,
            model=self.sam.state_dict(),
            average=self.average.values,
            hints=self.hints.state_dict() if self.hints else {},
            optimiser=self.optimiser.state_dict(),
            rate=self.rate.state(),
            scaler=self.scaler.state_dict(),
            randomness=random_states(),
            best=course.best,
            history=[dataclasses.astuple(entry) for entry in course.history],
            first_scores=course.first_scores,
            planned=self.plan.batch(),
        )

    def _restore(self, state: TrainingState) -> None:
        self.sam.load_state_dict(state.model)
        # The graph holds what it has computed from the model's position encoding.
        self.decoder = BoxDecoderGraph(self.sam).to(self.device)
        self.lesson = self._lesson()
        self.average.values = {name: value.to(self.device) for name, value in state.average.items()}
        self.average.updates = state.step
        if self.hints is not None:
            self.hints.load_state_dict(state.hints)
        self.optimiser.load_state_dict(state.optimiser)
        self.rate.restore(state.rate)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        restore_random_states(state.randomness)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
