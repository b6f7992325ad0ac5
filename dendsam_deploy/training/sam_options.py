"""How SAM is trained; known without loading torch, so that help pages are quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.models.architectures import MODEL_TYPES, ModelType
from dendsam_deploy.training.options import DataOptions

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class SamTrainingOptions:
    """Choices of a training run; the schedule ends at whichever of `minutes` and `steps` comes first.

    Parameters
    ----------
    minutes : float or None
        Time to train, without the last judgement.
    steps : int or None
        Number of optimiser steps. With `minutes` None the result depends on the seed alone, not on the machine's speed.
    tiles_per_step : int or None
        Tiles encoded in a step. None: one on the CPU, whose caches hold no more; on a GPU what its memory allows.
    objects_per_tile : int
        Most objects prompted on each tile.
    learning_rate : float or None
        Peak rate of AdamW. None: 1e-5 as published for the official architectures, 4e-4 for ``tiny``.
    box_jitter : (float, float)
        Error of prompted boxes, as fractions of their sides.
    exact_fraction : float
        Part of the boxes that stay exact.
    point_fraction : float
        Part of the steps that prompt with one point instead of a box.
    judge_minutes : float
        Time between judgements on the held-out slices, where there are `minutes`.
    judge_steps : int or None
        Steps between judgements, where there are no `minutes`. None: a tenth of `steps`.
    judge_slices : int
        Most held-out slices used by a judgement, evenly spaced.
    seed : int
        Source of every random choice.
    device : str
        ``cpu`` or ``cuda[:N]``.
    """

    minutes: float | None = 30.0
    steps: int | None = None
    tiles_per_step: int | None = None
    objects_per_tile: int = 16
    learning_rate: float | None = None
    box_jitter: tuple[float, float] = (0.05, 0.15)
    exact_fraction: float = 0.3
    point_fraction: float = 0.1
    judge_minutes: float = 3.0
    judge_steps: int | None = None
    judge_slices: int = 6
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise InvalidArgumentError("training needs an end: give minutes, steps or both")
        lengths = ("minutes", "steps", "tiles_per_step", "objects_per_tile", "judge_steps", "judge_slices")
        for name in (*lengths, "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"{name} of a training is {value}, expected more than 0")
        for name in ("exact_fraction", "point_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgumentError(f"{name} of a training is {getattr(self, name)}, expected 0 to 1")
        if not 0 <= self.box_jitter[0] <= self.box_jitter[1] < 0.5:
            raise InvalidArgumentError(f"the box jitter is {self.box_jitter}, expected two ascending numbers below 0.5")


@dataclass(frozen=True, slots=True)
class FinetuneSamOptions(DataOptions):
    """How SAM is fine-tuned.

    Besides the slices and the scale of `DataOptions`:

    Parameters
    ----------
    out : Path
        Checkpoint to write.
    model_type : str
        Architecture. ``tiny`` starts from the packaged weights unless `start` says otherwise.
    start : Path or None
        Checkpoint to start from; needed for the official architectures.
    image_size : int or None
        Side of the model's input, px; None: that of the starting weights.
    from_scratch : bool
        Start from random weights.
    resume : bool
        Go on with an interrupted run of the same settings, if there is one.
    schedule : SamTrainingOptions
        Length, batch and loss.
    """

    out: Path
    model_type: ModelType = "tiny"
    start: Path | None = None
    image_size: int | None = None
    from_scratch: bool = False
    resume: bool = True
    schedule: SamTrainingOptions = field(default_factory=SamTrainingOptions)

    def __post_init__(self) -> None:
        DataOptions.__post_init__(self)  # super() is not known to a class with slots
        if self.model_type not in MODEL_TYPES:
            raise InvalidArgumentError(
                f"unknown model type {self.model_type!r}; choose one of {', '.join(MODEL_TYPES)}"
            )
        if self.from_scratch and self.start is not None:
            raise InvalidArgumentError("training starts from a checkpoint or from scratch, not both; give one of them")
