"""How the learning rate of a training falls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from torch.optim.lr_scheduler import ReduceLROnPlateau

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dendsam_deploy.training.sam_options import RateName

WARM_UP_STEPS = 100
WARM_UP_PART = 0.1
"""The rate rises for so many steps, but for no more than this part of the schedule."""

PLATEAU_FACTOR = 0.9
PLATEAU_PATIENCE = 3
"""As DendriteSAM was trained; counted in judgements here, in epochs there."""


class Rate(Protocol):
    """Sets the learning rate of an optimiser."""

    def before_step(self, step: int, done: float) -> None:
        """Set it for a step; `done` is the part of the schedule that lies behind, 0 to 1."""

    def judged(self, score: float) -> None:
        """Take note of a judgement; more is better."""

    def state(self) -> dict[str, Any]:
        """Return plain values to go on from."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from them."""


class CosineRate:
    """A short warm-up, then half a cosine from the peak to 2 % of it.

    References
    ----------
    Loshchilov and Hutter 2017, "SGDR", arXiv:1608.03983.
    """

    def __init__(self, optimiser: Optimizer, peak: float) -> None:
        self._optimiser, self._peak = optimiser, peak

    def before_step(self, step: int, done: float) -> None:
        """See `Rate`."""
        warm = min(1.0, max((step + 1) / WARM_UP_STEPS, done / WARM_UP_PART))
        for group in self._optimiser.param_groups:
            group["lr"] = self._peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def judged(self, score: float) -> None:
        """Nothing depends on it."""

    def state(self) -> dict[str, Any]:
        """Nothing: the step decides all."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is to be restored."""


class PlateauRate:
    """The peak, times `PLATEAU_FACTOR` whenever more than `PLATEAU_PATIENCE` judgements in a row were no better."""

    def __init__(self, optimiser: Optimizer) -> None:
        self._scheduler = ReduceLROnPlateau(optimiser, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE)

    def before_step(self, step: int, done: float) -> None:
        """Nothing depends on the step."""

    def judged(self, score: float) -> None:
        """See `Rate`."""
        self._scheduler.step(score)

    def state(self) -> dict[str, Any]:
        """See `Rate`."""
        return dict(self._scheduler.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        """See `Rate`."""
        self._scheduler.load_state_dict(state)


def make_rate(name: RateName, optimiser: Optimizer, peak: float) -> Rate:
    """Return the schedule of a name."""
    return CosineRate(optimiser, peak) if name == "cosine" else PlateauRate(optimiser)
