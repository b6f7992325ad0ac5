"""One call of a graph, with the two cares that every stage takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from dendsam_deploy.runtimes.runner import Runner


def infer(runner: Runner, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Run a graph and return outputs that stay valid and are finite.

    Raises
    ------
    ParityError
        Where an output holds NaN or infinity. Comparisons with NaN are false, so it would look like "no objects here".
    """
    outputs = runner.run({tensor.name: inputs[tensor.name] for tensor in runner.spec.inputs})
    for name, values in outputs.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            graph = runner.spec
            raise ParityError(
                f"the {graph.role} graph at {graph.precision} returned NaN or infinity in {name!r} on {runner.engine}, "
                f"{runner.device}; choose another precision and run `dendsam-deploy verify`"
            )
    if runner.borrows_outputs:
        return {name: values.copy() for name, values in outputs.items()}
    return outputs
