"""How SAM is trained; known without loading torch, so that help pages are quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.models.architectures import MODEL_TYPES, ModelType
from dendsam_deploy.training.options import DataOptions

if TYPE_CHECKING:
    from pathlib import Path

ProtocolName = Literal["boxes", "published"]
RateName = Literal["cosine", "plateau"]
TrainedParts = Literal["whole", "decoder", "lora"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
PresetName = Literal["auto", "large", "medium", "small", "smallest"]

PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)
RATE_NAMES: tuple[RateName, ...] = get_args(RateName)
TRAINED_PARTS: tuple[TrainedParts, ...] = get_args(TrainedParts)
PRECISION_NAMES: tuple[PrecisionName, ...] = get_args(PrecisionName)
PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)


@dataclass(frozen=True, slots=True)
class YoungDefaults:
    """Peak rate of AdamW, objects per tile, and weight of the past in the moving average, for young encoders."""

    learning_rate: float
    objects_per_tile: int
    average_decay: float


@dataclass(frozen=True, slots=True)
class ProtocolDefaults:
    """What a protocol chooses where nothing else is asked for.

    Parameters
    ----------
    summary : str
        The protocol in a few words.
    objects_per_tile : int
        Most objects prompted on each tile.
    box_jitter : (float, float)
        Error of prompted boxes, as fractions of their sides.
    exact_fraction : float
        Part of the boxes that stay exact.
    rate : str
        How the learning rate falls.
    clip_norm : float
        Largest norm of a gradient.
    average_decay : float
        Weight of the past in the moving average of the weights; 0 keeps the weights of the last step.
    weight_decay, second_moment : float
        Of AdamW, the latter its second beta.
    young : YoungDefaults
        What it chooses for ``tiny``, whose encoder starts from little, in place of that.
    """

    summary: str
    objects_per_tile: int
    box_jitter: tuple[float, float]
    exact_fraction: float
    rate: RateName
    clip_norm: float
    average_decay: float
    weight_decay: float
    second_moment: float
    young: YoungDefaults


PROTOCOLS: dict[ProtocolName, ProtocolDefaults] = {
    "boxes": ProtocolDefaults(
        summary="one box or point per object, through the deployed decoder",
        objects_per_tile=16,
        box_jitter=(0.05, 0.15),
        exact_fraction=0.3,
        rate="cosine",
        clip_norm=1.0,
        average_decay=0.998,
        weight_decay=0.05,
        second_moment=0.98,
        young=YoungDefaults(learning_rate=4e-4, objects_per_tile=16, average_decay=0.998),
    ),
    "published": ProtocolDefaults(
        summary="interactive, as DendriteSAM: points and boxes in turn, then points where the mask is wrong",
        objects_per_tile=25,
        box_jitter=(0.025, 0.025),
        exact_fraction=0.0,
        rate="plateau",
        clip_norm=math.inf,
        average_decay=0.0,
        weight_decay=0.01,
        second_moment=0.999,
        young=YoungDefaults(learning_rate=2e-4, objects_per_tile=8, average_decay=0.99),
    ),
}
"""The two ways to train. ``boxes`` is this program's own, meant for deployment behind a detector.

Where ``published`` differs from what it is named after: weights are chosen, and the rate is lowered, by the IoU with
exact boxes at each judgement, there by the Dice loss of mixed prompts after each epoch; tiles are cut and varied as by
``boxes``, there slices are scaled to 1024 px; and the instance decoder that micro-sam trains besides, which is no part
of SAM, is left out. A ``tiny`` learns borders and centres through hints in its place, from fewer objects a step and at
a lower rate than by ``boxes``; averaged weights are judged and kept. On sections of a nerve cord at 512 px a step of 25
objects took 12.0 s of CPU time, one of 8 objects 4.6 s; in four minutes of the latter, before there were hints, exact
boxes came from an IoU of .696 to .765, at 4e-4 without an average to .743.

References
----------
Of ``published``: github.com/ZE-WEN/DendriteSAM, training/; micro_sam/training at
github.com/computational-cell-analytics/micro-sam (8 answers, mask prompt at .5, ReduceLROnPlateau(.9, 3), AdamW).
"""


@dataclass(frozen=True, slots=True)
class SamTrainingOptions:
    """Choices of a training run; the schedule ends at whichever of `minutes`, `steps` and `patience` comes first.

    Parameters
    ----------
    minutes : float or None
        Time to train, without the last judgement.
    steps : int or None
        Number of optimiser steps. With `minutes` None the result depends on the seed alone, not on the machine's speed.
    patience : int or None
        Stop after so many judgements in a row without a better one. None: never.
    protocol : str
        One of `PROTOCOLS`, which has the defaults of what is None below.
    preset : str
        How much memory a step may take: ``auto`` plans it, see `plan`; the others are its rungs.
    tiles_per_step : int or None
        Tiles encoded together. None: as planned.
    accumulate : int or None
        Such batches of tiles for each optimiser step. None: as planned.
    objects_per_tile : int or None
        Most objects prompted on each tile.
    precision : str or None
        Precision of the large products. None: bf16 or, where the GPU does not know it, fp16; on the CPU fp32.
    checkpointing : bool or None
        Compute the encoder's blocks a second time in place of keeping what they computed. None: as planned.
    train : str
        ``whole``; ``decoder`` with the image encoder as it is; ``lora``: the same and adapters of low rank in the
        encoder's attention and MLP, which the checkpoint holds merged into its weights.
    lora_rank : int
        Rank of these.
    learning_rate : float or None
        Peak rate of AdamW. None: 1e-5 as published for the official architectures, 1e-4 for their adapters, 4e-4 for
        ``tiny``, 2e-4 with ``published``.
    rate : str or None
        ``cosine``: warm-up, then a fall to 2 % at the end of the schedule. ``plateau``: times .9 after more than three
        judgements without a better one.
    clip_norm : float or None
        Largest norm of a gradient; longer ones are shortened. Infinite: never.
    box_jitter : (float, float) or None
        Error of prompted boxes, as fractions of their sides.
    exact_fraction : float or None
        Part of the boxes that stay exact.
    point_fraction : float
        Part of the batches of ``boxes`` that prompt with one point instead; ``published`` alternates.
    rounds : int
        Answers of each object in a step of ``published``.
    mask_fraction : float
        How often such an answer is given the one before as mask prompt.
    min_object_px : float
        Least area of an object, slice px.
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
    devices : int
        GPUs, or on the CPU processes, that share the work; each learns from batches of its own.
    """

    minutes: float | None = 30.0
    steps: int | None = None
    patience: int | None = None
    protocol: ProtocolName = "boxes"
    preset: PresetName = "auto"
    tiles_per_step: int | None = None
    accumulate: int | None = None
    objects_per_tile: int | None = None
    precision: PrecisionName | None = None
    checkpointing: bool | None = None
    train: TrainedParts = "whole"
    lora_rank: int = 4
    learning_rate: float | None = None
    rate: RateName | None = None
    clip_norm: float | None = None
    box_jitter: tuple[float, float] | None = None
    exact_fraction: float | None = None
    point_fraction: float = 0.1
    rounds: int = 8
    mask_fraction: float = 0.5
    min_object_px: float = 25.0
    judge_minutes: float = 3.0
    judge_steps: int | None = None
    judge_slices: int = 6
    seed: int = 0
    device: str = "cpu"
    devices: int = 1

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise InvalidArgumentError("training needs an end: give minutes, steps or both")
        self._check_choices()
        self._check_numbers()

    def _check_choices(self) -> None:
        choices = {
            "protocol": PROTOCOL_NAMES,
            "preset": PRESET_NAMES,
            "train": TRAINED_PARTS,
            "rate": (None, *RATE_NAMES),
            "precision": (None, *PRECISION_NAMES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                words = ", ".join(word for word in known if word is not None)
                raise InvalidArgumentError(f"{name} of a training is {getattr(self, name)!r}; choose one of {words}")

    def _check_numbers(self) -> None:
        counts = ("steps", "patience", "tiles_per_step", "accumulate", "objects_per_tile", "lora_rank", "rounds")
        for name in (*counts, "judge_steps", "judge_slices", "devices", "minutes", "learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"{name} of a training is {value}, expected more than 0")
            if value is not None and name != "clip_norm" and not math.isfinite(value):
                raise InvalidArgumentError(f"{name} of a training is {value}, expected a finite number")
        for name in ("exact_fraction", "point_fraction", "mask_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InvalidArgumentError(f"{name} of a training is {value}, expected 0 to 1")
        if not 0 <= self.min_object_px < math.inf:
            raise InvalidArgumentError(f"the least object is {self.min_object_px} px, expected 0 or more")
        if self.seed < 0:
            raise InvalidArgumentError(f"the seed of a training is {self.seed}, expected 0 or more")
        if self.box_jitter is not None and not 0 <= self.box_jitter[0] <= self.box_jitter[1] < 0.5:
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
    start_base : Path or None
        Whole SAM whose prompt encoder and mask decoder complete a `start` that has an image encoder only.
    image_size : int or None
        Side of the model's input, px; None: that of the starting weights.
    from_scratch : bool
        Start from random weights.
    pseudo : tuple of Path
        Folders of pseudo-labels that teach beside the true labels, see `pseudo.open_pseudo_sources`.
    pseudo_weight : float
        How often all of them together are drawn from, relative to all true labels together.
    resume : bool
        Go on with an interrupted run of the same settings, if there is one.
    schedule : SamTrainingOptions
        Length, batch and loss.
    """

    out: Path
    model_type: ModelType = "tiny"
    start: Path | None = None
    start_base: Path | None = None
    image_size: int | None = None
    from_scratch: bool = False
    pseudo: tuple[Path, ...] = ()
    pseudo_weight: float = 0.5
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
        if not 0 < self.pseudo_weight < math.inf:
            raise InvalidArgumentError(f"the weight of pseudo-labels is {self.pseudo_weight}, expected more than 0")
