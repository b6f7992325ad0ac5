"""torch as an engine: the bundle's graphs, compiled, with fused attention, and on a GPU replayed from a recording."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.runtimes.gpu_engine_cache import EngineCache
from dendsam_deploy.runtimes.gpu_engine_plan import batch_size, split_calls
from dendsam_deploy.runtimes.runner import (
    check_inputs,
    check_residents,
    check_room,
    gpu_of,
    line_of,
    not_open,
    own_resident,
    shape_of_rows,
)

try:
    import torch

    from dendsam_deploy.runtimes.captured_attention import AttentionKernel, fuse_attention
    from dendsam_deploy.runtimes.captured_graph import Graph, read_graph
    from dendsam_deploy.runtimes.captured_package import Packages
    from dendsam_deploy.runtimes.captured_program import program_of
    from dendsam_deploy.runtimes.captured_replay import Program, Recorder, Replayed
except (ImportError, OSError) as error:  # the latter where torch misses a shared library
    raise MissingCapabilityError(
        f"engine torch: a package does not load ({error}); run: pip install 'dendsam-deploy[train]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec, Role, TensorSpec
    from dendsam_deploy.runtimes.runner import Resident, Tensor

ENGINE = "torch"
"""Name of this engine, as on the command line."""

_ROWS_PER_CALL = {"detector": 4, "encoder": 4, "decoder": 64, "points": 64}
"""Tiles and boxes that fill a GPU; more of them only take more memory."""

_GPU_STEPS: Mapping[Role, Mapping[str, tuple[int, ...]]] = {
    "detector": {"tiles": (1, 2, 4)},
    "encoder": {"tiles": (1, 2, 4)},
    "decoder": {"tiles": (4, 16), "boxes": (16, 64)},
    "points": {"tiles": (4, 16), "prompts": (16, 64)},
}
"""Lengths of axes that a GPU is given, each compiled and recorded by itself; what pads a batch costs little there.
Batches that are longer than the last are cut."""


@dataclass(frozen=True, slots=True)
class CapturedOptions:
    """How torch executes a graph. What is None is decided by the device.

    Parameters
    ----------
    device : str
        ``cpu``, ``cuda`` or ``cuda:N``.
    threads : int or None
        Threads of one operator on the CPU; None leaves it to torch.
    is_compiled : bool or None
        Whether programs are compiled; None does so on a GPU. It takes up to a minute for each shape.
    attention : str or None
        How attention with relative position is computed, ``in_kernel`` or ``widened``. None takes ``in_kernel`` where
        programs are compiled, and leaves it as it is in the graph elsewhere.
    is_packaged : bool
        Whether programs are compiled ahead of time and kept in the bundle's cache for later sessions.
    trusted : tuple of str
        SHA-256 of packages that may be loaded although somebody else compiled them.
    progress : callable
        Told when a program is compiled.
    """

    device: str = "cpu"
    threads: int | None = None
    is_compiled: bool | None = None
    attention: AttentionKernel | None = None
    is_packaged: bool = False
    trusted: tuple[str, ...] = ()
    progress: ProgressCallback = field(default=no_progress, compare=False, repr=False)

    @property
    def variant(self) -> str:
        """The engine's name, with what makes its results its own."""
        return f"{ENGINE}+package" if self.is_packaged else ENGINE


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """Rows of a tensor in torch's memory.

    Parameters
    ----------
    held : torch.Tensor
        The rows.
    """

    held: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.held.shape)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of its elements."""
        return np.dtype(str(self.held.dtype).removeprefix("torch."))

    @property
    def device(self) -> str:
        """Device that holds it."""
        return str(self.held.device)

    def __getitem__(self, rows: slice) -> DeviceTensor:
        """Return consecutive rows, which share this tensor's memory."""
        return DeviceTensor(self.held[rows])

    def numpy(self) -> NDArray[np.generic]:
        """Return a copy in the memory of the host."""
        return _to_host(self.held)


class CapturedRunner:
    """A graph of a bundle on torch (`runner.ResidentRunner`).

    The graph is translated for each set of shapes that it meets. So that these are few, batches are padded to round
    numbers, and the padding's results are dropped.

    Parameters
    ----------
    path : Path
        The ONNX file.
    spec : GraphSpec
        What the manifest says about it.
    options : CapturedOptions, optional
        How to execute it.

    Raises
    ------
    InvalidArgumentError
        For a device that has another name.
    MissingCapabilityError
        Where torch does not offer the device.
    """

    borrows_outputs = False

    def __init__(self, path: Path, spec: GraphSpec, options: CapturedOptions | None = None) -> None:
        self._options = options or CapturedOptions()
        self.spec = spec
        self.device = _canonical_device(self._options.device)
        self._path = path
        self._graph: Graph | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._programs: dict[tuple[object, ...], Program] = {}
        self._threads_before: int | None = None
        self._recorder: Recorder | None = None

    @property
    def engine(self) -> str:
        """Name of the engine, as on the command line."""
        return self._options.variant

    @property
    def rows_per_call(self) -> int:
        """Tiles, or boxes for the decoder, that one call should hold to keep the device busy."""
        return _ROWS_PER_CALL[self.spec.role]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
        """Execute the graph once and bring its outputs down; see `runner.ResidentRunner`."""
        check_inputs(inputs, self.spec, str(self._path))
        with self._guarded():
            return {name: _to_host(values) for name, values in self._execute(inputs).items()}

    def run_into(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Resident]) -> None:
        """Execute the graph once and leave its outputs where they are to stay; see `runner.ResidentRunner`."""
        lengths = check_inputs(inputs, self.spec, str(self._path))
        check_room(outputs, self.spec, lengths, str(self._path))
        with self._guarded():
            for name, values in self._execute(inputs).items():
                own_resident(outputs[name], DeviceTensor, self, name).held.copy_(values)
            if self.device != "cpu":
                torch.cuda.synchronize(self.device)

    def upload(self, array: NDArray[np.generic]) -> DeviceTensor:
        """Copy an array to the device; see `runner.ResidentRunner`."""
        with self._guarded():
            return DeviceTensor(_to_device(array, self.device))

    def allocate(self, output: str, rows: int) -> DeviceTensor:
        """Return room for an output of that many rows; see `runner.ResidentRunner`."""
        shape, dtype = shape_of_rows(self.spec, output, rows, str(self._path))
        with self._guarded():
            return DeviceTensor(torch.empty(shape, dtype=getattr(torch, dtype.name), device=self.device))

    def __enter__(self) -> Self:
        graph = read_graph(self._path)
        with self._guarded():
            self._weights = {name: weight.to(self.device) for name, weight in graph.weights.items()}
        if self._options.threads is not None:
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(self._options.threads)
        self._graph = graph
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._graph = None
        self._weights = {}
        self._programs = {}
        self._recorder = None
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)

    def _execute(self, inputs: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
        """Execute a batch of any size and return the outputs, still on the device.

        It is cut as far as the steps of `_GPU_STEPS` go, so that programs are few and what they hold is limited.
        """
        check_residents(inputs, DeviceTensor, self)
        steps, count = _GPU_STEPS[self.spec.role], batch_size(inputs, self.spec)
        calls = list(split_calls(inputs, self.spec, steps["tiles"][-1], self.rows_per_call))
        if len(calls) <= 1:
            return self._execute_part(calls[0].inputs if calls else inputs)
        whole: dict[str, torch.Tensor] = {}
        for call in calls:
            rows = torch.from_numpy(call.rows).to(self.device)
            for name, values in self._execute_part(call.inputs).items():
                room = whole.get(name)
                if room is None:
                    room = whole[name] = values.new_empty((count, *values.shape[1:]))
                room[rows] = values  # what a program returned is overwritten when the next one is executed
        return whole

    def _execute_part(self, inputs: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
        """Execute the graph once."""
        if self._graph is None:
            raise not_open(self._path)
        lengths = check_inputs(inputs, self.spec, str(self._path))
        padded = {axis: self._padded(axis, n) for axis, n in lengths.items()}
        given = {spec.name: self._placed(spec, inputs[spec.name], padded) for spec in self.spec.inputs}
        numbers = tuple((name, tuple(value.tolist())) for name, value in given.items() if self._is_number(name))
        key = (numbers, *sorted(padded.items()))
        tensors = tuple(given[name] for name in self._graph.inputs if not self._is_number(name))
        program = self._programs.get(key)
        if program is None:
            shapes = ", ".join(f"{length} {axis}" for axis, length in sorted(padded.items()))
            note = f"{self._path.name} for {shapes or 'its one shape'}"
            self._tell_of_compiling(self._graph, 0, note)
            program = self._programs[key] = self._prepared(self._graph, given)
            results = program(*tensors)  # torch compiles when a program is executed first
            self._tell_of_compiling(self._graph, 1, note)
        else:
            results = program(*tensors)
        made = dict(zip(self._graph.outputs, results, strict=True))
        return {spec.name: made[spec.name][: lengths.get(str(spec.shape[0]))] for spec in self.spec.outputs}

    def _prepared(self, graph: Graph, given: Mapping[str, torch.Tensor]) -> Program:
        """Translate, fuse, compile and record the graph for some shapes."""
        described = {
            name: value if self._is_number(name) else torch.empty_like(value, device="meta")
            for name, value in given.items()
        }
        program = program_of(graph, described, self._weights, torch.device(self.device))
        options, is_compiled = self._options, self._is_compiled(graph)
        attention = options.attention or ("in_kernel" if is_compiled else None)
        if attention is not None:
            fuse_attention(program, attention)
        if self._is_packaged(graph):
            # Not recorded: it is launched by native code, and nobody has promised that its memory stays in place.
            numbers = {name: value.tolist() for name, value in given.items() if self._is_number(name)}
            tensors = tuple(given[name] for name in graph.inputs if not self._is_number(name))
            packages = Packages(EngineCache(self._path.parent, options.trusted), self.spec, torch.device(self.device))
            return packages.load(program, tensors, f"{attention} {numbers}")
        made: Program = torch.compile(program, dynamic=False) if is_compiled else program
        if self.device == "cpu":
            return made
        self._recorder = self._recorder or Recorder()
        return Replayed(made, self._recorder)

    def _is_packaged(self, graph: Graph) -> bool:
        """Tell whether programs are kept; of a graph without weights there is nothing to keep."""
        return self._options.is_packaged and bool(graph.weights)

    def _is_compiled(self, graph: Graph) -> bool:
        """Tell whether programs are compiled."""
        wish = self._options.is_compiled
        return self._is_packaged(graph) or (self.device != "cpu" if wish is None else wish)

    def _tell_of_compiling(self, graph: Graph, done: int, note: str) -> None:
        """Report that a program is going to be compiled, or was."""
        if self._is_compiled(graph):
            self._options.progress(Progress("compile", done, 1, note))

    def _placed(self, spec: TensorSpec, tensor: Tensor, padded: Mapping[str, int]) -> torch.Tensor:
        """Return an input on the device, padded with zeros; numbers that decide shapes stay on the host."""
        if isinstance(tensor, np.ndarray):
            held = _to_device(tensor, "cpu" if self._is_number(spec.name) else self.device)
        else:
            held = own_resident(tensor, DeviceTensor, self, spec.name).held
        wanted = [padded[n] if isinstance(n, str) else n for n in spec.shape]
        if list(held.shape) == wanted:
            return held
        room = held.new_zeros(wanted)
        room[tuple(slice(length) for length in held.shape)] = held
        return room

    def _is_number(self, name: str) -> bool:
        """Tell whether an input is a number that programs are made for, such as the region of the decoder."""
        spec = next(spec for spec in self.spec.inputs if spec.name == name)
        return spec.dtype == "int64" and all(isinstance(length, int) for length in spec.shape)

    def _padded(self, axis: str, length: int) -> int:
        """Return the next round number; of the points of a prompt the number itself, as every one of them counts."""
        if axis == "points":
            return length
        steps = _GPU_STEPS[self.spec.role].get(axis, (1,)) if self.device != "cpu" else ()
        if not steps:
            return 1 << max(length - 1, 0).bit_length()
        return next((step for step in steps if step >= length), -(-length // steps[-1]) * steps[-1])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Compute as the graph says, without gradients and shortcuts, and translate torch's exceptions."""
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                # fp32 means fp32; what may be coarser is exported at another precision.
                stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
                if self.device != "cpu":
                    stack.enter_context(torch.cuda.device(self.device))
                yield
        except (IndexError, ValueError) as error:
            raise InvalidArgumentError(f"{self._path}: an input does not fit the graph ({line_of(error)})") from error
        except (RuntimeError, MemoryError) as error:
            raise MissingCapabilityError(
                f"{self._path}: failed on {self.device} ({line_of(error)}); free memory or choose another --engine"
            ) from error


def _canonical_device(device: str) -> str:
    """Return ``cpu`` or ``cuda:N`` for a device that torch offers."""
    index = gpu_of(device)
    if index is None:
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise MissingCapabilityError(
            f"device {device}: torch {torch.__version__} sees {count} GPUs; install a torch for the CUDA version of "
            "the driver, or choose --device cpu"
        )
    return f"cuda:{index}"


def _to_device(array: NDArray[np.generic], device: str) -> torch.Tensor:
    """Return a copy of an array on a device: to a GPU by way of page-locked memory, from which it fetches by itself."""
    if device == "cpu" or not array.size:
        return torch.tensor(array, device=device)
    # torch keeps page-locked memory for later copies, and hands it out again when this one has ended.
    locked = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name), pin_memory=True)
    locked.numpy()[...] = array
    return locked.to(device, non_blocking=True)


def _to_host(values: torch.Tensor) -> NDArray[np.generic]:
    """Return a tensor as an array of its own."""
    array: NDArray[np.generic] = values.contiguous().cpu().numpy()
    return array
