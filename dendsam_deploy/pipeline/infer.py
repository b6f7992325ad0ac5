"""One call of a graph, with the cares that every stage takes, and where its tensors lie."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import ParityError
from dendsam_deploy.runtimes.runner import keeps_tensors, share_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from dendsam_deploy.pipeline.prepare import PreparedSlice
    from dendsam_deploy.runtimes.runner import Runner, Tensor


def infer(runner: Runner, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    """Run a graph and return outputs that stay valid and are finite.

    Raises
    ------
    ParityError
        Where an output holds NaN or infinity. Comparisons with NaN are false, so it would look like "no objects here".
    """
    wanted = {tensor.name: inputs[tensor.name] for tensor in runner.spec.inputs}
    if keeps_tensors(runner):
        outputs = runner.run(wanted)
    else:
        outputs = runner.run({name: on_host(values) for name, values in wanted.items()})
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


def on_host(tensor: Tensor) -> NDArray[np.generic]:
    """Return a tensor as an array."""
    return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()


def on_device(prepared: PreparedSlice, *runners: Runner) -> PreparedSlice:
    """Upload the tiles of a slice where several runners can share them; elsewhere return the slice as it is."""
    first = runners[0]
    if share_memory(*runners) and keeps_tensors(first):
        return replace(prepared, tiles=first.upload(on_host(prepared.tiles)))
    return prepared


def tile_batches(tile_index: NDArray[np.int64], runner: Runner) -> Iterator[slice]:
    """Yield the positions of tiles that go into one call: consecutive ones, as many as keep the runner busy.

    A runner of the CPU gets one tile at a time: its working memory dwarfs a tile, and one keeps it busy.

    Parameters
    ----------
    tile_index : ndarray, shape (N,), int64
        Tiles, ascending.
    runner : Runner
        What they are for.
    """
    most = runner.rows_per_call if keeps_tensors(runner) else 1
    start = 0
    for stop in range(1, len(tile_index) + 1):
        is_gap = stop < len(tile_index) and tile_index[stop] != tile_index[stop - 1] + 1
        if is_gap or stop == len(tile_index) or stop - start == most:
            yield slice(start, stop)
            start = stop
