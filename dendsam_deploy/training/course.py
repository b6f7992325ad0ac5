"""How far a training of SAM has come, what it needs to go on from there, and what is left of it in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from dendsam_deploy.training.judge import Judgement


@dataclass(frozen=True, slots=True)
class TrainedSam:
    """The best state of a training run and how it came about.

    Parameters
    ----------
    state : dict of Tensor
        State dict of a plain SAM; adapters are merged.
    held_out_iou, first_held_out_iou : float
        With exact boxes, of this state and before training.
    best_step, steps : int
        After which step the state was, and how many there were.
    seconds : float
        Time of this run and of those that it went on from.
    stopped_early : bool
        Whether the patience ended it.
    history : tuple of Judgement
        All judgements.
    first_scores : dict
        Mean IoU before training by kind of prompt.
    """

    state: dict[str, Tensor]
    held_out_iou: float
    first_held_out_iou: float
    best_step: int
    steps: int
    seconds: float
    stopped_early: bool
    history: tuple[Judgement, ...]
    first_scores: dict[str, float]


class TrainingState(NamedTuple):
    """Everything that an interrupted run needs to go on exactly where it was; plain values and tensors only.

    The tensors are those of the run itself: who keeps a state beyond the callback copies it.
    """

    step: int
    elapsed_s: float
    means: tuple[float, float]
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    hints: dict[str, Tensor]
    optimiser: dict[str, object]
    rate: dict[str, Any]
    scaler: dict[str, Any]
    randomness: dict[str, Any]
    best: dict[str, Tensor]
    history: list[tuple[Any, ...]]
    first_scores: dict[str, float]
    planned: dict[str, Any]


CheckpointCallback = Callable[[TrainingState], None]


@dataclass(slots=True)
class Course:
    """How far a run has come: `means` are running means of loss and IoU, `best` the best state dict so far."""

    step: int
    elapsed_s: float
    means: tuple[float, float]
    history: list[Judgement]
    best: dict[str, Tensor]
    first_scores: dict[str, float]

    def take(self, learnt: tuple[float, float], elapsed_s: float) -> None:
        """Note a step that had this loss and IoU."""
        pairs = zip(self.means, learnt, strict=True)
        loss, iou = (new if math.isnan(mean) else 0.98 * mean + 0.02 * new for mean, new in pairs)
        self.means, self.step, self.elapsed_s = (loss, iou), self.step + 1, elapsed_s

    def is_stuck(self, patience: int | None) -> bool:
        """Tell whether so many judgements in a row were no better than one before them."""
        scores = [entry.held_out_iou for entry in self.history]
        return patience is not None and len(scores) - 1 - scores.index(max(scores)) >= patience
