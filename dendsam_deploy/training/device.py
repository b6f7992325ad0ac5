"""Which device trains."""

from __future__ import annotations

import torch

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError


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
