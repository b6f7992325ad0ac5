"""Memory, streams and recorded work of an NVIDIA GPU; the home of ``cuda``."""

from __future__ import annotations

import re
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.errors import MissingCapabilityError
from dendsam_deploy.runtimes.foreign_memory import address_of, view_of_memory

try:
    from cuda.bindings import runtime
except (ImportError, OSError) as error:  # also where the library of CUDA itself is missing
    raise MissingCapabilityError(
        f"the package cuda-python does not load ({error}); run: pip install 'dendsam-deploy[tensorrt]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import DTypeLike, NDArray

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")

# A thread that sleeps wakes up late. Short work is therefore waited for awake, and long work asleep.
_AWAKE_S = 0.002
_POLL_S = 0.0001


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process can use.

    Parameters
    ----------
    index : int
        Its number.
    name : str
        Such as ``NVIDIA H200``.
    compute_capability : str
        Such as ``9.0``.
    memory_bytes : int
        Size of its memory.
    driver : str
        Version of the driver, and of CUDA that it serves.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    driver: str


def open_gpu(index: int) -> Gpu:
    """Make a GPU the current one of this thread and describe it.

    Raises
    ------
    MissingCapabilityError
        Where there is no such GPU, or its driver is missing or too old.
    """
    (count,) = _checked(_first_call(runtime.cudaGetDeviceCount), "looking for NVIDIA GPUs")
    if index >= count:
        raise MissingCapabilityError(f"device cuda:{index}: there are {count} NVIDIA GPUs here, counted from 0")
    select_gpu(index)
    (facts,) = _checked(runtime.cudaGetDeviceProperties(index), f"asking GPU {index} for its properties")
    (cuda_version,) = _checked(runtime.cudaDriverGetVersion(), "asking for the version of the driver")
    try:
        module = _KERNEL_MODULE.read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, or a container that hides it
        module = ""
    return Gpu(
        index=index,
        name=_text(facts.name),
        compute_capability=f"{facts.major}.{facts.minor}",
        memory_bytes=int(facts.totalGlobalMem),
        driver=driver_version(module, int(cuda_version)),
    )


def driver_version(kernel_module: str, cuda_version: int) -> str:
    """Write the version of a driver.

    Parameters
    ----------
    kernel_module : str
        Text of ``/proc/driver/nvidia/version``; may be empty.
    cuda_version : int
        1000 x major + 10 x minor.

    Examples
    --------
    >>> driver_version("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build", 13000)
    '580.82.07 (CUDA 13.0)'
    >>> driver_version("", 12080)
    'CUDA 12.8'
    """
    cuda = f"CUDA {cuda_version // 1000}.{cuda_version % 1000 // 10}"
    found = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", kernel_module, re.MULTILINE)
    return f"{found[1]} ({cuda})" if found else cuda


def select_gpu(index: int) -> None:
    """Make a GPU the current one of the calling thread; every thread starts with GPU 0."""
    _checked(_first_call(runtime.cudaSetDevice, index), f"choosing GPU {index}")


class Block:
    """Memory of a GPU, or of the host for copies to it, given back when nobody refers to it any more.

    Parameters
    ----------
    nbytes : int
        Its size, at least 1.
    gpu : int
        Number of the GPU, whichever is the calling thread's current one.
    on_host : bool
        Whether it is host memory that the GPU reads and writes directly.

    Raises
    ------
    MissingCapabilityError
        Where there is not so much.
    """

    def __init__(self, nbytes: int, gpu: int = 0, *, on_host: bool = False) -> None:
        self.nbytes, self.gpu = nbytes, gpu
        where = "the host" if on_host else f"GPU {gpu}"
        select_gpu(gpu)
        result = runtime.cudaHostAlloc(nbytes, runtime.cudaHostAllocDefault) if on_host else runtime.cudaMalloc(nbytes)
        (address,) = _checked(result, f"reserving {nbytes / 2**20:.1f} MiB on {where}")
        self.address = int(address)
        self._release = weakref.finalize(self, runtime.cudaFreeHost if on_host else runtime.cudaFree, self.address)
        self._release.atexit = False  # the system takes everything back, and the driver may be gone by then

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic]:
        """Return host memory as an array that starts at its beginning and keeps it alive."""
        return view_of_memory(self, self.address, shape, dtype)

    def abandon(self) -> None:
        """Never give it back: a GPU that hangs would make this process hang as well."""
        self._release.detach()


class GrowingBlock:
    """A block that is replaced by a larger one when more room is needed.

    Parameters
    ----------
    gpu, on_host
        As for `Block`.
    """

    def __init__(self, gpu: int = 0, *, on_host: bool = False) -> None:
        self._gpu, self._on_host = gpu, on_host
        self._block: Block | None = None

    def reserve(self, nbytes: int) -> tuple[Block, bool]:
        """Return a block of at least that size, and whether it is another one than before; it is empty then."""
        if self._block is not None and self._block.nbytes >= nbytes:
            return self._block, False
        wanted = max(nbytes, 1 if self._block is None else 2 * self._block.nbytes)
        self._block = None  # the old one first: both may not fit
        try:
            self._block = Block(wanted, self._gpu, on_host=self._on_host)
        except MissingCapabilityError:
            if wanted == nbytes:
                raise
            self._block = Block(nbytes, self._gpu, on_host=self._on_host)  # then without room to grow
        return self._block, True


class DeviceTensor:
    """A C-contiguous tensor in a GPU's memory.

    Parameters
    ----------
    block : Block
        The memory, which the tensor keeps alive.
    shape : tuple of int
        Its shape.
    dtype : dtype
        Type of its elements.
    offset : int
        Byte of the block at which it begins.
    """

    def __init__(self, block: Block, shape: tuple[int, ...], dtype: DTypeLike, offset: int = 0) -> None:
        self.block = block
        self.shape = shape
        self.dtype: np.dtype[np.generic] = np.dtype(dtype)
        self._offset = offset

    @property
    def device(self) -> str:
        """Device that holds it."""
        return f"cuda:{self.block.gpu}"

    @property
    def address(self) -> int:
        """Address of its first byte."""
        return self.block.address + self._offset

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> DeviceTensor:
        """Return consecutive rows of the first axis, which share this tensor's memory."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows of a tensor on a GPU are consecutive, not every {step}th")
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        shape = (max(0, stop - start), *self.shape[1:])
        return DeviceTensor(self.block, shape, self.dtype, self._offset + start * row_bytes)

    def numpy(self) -> NDArray[np.generic]:
        """Return a copy in the memory of the host."""
        copy: NDArray[np.generic] = np.empty(self.shape, self.dtype)
        if self.nbytes:
            kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
            _checked(runtime.cudaMemcpy(address_of(copy), self.address, self.nbytes, kind), "copying from the GPU")
        return copy


class Stream:
    """Work that a GPU does in order, beside that of other streams.

    Parameters
    ----------
    gpu : int
        Number of the GPU.
    """

    def __init__(self, gpu: int = 0) -> None:
        select_gpu(gpu)
        (stream,) = _checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking), "making a stream")
        (event,) = _checked(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming), "making an event")
        self.handle = int(stream)
        self._stream, self._event = stream, event
        self._release = weakref.finalize(self, _destroy_stream, stream, event)
        self._release.atexit = False

    def upload(self, target: int, source: NDArray[np.generic]) -> None:
        """Copy a contiguous array to the GPU; it must not change before `wait`."""
        self._copy(target, address_of(source), source.nbytes, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, target: NDArray[np.generic], source: int) -> None:
        """Copy from the GPU into a contiguous array; it holds the values after `wait`."""
        self._copy(address_of(target), source, target.nbytes, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def move(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the GPU."""
        self._copy(target, source, nbytes, runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def clear(self, target: int, nbytes: int) -> None:
        """Set memory of the GPU to zero."""
        if nbytes:
            _checked(runtime.cudaMemsetAsync(target, 0, nbytes, self._stream), "clearing memory")

    def record(self, work: Callable[[], None]) -> RecordedWork | None:
        """Let a function put work on this stream without doing it, and keep it for `RecordedWork.replay`.

        Returns
        -------
        RecordedWork or None
            None where the work cannot be recorded, for example because it waits for the GPU in between.
        """
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked(runtime.cudaStreamBeginCapture(self._stream, mode), "beginning to record")
        refused: MissingCapabilityError | None = None
        try:
            work()
        except MissingCapabilityError as error:
            refused = error
        finally:
            status, graph = runtime.cudaStreamEndCapture(self._stream)  # whatever happened, recording must end
        if refused is not None or status != runtime.cudaError_t.cudaSuccess:
            runtime.cudaGetLastError()  # it is reported once more to the next call otherwise
            if status == runtime.cudaError_t.cudaSuccess:
                runtime.cudaGraphDestroy(graph)
            return None
        try:
            (executable,) = _checked(runtime.cudaGraphInstantiate(graph, 0), "preparing recorded work")
        finally:
            runtime.cudaGraphDestroy(graph)
        return RecordedWork(executable, self._stream)

    def wait(self, limit_s: float) -> None:
        """Wait until everything on the stream is done.

        Raises
        ------
        MissingCapabilityError
            Where the GPU fails, or does not answer in time.
        """
        _checked(runtime.cudaEventRecord(self._event, self._stream), "marking the end of the work")
        started = time.monotonic()
        while (status := runtime.cudaEventQuery(self._event)[0]) == runtime.cudaError_t.cudaErrorNotReady:
            elapsed = time.monotonic() - started
            if elapsed > limit_s:
                raise GpuHangError(
                    f"the GPU did not answer within {limit_s:.0f} s; see `nvidia-smi`, and run the same command again"
                )
            if elapsed > _AWAKE_S:
                time.sleep(_POLL_S)
        _checked((status,), "computing")

    def _copy(self, target: int, source: int, nbytes: int, kind: object) -> None:
        if nbytes:
            _checked(runtime.cudaMemcpyAsync(target, source, nbytes, kind, self._stream), "copying")


class RecordedWork:
    """Work that a GPU repeats at one command, on the memory with which it was recorded. Made by `Stream.record`."""

    def __init__(self, executable: object, stream: object) -> None:
        self._executable, self._stream = executable, stream
        self._release = weakref.finalize(self, runtime.cudaGraphExecDestroy, executable)
        self._release.atexit = False

    def replay(self) -> None:
        """Put the work on the stream that it was recorded from."""
        _checked(runtime.cudaGraphLaunch(self._executable, self._stream), "replaying recorded work")


class GpuHangError(MissingCapabilityError):
    """A GPU did not answer in time; what it holds cannot be given back."""


def _destroy_stream(stream: object, event: object) -> None:
    with suppress(RuntimeError):  # the binding's own, where its library was unloaded
        runtime.cudaEventDestroy(event)
        runtime.cudaStreamDestroy(stream)


def _first_call(function: Callable[..., tuple[Any, ...]], *arguments: int) -> tuple[Any, ...]:
    """Call what may be the first function of all, which loads the driver.

    Raises
    ------
    MissingCapabilityError
        Where there is none and the binding does not report it by a status, as that for CUDA 12 does not.
    """
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise MissingCapabilityError(
            f"no NVIDIA driver is to be found ({error}), and so there are 0 NVIDIA GPUs here; install it, or choose "
            "--device cpu"
        ) from error


def _checked(result: tuple[Any, ...], doing: str) -> tuple[Any, ...]:
    """Return what a call gave besides its status.

    Raises
    ------
    MissingCapabilityError
        Where the status is an error; names it and what was being done.
    """
    status, *values = result
    if status != runtime.cudaError_t.cudaSuccess:
        name, text = (_text(function(status)[1]) for function in (runtime.cudaGetErrorName, runtime.cudaGetErrorString))
        raise MissingCapabilityError(
            f"CUDA failed while {doing}: {text} ({name}); free memory of the GPU, check its driver with `nvidia-smi`, "
            "or choose --device cpu"
        )
    return tuple(values)


def _text(value: bytes | str) -> str:
    """Return text of the binding, which may be bytes that end with zeros."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return text.split("\0", maxsplit=1)[0]
