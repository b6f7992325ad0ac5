"""What a training of SAM has to tell, for its report."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dendsam_deploy.training.gallery import sample_predictions
from dendsam_deploy.training.story import SizeScores, TrainingStory, volume_stories

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.training.course import TrainedSam
    from dendsam_deploy.training.judge import Judgement, PromptKind
    from dendsam_deploy.training.sam import SamTrainer
    from dendsam_deploy.training.sam_options import FinetuneSamOptions
    from dendsam_deploy.training.story import HistoryRow

PROMPT_NAMES: dict[PromptKind, str] = {
    "box": "exact boxes",
    "jittered": "boxes 5 to 15 % off",
    "point": "one point",
}

SIZE_LIMITS_PX = (24.0, 64.0)
"""Square roots of areas, model px, that divide small, medium and large objects."""


@dataclass(frozen=True, slots=True)
class FinalScores:
    """IoU of every judged object by kind of prompt, of the weights that were written."""

    by_kind: dict[PromptKind, NDArray[np.float64]]

    def means(self) -> dict[str, float]:
        """Return the mean of each kind."""
        return {kind: float(found.mean()) for kind, found in self.by_kind.items()}


def history_row(entry: Judgement) -> HistoryRow:
    """Return a judgement as a row of the logbook."""
    return {
        "step": float(entry.step),
        "elapsed_s": entry.elapsed_s,
        "loss": math.nan if entry.loss is None else entry.loss,
        "train_iou": math.nan if entry.iou is None else entry.iou,
        "held_out_iou": entry.held_out_iou,
        "learning_rate": math.nan if entry.learning_rate is None else entry.learning_rate,
    }


def sam_story(
    trainer: SamTrainer, trained: TrainedSam, options: FinetuneSamOptions, final: FinalScores
) -> TrainingStory:
    """Tell a training.

    Parameters
    ----------
    trainer : SamTrainer
        It holds the weights that were written.
    trained : TrainedSam
        The result.
    options : FinetuneSamOptions
        What was asked for.
    final : FinalScores
        How good the written weights are.
    """
    metrics = {}
    means = final.means()
    for kind, name in PROMPT_NAMES.items():
        metrics[f"mean IoU, {name}"] = means[kind]
        metrics[f"the same before training, {name}"] = trained.first_scores[kind]
    return TrainingStory(
        kind="sam",
        model=options.model_type,
        out=options.out.name,
        score_name="held-out IoU with exact boxes",
        first_score=trained.first_held_out_iou,
        best_score=trained.held_out_iou,
        best_at=trained.best_step,
        volumes=volume_stories(trainer.sources, options.gap),
        history=tuple(history_row(entry) for entry in trained.history),
        seconds=trained.seconds,
        settings=_settings(trainer, options),
        environment={
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": _device_name(trainer.device),
        },
        metrics=metrics,
        per_size=_per_size(trainer, final),
        samples=sample_predictions(trainer.encoder, trainer.decoder, trainer.judged_tiles),
        notes=_notes(trained),
    )


def _settings(trainer: SamTrainer, options: FinetuneSamOptions) -> dict[str, str]:
    """Return what was chosen, as it is to be read."""
    plan, schedule = trainer.plan, options.schedule
    low, high = plan.box_jitter
    trained = f"LoRA of rank {schedule.lora_rank} and the decoder" if schedule.train == "lora" else schedule.train
    return {
        "protocol": plan.protocol,
        "trained": trained,
        "image size": f"{int(trainer.sam.image_encoder.img_size)} px",
        "preset": plan.preset,
        "tiles a step": f"{plan.tiles_per_step} x {plan.accumulate} x {trainer.team.size}",
        "objects a tile": str(plan.objects_per_tile),
        "least object": f"{schedule.min_object_px:g} px",
        "precision": plan.precision,
        "encoder blocks computed twice": "yes" if plan.checkpointing else "no",
        "learning rate": f"{plan.learning_rate:g}, {plan.rate}",
        "box error": f"{low:g} to {high:g} of the sides, {plan.exact_fraction:.0%} exact",
        "seed": str(schedule.seed),
    }


def _notes(trained: TrainedSam) -> tuple[str, ...]:
    """Return what a careful reader has to know."""
    notes = []
    if trained.best_step == 0:
        notes.append("No judgement was better than that of the starting weights, so these were written unchanged.")
    if trained.stopped_early:
        notes.append("Training stopped early: its last judgements were no better than an earlier one.")
    return tuple(notes)


def _per_size(trainer: SamTrainer, final: FinalScores) -> tuple[SizeScores, ...]:
    """Return the scores of small, medium and large objects."""
    areas: Sequence[NDArray[np.int64]] = [tile.objects.areas_px for _, tile in trainer.judged_tiles]
    classes = np.digitize(np.sqrt(np.concatenate(areas)), SIZE_LIMITS_PX)
    low, high = SIZE_LIMITS_PX
    labels = (f"small, below {low:g} px", f"medium, {low:g} to {high:g} px", f"large, from {high:g} px")
    found = []
    for number, label in enumerate(labels):
        rows = classes == number
        scores = {
            PROMPT_NAMES[kind]: float(values[rows].mean()) if rows.any() else math.nan
            for kind, values in final.by_kind.items()
        }
        found.append(SizeScores(label, int(rows.sum()), scores))
    return tuple(found)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
