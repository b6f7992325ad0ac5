"""Does an engine work here? It is not asked whether it is installed but made to run a graph."""

from __future__ import annotations

import base64
import ctypes
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.bundle.manifest import GraphSpec, TensorSpec
from dendsam_deploy.errors import DendsamError

if TYPE_CHECKING:
    from dendsam_deploy.runtimes.session import RunnerMaker, SessionOptions

NO_DRIVER = "no NVIDIA driver found"
"""Why nothing runs on a GPU that is not there."""

# One Identity node from x to y, float32 of shape (1,), opset 17; made with onnx.helper.make_model.
PROBE_GRAPH = base64.b64decode(
    "CAgSADo7ChAKAXgSAXkiCElkZW50aXR5EgVwcm9iZVoPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBE="
)
_PROBE = GraphSpec(
    role="encoder",
    precision="fp32",
    opset=17,
    files=(),
    inputs=(TensorSpec("x", "float32", (1,)),),
    outputs=(TensorSpec("y", "float32", (1,)),),
)


def why_not(maker: RunnerMaker, device: str, options: SessionOptions) -> str | None:
    """Return why an engine cannot run a graph on a device of this machine; None where it can.

    Parameters
    ----------
    maker : callable
        Makes the engine's runners.
    device : str
        ``cpu`` or ``cuda:N``.
    options : SessionOptions
        Its device is not looked at.
    """
    if device != "cpu" and not has_nvidia_driver():
        return NO_DRIVER
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "probe.onnx")
        graph.write_bytes(PROBE_GRAPH)
        try:
            with maker(graph, _PROBE, replace(options, device=device)) as runner:
                runner.run({"x": np.ones(1, np.float32)})
        except DendsamError as error:
            return str(error)
    return None


def has_nvidia_driver() -> bool:
    """Tell whether the library of the NVIDIA driver can be loaded."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
