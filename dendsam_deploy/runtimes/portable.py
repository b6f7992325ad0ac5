"""The engine that every installation has: ONNX Runtime, on the CPU and, where its CUDA provider loads, on a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from dendsam_deploy.errors import BundleError, InputFileError, InvalidArgumentError, MissingCapabilityError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec

ENGINE = "onnxruntime"
"""Name of this engine, as on the command line."""

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_FATAL_ONLY = 4

# The binding derives its exceptions from Exception alone, so they have to be listed.
_LOAD_ERRORS = (
    native.Fail,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotFound,
    native.NotImplemented,
    native.ModelRequiresCompilation,
    native.InvalidArgument,
    native.RuntimeException,
)
_RUN_ERRORS = (native.Fail, native.RuntimeException, native.EPFail, native.EngineError, native.DeviceReset, MemoryError)


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """Where a graph is executed.

    Parameters
    ----------
    device : str
        ``cpu``, ``cuda`` or ``cuda:N``.
    threads : int or None
        Threads of one operator on the CPU; None takes one per physical core.
    """

    device: str = "cpu"
    threads: int | None = None


def graph_signature(path: Path) -> dict[str, list[dict[str, object]]]:
    """Return name, type and shape of the inputs and outputs of any ONNX file, as plain values.

    Raises
    ------
    InputFileError
        If ONNX Runtime cannot load the file.
    """
    try:
        session = onnxruntime.InferenceSession(path, sess_options=_session_options(1), providers=[_CPU])
    except _LOAD_ERRORS as error:
        raise InputFileError(f"{path}: cannot be read as an ONNX graph ({_line(error)})") from error
    return {
        side: [{"name": value.name, "type": value.type, "shape": list(value.shape)} for value in values]
        for side, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    }


class OnnxRunner:
    """A graph of a bundle on ONNX Runtime; it takes memory when it is entered and gives it back when it is left.

    Parameters
    ----------
    path : Path
        The ONNX file.
    spec : GraphSpec
        What the manifest says about it.
    options : RunnerOptions
        Where to execute it.

    Raises
    ------
    InvalidArgumentError
        For a device that has another name.
    MissingCapabilityError
        Where the installed ONNX Runtime does not offer the device.
    """

    engine = ENGINE
    borrows_outputs = False

    def __init__(self, path: Path, spec: GraphSpec, options: RunnerOptions) -> None:
        self.spec = spec
        self.device = canonical_device(options.device)
        self._path = path
        self._threads = options.threads
        self._session: onnxruntime.InferenceSession | None = None

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Execute the graph once on C-contiguous arrays of exactly the dtypes and shapes of `spec`.

        Raises
        ------
        InvalidArgumentError
            Where an input is missing or of another dtype or shape, or the runner was not entered.
        MissingCapabilityError
            Where the machine gives up during the execution, for example for lack of memory.
        """
        if self._session is None:
            raise InvalidArgumentError(f"{self._path}: the runner is not open; use it in a `with` block")
        names = [output.name for output in self.spec.outputs]
        try:
            return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        except (native.InvalidArgument, ValueError) as error:
            raise InvalidArgumentError(f"{self._path}: an input does not fit the graph ({_line(error)})") from error
        except _RUN_ERRORS as error:
            raise MissingCapabilityError(
                f"{self._path}: failed on {self.device} ({_line(error)}); free memory or choose another device"
            ) from error

    def __enter__(self) -> Self:
        try:
            session = onnxruntime.InferenceSession(
                self._path, sess_options=_session_options(self._threads), providers=_providers(self.device)
            )
        except _LOAD_ERRORS as error:
            raise BundleError(
                f"{self._path}: ONNX Runtime {onnxruntime.__version__} cannot load the graph ({_line(error)}); "
                "export the bundle again or update onnxruntime"
            ) from error
        _check_provider(session.get_providers(), self.device)
        self._session = session
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session = None


def canonical_device(device: str) -> str:
    """Return ``cpu`` or ``cuda:N`` for a device that the installed ONNX Runtime offers.

    Raises
    ------
    InvalidArgumentError
        For any other spelling.
    MissingCapabilityError
        Where a GPU is asked for and there is no CUDA provider.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise InvalidArgumentError(f"device {device!r} is unknown; choose cpu, cuda or cuda:N")
    if device == "cpu":
        return device
    if _CUDA not in onnxruntime.get_available_providers():
        raise MissingCapabilityError(
            f"device {device}: this ONNX Runtime {onnxruntime.__version__} has no CUDA provider; "
            "install onnxruntime-gpu[cuda,cudnn] in place of onnxruntime, or choose --device cpu"
        )
    return f"cuda:{int(match[1] or 0)}"


def _providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """Return the provider chain of a device; the CPU is always last because some shape arithmetic runs nowhere else."""
    if device == "cpu":
        return [(_CPU, {})]
    onnxruntime.preload_dlls()
    index = device.removeprefix("cuda:")
    return [(_CUDA, {"device_id": index, "arena_extend_strategy": "kSameAsRequested"}), (_CPU, {})]


def _check_provider(have: list[str], device: str) -> None:
    """Raise where ONNX Runtime dropped the provider that was asked for, which it does without an error of its own."""
    if device != "cpu" and _CUDA not in have:
        raise MissingCapabilityError(
            f"device {device}: the CUDA provider did not load (only {', '.join(have)} did); "
            "its CUDA or cuDNN libraries do not match: run `dendsam-deploy doctor`, or choose --device cpu"
        )


def _session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Return options that keep memory flat and results reproducible."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY  # errors reach the user as exceptions, once
    options.intra_op_num_threads = threads or 0
    # Memory patterns make the arena reserve the peak of every shape it meets, beside what it holds already: ViT-B's
    # encoder then takes 4.1 GB and not 2.5. Without any arena each tensor is mapped anew, at twice the time.
    options.enable_mem_pattern = False
    options.use_deterministic_compute = True
    # Three graphs take turns: threads of one that waits must not spin on the cores of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _line(error: BaseException) -> str:
    """Return an exception's message as one line."""
    return " ".join((str(error) or type(error).__name__).split())
