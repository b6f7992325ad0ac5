"""How long an encoder graph takes on each engine of this machine's CPU."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import DendsamError
from dendsam_deploy.runtimes.session import ENGINES, SessionOptions

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec

_REPEATS = 3


def time_encoder(path: Path, spec: GraphSpec) -> dict[str, float]:
    """Time an encoder graph on one tile.

    Parameters
    ----------
    path : Path
        The ONNX file.
    spec : GraphSpec
        Its tensors.

    Returns
    -------
    dict
        Median seconds by engine, after one call to warm up. Engines that do not work here are missing.
    """
    side = spec.inputs[0].shape[1]
    assert isinstance(side, int), "the contract fixes the side of tiles"
    tile = np.random.default_rng(0).integers(0, 256, (1, side, side), dtype=np.uint8)
    inputs: dict[str, NDArray[np.generic]] = {"tiles": tile, "sizes": np.array([[side, side]], np.int64)}
    seconds = {}
    for engine, make in ENGINES.items():
        samples = []
        try:
            with make(path, spec, SessionOptions(engine, "cpu")) as runner:
                for _ in range(1 + _REPEATS):
                    started = time.perf_counter()
                    runner.run(inputs)
                    samples.append(time.perf_counter() - started)
        except DendsamError:
            continue
        seconds[engine] = statistics.median(samples[1:])
    return seconds
