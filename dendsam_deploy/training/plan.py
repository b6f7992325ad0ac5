"""What a training does, after all choices are made: the protocol's defaults, and a batch that fits into memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.training.checkpointing import encoder_blocks
from dendsam_deploy.training.device import MOST_TILES_PER_STEP, check_device, tiles_that_fit
from dendsam_deploy.training.memory import StepMemory, free_bytes, step_memory
from dendsam_deploy.training.sam_options import PROTOCOLS

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from dendsam_deploy.training.sam_options import (
        PrecisionName,
        ProtocolName,
        RateName,
        SamTrainingOptions,
    )

HALF_TYPES: dict[PrecisionName, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

EFFECTIVE_TILES = 4
"""Least tiles that a step of ``boxes`` on a GPU learns from, over several passes where memory is short."""

CPU_OBJECTS_AT_ONCE = 8
"""Objects that a CPU decodes together in a round of interactive training: more take memory and are not faster."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A preset: how much of a step is in memory at once.

    Parameters
    ----------
    most_tiles : int
        Tiles encoded together, where they fit.
    objects_at_once : int
        Objects decoded together in a round of interactive training; the others follow.
    checkpointing : bool
        Compute the encoder's blocks twice.
    """

    most_tiles: int
    objects_at_once: int
    checkpointing: bool


PRESETS: dict[str, Rung] = {
    "large": Rung(MOST_TILES_PER_STEP, 32, checkpointing=False),
    "medium": Rung(2, 16, checkpointing=False),
    "small": Rung(1, 8, checkpointing=False),
    "smallest": Rung(1, 4, checkpointing=True),
}
"""From the most memory to the least; ``auto`` takes the first that fits. All compute the same gradients for a batch."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A training without open questions; see `sam_options.SamTrainingOptions` for what is not told here.

    Parameters
    ----------
    preset : str
        The rung of `PRESETS`.
    objects_at_once : int
        See `Rung`.
    average_decay, weight_decay, second_moment : float
        See `sam_options.ProtocolDefaults`.
    needed_bytes : int
        Estimated peak of a step, with gradients and the optimiser's state.
    free_bytes : int or None
        Free memory when it was planned, where it is known.
    """

    protocol: ProtocolName
    preset: str
    tiles_per_step: int
    accumulate: int
    objects_per_tile: int
    objects_at_once: int
    precision: PrecisionName
    checkpointing: bool
    learning_rate: float
    rate: RateName
    clip_norm: float
    box_jitter: tuple[float, float]
    exact_fraction: float
    average_decay: float
    weight_decay: float
    second_moment: float
    needed_bytes: int
    free_bytes: int | None

    def batch(self) -> dict[str, Any]:
        """Return the choices that depend on the memory that was free, as values of `SamTrainingOptions`."""
        names = ("preset", "tiles_per_step", "accumulate", "checkpointing", "precision")
        return {name: getattr(self, name) for name in names}

    def lines(self) -> tuple[str, ...]:
        """Return the plan in words, for people."""
        known = "" if self.free_bytes is None else f" of {self.free_bytes / 1e9:.1f} GB free"
        twice = ", encoder blocks computed twice" if self.checkpointing else ""
        low, high = self.box_jitter
        tiles = f"{self.tiles_per_step} tile{'s' * (self.tiles_per_step > 1)} x {self.accumulate} a step"
        batch = (
            f"preset {self.preset}: {tiles}, at most {self.objects_per_tile} objects each, {self.precision}{twice}; "
            f"about {self.needed_bytes / 1e9:.1f} GB"
        )
        jitter = f"box error {low:g} to {high:g} of the sides, {self.exact_fraction:.0%} exact"
        lines = [
            f"protocol {self.protocol}: {PROTOCOLS[self.protocol].summary}",
            f"{batch}{known}",
            f"learning rate {self.learning_rate:g}, {self.rate}; {jitter}",
        ]
        if self.free_bytes is not None and self.needed_bytes > self.free_bytes:
            lines.append(
                "this may not fit: choose a smaller image size or preset, train decoder or lora, or fewer objects"
            )
        return tuple(lines)


def plan_training(sam: Sam, options: SamTrainingOptions, *, is_young: bool) -> TrainingPlan:
    """Make the choices that were left open.

    Parameters
    ----------
    sam : Sam
        The model, with what is frozen frozen.
    options : SamTrainingOptions
        What was asked for.
    is_young : bool
        Whether the encoder starts from little and learns fast.

    Raises
    ------
    InvalidArgumentError, MissingCapabilityError
        If the device is none, not on this machine, or cannot compute at that precision.
    """
    check_device(options.device)
    device = torch.device(options.device)
    defaults = PROTOCOLS[options.protocol]
    precision = options.precision or _precision_of(device)
    if precision == "fp16" and device.type == "cpu":
        raise InvalidArgumentError("training at fp16 needs a GPU; choose fp32 or bf16 on the CPU")
    memory, free = step_memory(sam), free_bytes(device)
    if device.type == "cuda":  # where the weights are not yet
        weights = sum(value.numel() * value.element_size() for value in sam.parameters())
        memory = memory._replace(fixed=memory.fixed + weights)
    objects = options.objects_per_tile or (defaults.young if is_young else defaults).objects_per_tile
    name = _choose_rung(sam, options, memory, free, objects, half=precision != "fp32")
    rung = PRESETS[name]
    checkpointing = rung.checkpointing if options.checkpointing is None else options.checkpointing
    checkpointing = checkpointing and bool(encoder_blocks(sam))
    at_once = _at_once(options, rung, objects)
    per_tile = memory.tile(at_once, checkpointing=checkpointing, half=precision != "fp32")
    tiles = options.tiles_per_step or _tiles(options, rung, memory, free, per_tile)
    peak = {"decoder": 1e-5, "whole": 1e-5, "lora": 1e-4}[options.train]
    return TrainingPlan(
        protocol=options.protocol,
        preset=name,
        tiles_per_step=tiles,
        accumulate=options.accumulate or _accumulate(options, tiles),
        objects_per_tile=objects,
        objects_at_once=at_once,
        precision=precision,
        checkpointing=checkpointing,
        learning_rate=options.learning_rate or (defaults.young.learning_rate if is_young else peak),
        rate=options.rate or defaults.rate,
        clip_norm=options.clip_norm or defaults.clip_norm,
        box_jitter=defaults.box_jitter if options.box_jitter is None else options.box_jitter,
        exact_fraction=defaults.exact_fraction if options.exact_fraction is None else options.exact_fraction,
        average_decay=(defaults.young if is_young else defaults).average_decay,
        weight_decay=defaults.weight_decay,
        second_moment=defaults.second_moment,
        needed_bytes=memory.fixed + tiles * per_tile,
        free_bytes=free,
    )


def _precision_of(device: torch.device) -> PrecisionName:
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _choose_rung(
    sam: Sam, options: SamTrainingOptions, memory: StepMemory, free: int | None, objects: int, *, half: bool
) -> str:
    """Return the name of the largest preset of which one tile fits, or the one that was asked for."""
    if options.preset != "auto":
        return options.preset
    if free is None:
        return "small"
    for name, rung in PRESETS.items():
        at_once = _at_once(options, rung, objects)
        checkpointing = rung.checkpointing if options.checkpointing is None else options.checkpointing
        tile = memory.tile(at_once, checkpointing=checkpointing and bool(encoder_blocks(sam)), half=half)
        least = min(rung.most_tiles, 2) if torch.device(options.device).type == "cuda" else 1
        if tiles_that_fit(free, memory.fixed + (least - 1) * tile, tile, at_least=0):
            return name
    return "smallest"


def _at_once(options: SamTrainingOptions, rung: Rung, objects: int) -> int:
    """Return how many of a tile's objects to decode together."""
    if options.protocol != "published":
        return objects
    on_cpu = torch.device(options.device).type == "cpu"
    return min(objects, rung.objects_at_once, CPU_OBJECTS_AT_ONCE if on_cpu else objects)


def _tiles(options: SamTrainingOptions, rung: Rung, memory: StepMemory, free: int | None, per_tile: int) -> int:
    """Return how many tiles to encode together: one on the CPU, whose caches hold no more, and as published one."""
    if torch.device(options.device).type == "cpu" or options.protocol == "published" or free is None:
        return 1
    return min(rung.most_tiles, tiles_that_fit(free, memory.fixed, per_tile))


def _accumulate(options: SamTrainingOptions, tiles: int) -> int:
    if torch.device(options.device).type == "cpu" or options.protocol == "published":
        return 1
    return math.ceil(EFFECTIVE_TILES / (tiles * options.devices))
