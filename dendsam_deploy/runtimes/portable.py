"""The engine that every installation has: ONNX Runtime, on the CPU and, where its provider loads, on a GPU."""

from __future__ import annotations

import ctypes
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dendsam_deploy.errors import BundleError, InputFileError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes.runner import gpu_of, line_of, not_open

try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as native
except (ImportError, OSError) as error:  # also where a shared library of the package is missing
    raise MissingCapabilityError(
        f"engine onnxruntime: the package does not load ({error}); run: pip install --force-reinstall onnxruntime, or "
        "onnxruntime-gpu[cuda,cudnn] in its place where there is an NVIDIA GPU"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec, Precision

ENGINE = "onnxruntime"
"""Name of this engine, as on the command line."""

Provider = Literal["cuda", "tensorrt"]
"""What executes graphs on a GPU."""

_CPU = "CPUExecutionProvider"
_PROVIDERS: Mapping[Provider, str] = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_TITLES: Mapping[Provider, str] = {"cuda": "CUDA", "tensorrt": "TensorRT"}
_FATAL_ONLY = 4

_HEAVY = frozenset({
    "Attention", "Conv", "ConvTranspose", "Einsum", "Erf", "Gelu", "Gemm", "LayerNormalization", "MatMul", "MaxPool",
    "MultiHeadAttention", "Resize", "Sigmoid", "Softmax",
})  # fmt: skip
"""Operators that a GPU must not leave to the CPU. The arithmetic of shapes belongs there, and takes no time."""

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
_RUN_ERRORS = (
    native.Fail,
    native.RuntimeException,
    native.EPFail,
    native.EngineError,
    native.DeviceReset,
    MemoryError,
    RuntimeError,  # what bindings make of any of the others
)


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """Where a graph is executed.

    Parameters
    ----------
    device : str
        ``cpu``, ``cuda`` or ``cuda:N``.
    threads : int or None
        Threads of one operator on the CPU; None takes one per physical core.
    provider : {"cuda", "tensorrt"}
        What executes it on a GPU. TensorRT plans each graph anew whenever it is loaded, which takes minutes.
    """

    device: str = "cpu"
    threads: int | None = None
    provider: Provider = "cuda"


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
        raise InputFileError(f"{path}: cannot be read as an ONNX graph ({line_of(error)})") from error
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

    borrows_outputs = False

    def __init__(self, path: Path, spec: GraphSpec, options: RunnerOptions) -> None:
        self.spec = spec
        self.device = canonical_device(options.device, options.provider)
        self._path = path
        self._options = options
        self._session: onnxruntime.InferenceSession | None = None

    @property
    def engine(self) -> str:
        """Name of the engine, with that of the provider where it is not the usual one."""
        is_usual = self.device == "cpu" or self._options.provider == "cuda"
        return ENGINE if is_usual else f"{ENGINE}+{self._options.provider}"

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Execute the graph once; see `runner.Runner`."""
        session = self._open_session()
        names = [output.name for output in self.spec.outputs]
        with self._guarded():
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def __enter__(self) -> Self:
        options = _session_options(self._options.threads)
        try:
            session = onnxruntime.InferenceSession(
                self._path,
                sess_options=options,
                providers=_providers(self.device, self._options.provider, self.spec.precision),
                enable_fallback=0,  # it would print a notice and go on with the CPU
            )
        except (native.EPFail, RuntimeError, *_LOAD_ERRORS) as error:
            if isinstance(error, native.EPFail | RuntimeError) or is_about_the_gpu(str(error)):
                raise MissingCapabilityError(
                    f"{self._path}: ONNX Runtime {onnxruntime.__version__} cannot use {self.device} "
                    f"({line_of(error)}); run `dendsam-deploy doctor`, or choose another device"
                ) from error
            raise BundleError(
                f"{self._path}: ONNX Runtime {onnxruntime.__version__} cannot load the graph ({line_of(error)}); "
                "export the bundle again or update onnxruntime"
            ) from error
        if self.device != "cpu":
            _check_provider(session.get_providers(), self.device, self._options.provider)
            _check_placement(session, self._path, self._options.provider)
        self._session = session
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session = None

    def _open_session(self) -> onnxruntime.InferenceSession:
        """Return the session of a runner that was entered."""
        if self._session is None:
            raise not_open(self._path)
        return self._session

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Translate the exceptions of an execution."""
        try:
            yield
        except (native.InvalidArgument, ValueError) as error:
            raise InvalidArgumentError(f"{self._path}: an input does not fit the graph ({line_of(error)})") from error
        except _RUN_ERRORS as error:
            raise MissingCapabilityError(
                f"{self._path}: failed on {self.device} ({line_of(error)}); free memory or choose another device"
            ) from error


def canonical_device(device: str, provider: Provider = "cuda") -> str:
    """Return ``cpu`` or ``cuda:N`` for a device that the installed ONNX Runtime offers.

    Raises
    ------
    InvalidArgumentError
        For any other spelling.
    MissingCapabilityError
        Where a GPU is asked for and there is no provider for it.
    """
    gpu = gpu_of(device)
    if gpu is None:
        return device
    if _PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise MissingCapabilityError(
            f"device {device}: this ONNX Runtime {onnxruntime.__version__} has no {_TITLES[provider]} provider; "
            "install onnxruntime-gpu[cuda,cudnn] in place of onnxruntime, or choose --device cpu"
        )
    return f"cuda:{gpu}"


def _providers(device: str, provider: Provider, precision: Precision) -> list[tuple[str, dict[str, str]]]:
    """Return the provider chain of a device; the CPU is always last because some shape arithmetic runs nowhere else."""
    if device == "cpu":
        return [(_CPU, {})]
    onnxruntime.preload_dlls()
    index = {"device_id": device.removeprefix("cuda:")}
    cuda = {
        **index,
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",  # a search by trial differs from run to run
        "use_tf32": "0",  # fp32 means fp32; what may be coarser is exported at another precision
    }
    chain = [(_PROVIDERS["cuda"], cuda), (_CPU, {})]
    if provider == "cuda":
        return chain
    # The precision stands in the graph, but this provider declares it to TensorRT a second time.
    typed = {} if precision == "fp32" else {f"trt_{precision}_enable": "1"}
    return [(_PROVIDERS["tensorrt"], index | typed), *chain]


def _check_provider(have: Sequence[str], device: str, provider: Provider) -> None:
    """Raise where ONNX Runtime dropped the provider that was asked for, which it does without an error of its own."""
    if _PROVIDERS[provider] not in have:
        raise MissingCapabilityError(
            f"device {device}: the {_TITLES[provider]} provider did not load (only {', '.join(have)} did): "
            f"{_why_not_loaded(provider)}; run `dendsam-deploy doctor`, or choose --device cpu"
        )


def _why_not_loaded(provider: Provider) -> str:
    """Name the library that a provider misses, by loading it as ONNX Runtime does."""
    for library in (Path(native.__file__).parent).glob(f"*onnxruntime_providers_{provider}.*"):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return line_of(error)
    return "its libraries do not match this ONNX Runtime"


def _check_placement(session: onnxruntime.InferenceSession, path: Path, provider: Provider) -> None:
    """Raise where the provider that was asked for left real work to another: no engine is replaced by another one."""
    if not hasattr(session, "get_provider_graph_assignment_info"):  # older than ONNX Runtime 1.24
        return
    operators: dict[str, set[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        operators.setdefault(part.ep_name, set()).update(node.op_type for node in part.get_nodes())
    if misplaced := misplaced_work(operators, provider):
        raise MissingCapabilityError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} would execute {misplaced}; "
            "choose another --precision or --engine, or update onnxruntime-gpu"
        )


def misplaced_work(operators: Mapping[str, set[str]], provider: Provider) -> str:
    """Say what a session would execute elsewhere than where it was asked to; empty where that weighs nothing.

    Parameters
    ----------
    operators : mapping
        ONNX Runtime's name of a provider -> the operators that it took.
    provider : {"cuda", "tensorrt"}
        What was asked for.

    Examples
    --------
    >>> misplaced_work({"CPUExecutionProvider": {"Shape", "Conv"}, "CUDAExecutionProvider": {"MatMul"}}, "cuda")
    'Conv on the CPU, not on the GPU'
    """
    for other in (_CPU, *_PROVIDERS.values()):
        heavy = sorted(operators.get(other, set()) & _HEAVY)
        if heavy and other != _PROVIDERS[provider]:
            where = "on the CPU, not on the GPU" if other == _CPU else f"with {other}, not with {_TITLES[provider]}"
            return f"{', '.join(heavy)} {where}"
    return ""


def is_about_the_gpu(reason: str) -> bool:
    """Tell whether ONNX Runtime refuses a graph for what a GPU lacks, not for what the graph is.

    Examples
    --------
    >>> is_about_the_gpu("CUDA failure 2: out of memory ; GPU=0"), is_about_the_gpu("Load model failed: Protobuf")
    (True, False)
    """
    words = r"\bCUDA\b|cudnn|cublas|out of memory|Failed to allocate memory"
    return re.search(words, reason, re.IGNORECASE) is not None


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
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options
