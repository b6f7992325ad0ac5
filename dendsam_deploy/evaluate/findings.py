"""What a comparison yields, and the arithmetic that comparisons share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.bundle.parity import Reference
    from dendsam_deploy.runtimes.runner import Runner

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Finding:
    """A measured number, not yet judged.

    Parameters
    ----------
    level, graph, metric, value
        As in `bundle.parity.ParityRow`; the metric is a name of `limits.METRICS`.
    detail : str
        Tells apart what is measured by the same metric.
    reference : str or None
        Where the right answer came from, if not from where the graph's others did.
    """

    level: int
    graph: str
    metric: str
    value: float
    detail: str = ""
    reference: Reference | None = None


def run_graph(runner: Runner, inputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Call a graph; NaN passes, because it is to be counted.

    Outputs are copied, also where they need not be: an array of an engine's keeps all of the engine's memory alive.

    Raises
    ------
    InvalidArgumentError
        Where the graph refuses its inputs, or returns something else than the contract says.
    """
    outputs = runner.run({name: np.ascontiguousarray(array) for name, array in inputs.items()})
    for tensor in runner.spec.outputs:
        found = outputs[tensor.name].dtype.name if tensor.name in outputs else "nothing"
        if found != tensor.dtype:
            raise InvalidArgumentError(
                f"the {runner.spec.role} returned {found} for {tensor.name!r}, expected {tensor.dtype}; export it again"
            )
    return {name: array.copy() for name, array in outputs.items()}


def relative_max(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest difference over the largest expected magnitude."""
    return largest_difference(value, expected) / max(float(np.abs(expected).max()), _TINY)


def max_over_std(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest difference over the standard deviation of what was expected."""
    return largest_difference(value, expected) / max(float(expected.std()), _TINY)


def relative_rms(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the root mean square of the difference over that of what was expected; of several tiles, the highest."""
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (value, expected))
    with np.errstate(invalid="ignore", over="ignore"):
        rms = np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), _TINY)
    return float(rms.max())


def rms_over_std(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the root mean square of the difference over the standard deviation of what was expected."""
    with np.errstate(invalid="ignore", over="ignore"):
        rms = np.sqrt(np.square(value.astype(np.float64) - expected).mean())
    return float(rms) / max(float(expected.std()), _TINY)


def lowest_cosine(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the lowest cosine between corresponding tiles."""
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (value, expected))
    with np.errstate(invalid="ignore"):
        cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosine.min())


def not_finite(array: NDArray[np.float32]) -> int:
    """Count NaN and infinities."""
    return count_true(~np.isfinite(array))


def count_true(condition: NDArray[np.bool_]) -> int:
    """Count what is true."""
    return int(np.count_nonzero(condition))


def largest_difference(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest magnitude of a difference; NaN where there is one, 0 of nothing."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(value - expected).max(initial=0))
