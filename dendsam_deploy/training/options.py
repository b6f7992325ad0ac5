"""What to train, on which slices and for how long; known without loading torch, so that help pages are quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.models.architectures import default_image_size

if TYPE_CHECKING:
    from pathlib import Path

AugmentStrength = Literal["none", "light", "em"]
AUGMENT_STRENGTHS: tuple[AugmentStrength, ...] = get_args(AugmentStrength)
"""How much tiles are varied: not at all; in scale, orientation and grey values; also as sections of EM vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Which labelled volumes teach, which of their slices serve what, and at which scale; both trainings share these.

    Parameters
    ----------
    data : Path or None
        File that names further volumes, one in each line; see `volume_list.read_volume_list`. What follows holds for
        every volume of which the file says nothing else.
    slices : (int, int) or None
        Half-open range of slices that may be used, for training and for judging together.
    holdout_fraction : float
        Part of them, the last block, that judges and never trains.
    held_out : tuple of (int, int)
        Half-open ranges of slices that judge, in place of that last block.
    gap : int
        Least number of slices between those that judge and those that train; they serve neither.
    zoom : float or None
        Model px per slice px; None: planned from the size of the objects.
    background_labels : tuple of int
        Labels that are not objects, such as a membrane class.
    voxel_size_nm : (float, float, float) or None
        Overrides what the file records.
    augment : str
        How much training tiles are varied: ``none``, ``light`` (scale, orientation, grey values, focus, noise) or
        ``em`` (also deformation, uneven thickness, dark sections, dark and missing bands).
    """

    data: Path | None = None
    slices: tuple[int, int] | None = None
    holdout_fraction: float = 0.15
    held_out: tuple[tuple[int, int], ...] = ()
    gap: int = 2
    zoom: float | None = None
    background_labels: tuple[int, ...] = ()
    voxel_size_nm: tuple[float, float, float] | None = None
    augment: AugmentStrength = "em"

    def __post_init__(self) -> None:
        if self.zoom is not None and not 0 < self.zoom < math.inf:
            raise InvalidArgumentError(f"the zoom is {self.zoom}, expected a positive number of model px per slice px")
        if self.augment not in AUGMENT_STRENGTHS:
            raise InvalidArgumentError(
                f"unknown strength of augmentation {self.augment!r}; choose one of {', '.join(AUGMENT_STRENGTHS)}"
            )


@dataclass(frozen=True, slots=True)
class DetectorSchedule:
    """Length and steps of a training; it ends at whichever of `minutes` and `epochs` comes first.

    Parameters
    ----------
    minutes : float or None
        Time for everything, from reading the volume to the last judgement.
    epochs : int or None
        Number of epochs. With `minutes` None the result depends on the seed alone.
    tiles : int or None
        Random tiles cut from the training slices. None: 600 on the CPU, 4000 on a GPU.
    tiles_per_epoch : int or None
        Tiles drawn from them between two judgements. None: 96 on the CPU, 1280 on a GPU.
    judge_tiles : int
        About how many held-out tiles judge an epoch.
    batch : int or None
        Tiles per step. None: what fits into the free memory, at most 8 on the CPU and 32 on a GPU.
    patience : int or None
        Epochs without a better score on the held-out tiles after which training ends early; None: never.
    learning_rate : float or None
        Peak rate of AdamW. None: 5e-4 for weights that were trained before, 2e-3 for random ones.
    seed : int
        Source of every random choice.
    device : str
        ``cpu`` or ``cuda[:N]``.
    """

    minutes: float | None = 20.0
    epochs: int | None = None
    tiles: int | None = None
    tiles_per_epoch: int | None = None
    judge_tiles: int = 24
    batch: int | None = None
    patience: int | None = 20
    learning_rate: float | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.minutes is None and self.epochs is None:
            raise InvalidArgumentError("training needs an end: give minutes, epochs or both")
        sizes = (self.tiles, self.tiles_per_epoch, self.judge_tiles, self.batch, self.patience, self.learning_rate)
        numbers = (self.minutes, self.epochs, *sizes)
        if any(number is not None and not number > 0 for number in numbers):
            raise InvalidArgumentError(
                "times, numbers of epochs and tiles, the batch, the patience and the learning rate must be positive"
            )
        if self.learning_rate is not None and not self.learning_rate <= 1:
            raise InvalidArgumentError(f"the learning rate is {self.learning_rate:g}, expected at most 1")

    @property
    def tile_count(self) -> int:
        """Tiles to cut."""
        return self.tiles or (600 if self.device == "cpu" else 4000)

    @property
    def epoch_tiles(self) -> int:
        """Tiles per epoch."""
        return min(self.tile_count, self.tiles_per_epoch or (96 if self.device == "cpu" else 1280))


@dataclass(frozen=True, slots=True)
class DetectorTrainingOptions(DataOptions):
    """How the detector is fine-tuned.

    Besides the slices and the scale of `DataOptions`:

    Parameters
    ----------
    out : Path
        Checkpoint to write.
    start : Path or None
        Checkpoint (``.pt``) or architecture (``.yaml``) to start from. None: the packaged weights.
    from_scratch : bool
        Start from random weights of that architecture, `DEFAULT_ARCHITECTURE` where none is named.
    tile_size_px : int
        Side of the tiles, model px; a multiple of 32.
    min_object_px : float
        Least area of an object, slice px.
    resume : bool
        Go on with an interrupted training of the same settings, if there is one.
    schedule : DetectorSchedule
        Length, batch and rate.
    """

    out: Path
    start: Path | None = None
    from_scratch: bool = False
    tile_size_px: int = default_image_size("tiny")
    min_object_px: float = 25.0
    resume: bool = True
    schedule: DetectorSchedule = field(default_factory=DetectorSchedule)

    def __post_init__(self) -> None:
        DataOptions.__post_init__(self)
        if not 0 <= self.min_object_px < math.inf:
            raise InvalidArgumentError(f"the least object is {self.min_object_px} px, expected 0 or more")
        if self.tile_size_px < 64 or self.tile_size_px % 32:
            raise InvalidArgumentError(
                f"tiles of {self.tile_size_px} px do not suit YOLO; choose a multiple of 32 from 64 on"
            )
