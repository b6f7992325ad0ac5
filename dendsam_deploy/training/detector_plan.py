"""How many tiles a step of the detector's training takes: what fits into the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dendsam_deploy.training.memory import free_bytes

if TYPE_CHECKING:
    from dendsam_deploy.models.detector import YoloDetector
    from dendsam_deploy.training.options import DetectorSchedule

PRESETS = {"large": 32, "medium": 16, "small": 8, "smallest": 2}
"""Tiles of a step by name; larger batches leave too few steps, and BatchNorm learns nothing from one tile."""

_CPU_PRESETS = ("small", "smallest")
"""On a CPU larger batches cost memory and gain no speed."""

_USABLE_FRACTION = 0.7
"""Of the free memory; the rest is for the tiles on their way and for those with more objects than most."""

_WEIGHT_COPIES = 6
"""Weights, gradients, two moments of AdamW, the averaged weights and a copy while they are written."""

_ASSIGNMENT_TENSORS = 10
"""Tensors of objects x cells that live while YOLO decides which cells answer for which object; counted generously."""

_PEAK_FACTOR = 1.25
"""Peak of a step over what autograd keeps (measured on a CPU, yolo11n at 512 px: 0.146 GiB a tile over 0.129)."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The batch of a training and how it came about.

    Parameters
    ----------
    preset : str
        One of `PRESETS`, or ``given``.
    tiles : int
        Tiles of a step.
    needed_bytes : int
        Estimated peak.
    free_bytes : int or None
        Free memory of the device, where it is known.
    device : str
        ``cpu`` or ``cuda[:N]``.
    """

    preset: str
    tiles: int
    needed_bytes: int
    free_bytes: int | None
    device: str

    @property
    def fits(self) -> bool:
        """Whether the estimate is less than what may be used."""
        return self.free_bytes is None or self.needed_bytes <= _USABLE_FRACTION * self.free_bytes

    def describe(self) -> str:
        """Say it in a line."""
        free = "" if self.free_bytes is None else f" of {self.free_bytes / 2**30:.1f} GiB free"
        problem = "" if self.fits else "; that may be too much, a smaller --batch or --image-size needs less"
        return (
            f"batch: {self.tiles} tiles a step (preset {self.preset}), about {self.needed_bytes / 2**30:.1f} GiB"
            f"{free} on {self.device}{problem}"
        )


def plan_batch(detector: YoloDetector, tile_size_px: int, most_boxes: int, schedule: DetectorSchedule) -> BatchPlan:
    """Choose the batch of a training.

    Parameters
    ----------
    detector : YoloDetector
        The network; one tile is run through it on the CPU to see what is kept for the way back.
    tile_size_px : int
        Side of the tiles.
    most_boxes : int
        Boxes on the fullest tile.
    schedule : DetectorSchedule
        Its batch, where it names one, is taken as it is.
    """
    free = free_bytes(torch.device(schedule.device))
    fixed, tile = _needed_bytes(detector, tile_size_px, most_boxes)
    if schedule.device != "cpu":
        tile = round(0.6 * tile)  # half precision halves most of it
    if schedule.batch is not None:
        return BatchPlan("given", schedule.batch, fixed + schedule.batch * tile, free, schedule.device)
    names = _CPU_PRESETS if schedule.device == "cpu" else tuple(PRESETS)
    plans = [BatchPlan(name, PRESETS[name], fixed + PRESETS[name] * tile, free, schedule.device) for name in names]
    return next((plan for plan in plans if plan.fits), plans[-1])


def _needed_bytes(detector: YoloDetector, tile_size_px: int, most_boxes: int) -> tuple[int, int]:
    """Return what a training step takes whatever the batch, and for each of its tiles."""
    network: Any = detector.network
    weights = sum(value.numel() * value.element_size() for value in network.parameters())
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    was_training = network.training
    trained = [value for value in network.parameters() if not value.requires_grad and value.is_floating_point()]
    statistics = {name: value.clone() for name, value in network.named_buffers()}
    for value in trained:
        value.requires_grad_(True)
    network.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), torch.enable_grad():
            output = network(torch.zeros(1, 3, tile_size_px, tile_size_px))
        del output
    finally:
        network.train(was_training)
        for value in trained:
            value.requires_grad_(False)
        for name, value in network.named_buffers():
            value.copy_(statistics[name])
    strides = [int(stride) for stride in network.model[-1].stride]
    cells = sum((tile_size_px // stride) ** 2 for stride in strides)
    assignment = _ASSIGNMENT_TENSORS * most_boxes * cells * 4
    activations = max(sum(kept.values()) - weights, 0)
    return _WEIGHT_COPIES * weights, round(_PEAK_FACTOR * activations) + assignment
