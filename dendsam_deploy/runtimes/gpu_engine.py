"""TensorRT on NVIDIA GPUs: graphs compiled for the very GPU that runs them, once, and kept in the bundle."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import BundleError
from dendsam_deploy.progress import ProgressCallback, no_progress
from dendsam_deploy.runtimes.gpu_engine_build import BUILD_SETTINGS, BuildOptions, engine_from_onnx
from dendsam_deploy.runtimes.gpu_engine_cache import EngineCache, EngineIdentity
from dendsam_deploy.runtimes.gpu_engine_execution import EngineExecution, LoadOptions
from dendsam_deploy.runtimes.gpu_engine_library import tensorrt_version
from dendsam_deploy.runtimes.gpu_engine_plan import (
    MOST_BOXES,
    MOST_TILES,
    batch_size,
    empty_outputs,
    gpu_index,
    make_profiles,
    split_calls,
)
from dendsam_deploy.runtimes.gpu_memory import DeviceTensor, GpuHangError, open_gpu
from dendsam_deploy.runtimes.runner import (
    check_inputs,
    check_residents,
    check_room,
    not_open,
    own_resident,
    shape_of_rows,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec
    from dendsam_deploy.runtimes.gpu_engine_cache import BuiltEngine, StoredEngine
    from dendsam_deploy.runtimes.gpu_memory import Gpu
    from dendsam_deploy.runtimes.runner import Resident, Tensor

ENGINE = "tensorrt"
"""Name of this engine, as on the command line."""

_LARGEST_WORKSPACE_BYTES = 8 * 2**30


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a graph is compiled and executed.

    Parameters
    ----------
    device : str
        ``auto``, ``cuda`` or ``cuda:N``.
    trusted : tuple of str
        SHA-256 of compiled engines that may be loaded although somebody else made them.
    progress : callable
        Told how far a compilation is.
    is_recording : bool
        Whether shapes that return are recorded and replayed at one command (CUDA graphs).
    time_limit_s : float
        A call that takes longer has failed.
    """

    device: str = "auto"
    trusted: tuple[str, ...] = ()
    progress: ProgressCallback = no_progress
    is_recording: bool = True
    time_limit_s: float = 300.0


class EngineRunner:
    """A graph of a bundle on TensorRT; compiled when it is entered for the first time on a machine, then only loaded.

    Outputs are borrowed: the next call overwrites them. Batches of any size are accepted.

    Parameters
    ----------
    path : Path
        The ONNX file. Compiled engines are kept beside it in ``engines/``.
    spec : GraphSpec
        What the manifest says about it.
    options : EngineOptions
        How to compile and execute it.

    Raises
    ------
    MissingCapabilityError
        For the CPU.
    InvalidArgumentError
        For a device that has another name, or a trusted digest that is none.
    """

    engine = ENGINE
    borrows_outputs = True

    def __init__(self, path: Path, spec: GraphSpec, options: EngineOptions | None = None) -> None:
        self._options = options or EngineOptions()
        self._gpu = gpu_index(self._options.device)
        self.spec = spec
        self.device = f"cuda:{self._gpu}"
        self._path = path
        self._profiles = make_profiles(spec)
        self._cache = EngineCache(path.parent, self._options.trusted)
        self._stored: StoredEngine | None = None
        self._digest: str | None = None
        self._execution: EngineExecution | None = None

    @property
    def rows_per_call(self) -> int:
        """Tiles, or boxes for the decoder, of one execution; larger batches are cut."""
        return MOST_BOXES if self.spec.role == "decoder" else MOST_TILES

    @property
    def stored(self) -> StoredEngine:
        """The compiled engine: its digest, whether it is new, and how many of its attentions are fused."""
        if self._stored is None:
            raise not_open(self._path)
        return self._stored

    @property
    def compiled_sha256(self) -> str | None:
        """Digest of the compiled engine that was opened last; None before the first time."""
        return self._digest

    @property
    def recordings(self) -> int:
        """Number of shapes that are replayed by now."""
        return self._opened().recordings

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
        """Execute the graph and bring its outputs down; see `runner.ResidentRunner`."""
        execution = self._opened()
        self._check(inputs)
        count = batch_size(inputs, self.spec)
        if count == 0:
            return empty_outputs(inputs, self.spec, execution.stated_shapes())
        whole: dict[str, NDArray[np.generic]] = {}
        for call in split_calls(inputs, self.spec):
            part = execution.bring_down(execution.execute(call))
            if np.array_equal(call.rows, np.arange(count)):
                return part
            for name, values in part.items():
                whole.setdefault(name, np.empty((count, *values.shape[1:]), values.dtype))[call.rows] = values
        return whole

    def run_into(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Resident]) -> None:
        """Execute the graph and leave its outputs on the GPU; see `runner.ResidentRunner`."""
        execution = self._opened()
        check_room(outputs, self.spec, self._check(inputs), str(self._path))
        room = {name: own_resident(tensor, DeviceTensor, self, name) for name, tensor in outputs.items()}
        if batch_size(inputs, self.spec) == 0:
            return
        for call in split_calls(inputs, self.spec):
            for name, values in execution.execute(call).items():
                for place, row in _runs(call.rows):
                    execution.copy_rows(room[name][place], values[row])
            execution.wait()

    def upload(self, array: NDArray[np.generic]) -> DeviceTensor:
        """Copy an array to the GPU, for this runner and for others on the same one."""
        return self._opened().upload(array)

    def allocate(self, output: str, rows: int) -> DeviceTensor:
        """Return room on the GPU for an output of that many rows; see `runner.ResidentRunner`."""
        return self._opened().allocate(*shape_of_rows(self.spec, output, rows, str(self._path)))

    def __enter__(self) -> Self:
        gpu = open_gpu(self._gpu)
        identity = self._identity(gpu)
        stored = self._cache.obtain(identity, lambda: self._build(identity, gpu))
        load = LoadOptions(self._profiles, self._gpu, self._options.time_limit_s, self._options.is_recording)
        self._execution = EngineExecution(stored.built.plan, self._path, self.spec, load)
        self._stored, self._digest = stored, stored.sha256
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._execution is not None and isinstance(error, GpuHangError):
            self._execution.abandon()  # it was perhaps another graph on the same GPU that it did not answer to
        self._execution = None
        self._stored = None

    def _build(self, identity: EngineIdentity, gpu: Gpu) -> BuiltEngine:
        """Compile the graph."""
        options = BuildOptions(
            profiles=self._profiles,
            workspace_bytes=min(_LARGEST_WORKSPACE_BYTES, gpu.memory_bytes // 2),
            timings=self._cache.timing_data(identity),
        )
        build = engine_from_onnx(self._path, options, self._options.progress)
        self._cache.keep_timing_data(identity, build.timings)
        return build.engine

    def _identity(self, gpu: Gpu) -> EngineIdentity:
        """Return what the compiled engine must be for."""
        return EngineIdentity(
            role=self.spec.role,
            precision=self.spec.precision,
            graph_sha256=tuple(file.sha256 for file in self.spec.files) or (_digest(self._path),),
            gpu=gpu.name,
            compute_capability=gpu.compute_capability,
            driver=gpu.driver,
            compiler=f"{ENGINE} {tensorrt_version()}",
            profiles=json.dumps([profile.to_document() for profile in self._profiles], sort_keys=True),
            host=f"{platform.system()} {platform.machine()}",
            settings=BUILD_SETTINGS,
        )

    def _opened(self) -> EngineExecution:
        """Return what executes the graph."""
        if self._execution is None or self._stored is None:
            raise not_open(self._path)
        return self._execution

    def _check(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """Raise unless inputs are the contract's, and residents this GPU's; returns the lengths of free axes."""
        lengths = check_inputs(inputs, self.spec, str(self._path))
        check_residents(inputs, DeviceTensor, self)
        return lengths


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); export the bundle again") from error


def _runs(rows: NDArray[np.intp]) -> list[tuple[slice, slice]]:
    """Cut ascending row numbers into runs without gaps: (rows of the whole, rows of the part)."""
    starts = [0, *(np.nonzero(np.diff(rows) != 1)[0] + 1).tolist(), len(rows)]
    return [(slice(int(rows[a]), int(rows[b - 1]) + 1), slice(a, b)) for a, b in pairwise(starts)]
