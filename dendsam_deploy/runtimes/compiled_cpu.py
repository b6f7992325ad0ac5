"""OpenVINO on the CPU: compiles the same ONNX files for the instruction set at hand, bf16 where it has that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes.runner import check_inputs, gpu_of, line_of, not_open

try:
    import openvino
except (ImportError, OSError) as error:  # also where a shared library of the package is missing
    raise MissingCapabilityError(
        f"engine openvino: the package does not load ({error}); run: pip install 'dendsam-deploy[openvino]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec, Precision

ENGINE = "openvino"
"""Name of this engine, as on the command line."""

_ARITHMETIC: Mapping[Precision, str] = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}
"""What a CPU computes a graph in: it has bf16 instructions or emulates them in f32, and none for fp16 that pay. What is
quantised inside an int8 graph is computed in int8 whatever this says."""


class CompiledRunner:
    """A graph of a bundle on OpenVINO; compiled when it is entered, freed when it is left.

    Parameters
    ----------
    path : Path
        The ONNX file.
    spec : GraphSpec
        What the manifest says about it.
    device : str
        ``auto`` or ``cpu``.
    threads : int or None
        Threads of one operator; None takes one per physical core.

    Raises
    ------
    MissingCapabilityError
        For a GPU: this engine is for CPUs.
    InvalidArgumentError
        For a device that does not exist.
    """

    engine = ENGINE
    device = "cpu"
    borrows_outputs = True

    def __init__(self, path: Path, spec: GraphSpec, device: str = "cpu", threads: int | None = None) -> None:
        if device != "auto" and gpu_of(device) is not None:
            raise MissingCapabilityError(f"device {device}: the engine openvino runs on CPUs; choose --device cpu")
        self.spec = spec
        self._path = path
        self._threads = threads
        self._request: openvino.InferRequest | None = None

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Execute the graph once; see `runner.Runner`."""
        if self._request is None:
            raise not_open(self._path)
        check_inputs(inputs, self.spec, str(self._path))  # OpenVINO would cast what has another dtype
        try:
            outputs = self._request.infer(dict(inputs), share_inputs=True, share_outputs=True)
        except MemoryError as error:
            raise MissingCapabilityError(
                f"{self._path}: failed on the CPU (out of memory); free memory or choose another engine"
            ) from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise InvalidArgumentError(f"{self._path}: an input does not fit the graph ({line_of(error)})") from error
        return {tensor.name: outputs[tensor.name] for tensor in self.spec.outputs}

    def __enter__(self) -> Self:
        core = openvino.Core()
        settings: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": _ARITHMETIC[self.spec.precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if self._threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._threads
        try:
            self._request = core.compile_model(str(self._path), "CPU", settings).create_infer_request()
        except (RuntimeError, ValueError) as error:
            raise BundleError(
                f"{self._path}: OpenVINO {openvino.__version__} cannot load the graph ({line_of(error)}); "
                "export the bundle again, update openvino, or choose --engine onnxruntime"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._request = None
