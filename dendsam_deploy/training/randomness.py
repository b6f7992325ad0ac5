"""The state of every generator of random numbers that a training could draw from, as plain values and tensors.

Batches are drawn from generators of their own, made anew from the seed and the step. What libraries draw besides comes
from these.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Return the states of the generators of Python, numpy and torch."""
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - what others draw from it is why it is kept
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Go on from states that `random_states` returned, on a machine with as many GPUs or other ones."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - see above
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
