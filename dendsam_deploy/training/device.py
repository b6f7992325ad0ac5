"""Which device trains, and how much fits into its memory."""

from __future__ import annotations

import torch

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError

MOST_TILES_PER_STEP = 8
"""Larger batches leave too few steps within the usual training times."""

_USABLE_FRACTION = 0.8  # of the free memory; the rest is for fragments and for tiles with more objects


def check_device(device: str) -> None:
    """Raise unless torch can train on a device.

    Parameters
    ----------
    device : str
        ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    InvalidArgumentError, MissingCapabilityError
        If it is no device, or not on this machine.
    """
    if device == "cpu":
        return
    name, _, number = device.partition(":")
    if name != "cuda" or not (number or "0").isdecimal():
        raise InvalidArgumentError(f"{device!r} is no device to train on; choose cpu, cuda or cuda:N")
    if int(number or 0) >= torch.cuda.device_count():
        raise MissingCapabilityError(f"{device} is not available to torch on this machine; train on the cpu")


def tiles_that_fit(free_bytes: int, fixed_bytes: int, bytes_per_tile: int, at_least: int = 1) -> int:
    """Return how many tiles of a step fit into memory, `at_least` to `MOST_TILES_PER_STEP`.

    Parameters
    ----------
    free_bytes : int
        Free memory before the first step.
    fixed_bytes : int
        What training needs whatever the batch: gradients and the optimiser's moments.
    bytes_per_tile : int
        Peak of a step of one tile.
    at_least : int
        What to return where less fits.
    """
    usable = _USABLE_FRACTION * free_bytes - fixed_bytes
    return int(min(max(usable // max(bytes_per_tile, 1), at_least), MOST_TILES_PER_STEP))
