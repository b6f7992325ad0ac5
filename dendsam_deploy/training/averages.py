"""An exponential moving average of a model's weights: steadier than the last step of a short training."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


class MovingAverage:
    """Averaged weights of what is trained of a model.

    Parameters
    ----------
    model : nn.Module
        Its current weights are the first average.
    decay : float
        Weight of the past at every update, once there is enough of it: early on the average follows the model with
        ``(1 + t) / (10 + t)`` after t updates, so that it forgets where training began. 0 keeps the last weights alone.

    References
    ----------
    Polyak and Juditsky 1992, SIAM J. Control Optim. 30:838.
    """

    def __init__(self, model: nn.Module, decay: float = 0.998) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in _trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's current weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in _trained(model):
            self.values[name].lerp_(value.detach(), 1 - decay)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state dict with averaged parameters; buffers are the model's own."""
        return model.state_dict() | self.values

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the averaged weights for a while."""
        own = {name: value.detach().clone() for name, value in _trained(model)}
        _assign(model, self.values)
        try:
            yield
        finally:
            _assign(model, own)


@torch.no_grad()
def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in _trained(model):
        parameter.copy_(values[name])


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are not frozen."""
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)
