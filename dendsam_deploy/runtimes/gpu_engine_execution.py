"""A loaded TensorRT engine and everything that executes it: one stream, one place for each tensor, recorded work."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes.foreign_memory import keep_for_ever
from dendsam_deploy.runtimes.gpu_engine_library import (
    CollectingLogger,
    tensorrt,
    tensorrt_errors,
    tensorrt_version,
)
from dendsam_deploy.runtimes.gpu_engine_plan import RecordedShapes, choose_profile, execution_shapes, on_host
from dendsam_deploy.runtimes.gpu_memory import Block, DeviceTensor, GpuHangError, GrowingBlock, Stream, select_gpu

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from pathlib import Path
    from typing import SupportsInt

    from numpy.typing import DTypeLike, NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec
    from dendsam_deploy.runtimes.gpu_engine_plan import Call, Profile, Shape
    from dendsam_deploy.runtimes.gpu_memory import RecordedWork
    from dendsam_deploy.runtimes.runner import Tensor

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How an engine is executed.

    Parameters
    ----------
    profiles : tuple of Profile
        What it was compiled for.
    gpu : int
        Number of the GPU.
    time_limit_s : float
        A call that takes longer has failed.
    is_recording : bool
        Whether shapes that return are recorded and replayed at one command (CUDA graphs).
    """

    profiles: tuple[Profile, ...]
    gpu: int = 0
    time_limit_s: float = 300.0
    is_recording: bool = True


@dataclass(frozen=True, slots=True)
class _Recording:
    """Work on one shape, the context that it was recorded from, which must live as long, and what it returns."""

    work: RecordedWork
    context: tensorrt.IExecutionContext
    outputs: Mapping[str, Shape]


class EngineExecution:
    """An engine on a GPU.

    Parameters
    ----------
    plan : bytes
        The engine, whose origin was checked: loading it runs code.
    path : Path
        The ONNX file that it was compiled from, for messages.
    spec : GraphSpec
        What the manifest says about that.
    options : LoadOptions
        How to execute it.

    Raises
    ------
    MissingCapabilityError
        Where TensorRT does not load it, or the GPU lacks memory.
    """

    def __init__(self, plan: bytes, path: Path, spec: GraphSpec, options: LoadOptions) -> None:
        self._path, self._spec, self._options = path, spec, options
        self._logger = CollectingLogger()
        select_gpu(options.gpu)
        with tensorrt_errors(path, self._logger):
            self._runtime = tensorrt.Runtime(self._logger)
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise MissingCapabilityError(
                    f"{path}: TensorRT {tensorrt_version()} does not load its engine ({self._logger.take()}); delete "
                    "the bundle's folder engines/ to have it compiled again"
                )
            self._engine = engine
            self._check_signature()
            sizes = [engine.get_device_memory_size_for_profile_v2(n) for n in range(len(options.profiles))]
        gpu, names = options.gpu, [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        self._stream = Stream(gpu)
        # Contexts take turns on one stream, so they share their working memory.
        self._scratch = Block(max(1, *sizes), gpu)
        self._on_host = {name: GrowingBlock(gpu, on_host=True) for name in names}
        self._on_device = {name: GrowingBlock(gpu) for name in names}
        self._uploads = GrowingBlock(gpu, on_host=True)
        self._given: weakref.WeakSet[Block] = weakref.WeakSet()
        self._allocators: dict[str, _OutputAllocator] = {}
        self._recorded: RecordedShapes[_Recording] = RecordedShapes()
        self._contexts: dict[int, tensorrt.IExecutionContext] = {}
        self._is_lost = False

    @property
    def recordings(self) -> int:
        """Shapes that are replayed."""
        return len(self._recorded)

    def stated_shapes(self) -> dict[str, Shape]:
        """Return the shapes of the outputs as far as the engine knows them without inputs; -1 elsewhere."""
        return {tensor.name: _shape(self._engine.get_tensor_shape(tensor.name)) for tensor in self._spec.outputs}

    def execute(self, call: Call) -> dict[str, DeviceTensor]:
        """Start one execution.

        Returns
        -------
        dict
            Outputs, without the rows of padding, valid after `wait` and until the next call.
        """
        select_gpu(self._options.gpu)
        with tensorrt_errors(self._path, self._logger):
            shapes = execution_shapes(call, self._spec)
            values = self._values(call)
            profile = choose_profile(self._options.profiles, shapes, values, str(self._path))
            if self._stage_all(call, shapes):
                self._recorded.clear()  # what was recorded uses the memory from which the tensors have just moved
            key = (profile, tuple(shapes.items()), tuple(values.items()))
            outputs = self._compute(key, profile, shapes)
            count = len(call.rows)
            return {name: tensor[:count] for name, tensor in outputs.items()}

    def bring_down(self, outputs: Mapping[str, DeviceTensor]) -> dict[str, NDArray[np.generic]]:
        """Copy outputs to the host and wait for them; the arrays are overwritten by the next call."""
        arrays = {}
        for name, tensor in outputs.items():
            block, _ = self._on_host[name].reserve(max(1, tensor.nbytes))
            arrays[name] = block.array(tensor.shape, tensor.dtype)
            self._stream.download(arrays[name], tensor.address)
        self.wait()
        return arrays

    def copy_rows(self, target: DeviceTensor, source: DeviceTensor) -> None:
        """Start copying a tensor to another place of the GPU."""
        self._stream.move(target.address, source.address, source.nbytes)

    def wait(self) -> None:
        """Wait for everything that was started.

        Raises
        ------
        MissingCapabilityError
            Where the GPU fails or hangs.
        """
        try:
            self._stream.wait(self._options.time_limit_s)
        except GpuHangError:
            self.abandon()
            raise

    def upload(self, array: NDArray[np.generic]) -> DeviceTensor:
        """Copy an array to memory of its own on the GPU, by way of memory that the GPU reads by itself."""
        tensor = self.allocate(array.shape, array.dtype)
        block, _ = self._uploads.reserve(max(1, tensor.nbytes))
        staged = block.array(tensor.shape, tensor.dtype)
        staged[...] = array
        self._stream.upload(tensor.address, staged)
        self.wait()
        return tensor

    def allocate(self, shape: Shape, dtype: DTypeLike) -> DeviceTensor:
        """Return a tensor of its own on the GPU, its contents undefined."""
        block = Block(max(1, prod(shape) * np.dtype(dtype).itemsize), self._options.gpu)
        self._given.add(block)
        return DeviceTensor(block, shape, dtype)

    def abandon(self) -> None:
        """Give nothing back, not even at the end: of a GPU that hangs, all of that would wait for it for ever."""
        if not self._is_lost:
            self._is_lost = True
            for block in self._given:
                block.abandon()
            keep_for_ever(self)

    def _compute(self, key: Hashable, profile: int, shapes: Mapping[str, Shape]) -> dict[str, DeviceTensor]:
        """Replay, record or simply execute what the inputs' places hold."""
        if (recording := self._recorded.find(key)) is not None:
            recording.work.replay()
            return {name: self._output(name, shape)[0] for name, shape in recording.outputs.items()}
        is_due = self._options.is_recording and self._recorded.is_due(key)
        # A recording depends on what its context holds, so that context never sees another shape.
        context = self._new_context(profile) if is_due else self._shared_context(profile)
        outputs = self._bind(context, shapes)
        self._enqueue(context)
        if any(name in self._allocators for name in outputs):
            self.wait()  # only now does TensorRT know the shapes
            outputs = {name: self._allocated(name, tensor) for name, tensor in outputs.items()}
            self._recorded.refuse(key)
        elif is_due:
            work = self._stream.record(lambda: self._enqueue(context))
            if work is None:
                self._logger.take()  # what it says about the attempt belongs to no error
                self._recorded.refuse(key)
                self.wait()  # the context is at work until then, and nobody keeps it
            else:
                self._recorded.keep(key, _Recording(work, context, {n: t.shape for n, t in outputs.items()}))
        return outputs

    def _bind(self, context: tensorrt.IExecutionContext, shapes: Mapping[str, Shape]) -> dict[str, DeviceTensor]:
        """Tell a context the shapes and places of all tensors; returns the places of the outputs."""
        for name, shape in shapes.items():
            self._insist(context.set_input_shape(name, shape), f"the shape {list(shape)} of {name!r}")
            self._insist(context.set_tensor_address(name, self._input_address(name)), f"the place of {name!r}")
        if missing := context.infer_shapes():
            raise InvalidArgumentError(f"{self._path}: TensorRT misses the shapes or values of {', '.join(missing)}")
        outputs = {}
        for tensor in self._spec.outputs:
            shape = _shape(context.get_tensor_shape(tensor.name))
            if any(length < 0 for length in shape):
                self._insist(
                    context.set_output_allocator(tensor.name, self._allocator(tensor.name)),
                    f"memory of unknown size for {tensor.name!r}",
                )
                outputs[tensor.name] = DeviceTensor(self._on_device[tensor.name].reserve(1)[0], (0,), tensor.dtype)
                continue
            outputs[tensor.name], has_moved = self._output(tensor.name, shape)
            if has_moved:
                self._recorded.clear()
            self._insist(
                context.set_tensor_address(tensor.name, outputs[tensor.name].address), f"the place of {tensor.name!r}"
            )
        return outputs

    def _stage_all(self, call: Call, shapes: Mapping[str, Shape]) -> bool:
        """Put the inputs where the engine reads them; returns whether one of these places is new."""
        moved = [self._stage(name, call.inputs[name], shape) for name, shape in shapes.items()]
        return any(moved)

    def _stage(self, name: str, tensor: Tensor, shape: Shape) -> bool:
        """Put one input where the engine reads it, padded with zeros; returns whether that place is new."""
        dtype = np.dtype(tensor.dtype)
        nbytes = prod(shape) * dtype.itemsize
        stays_on_host = self._is_read_on_host(name)
        if isinstance(tensor, DeviceTensor) and not stays_on_host:
            device, has_moved = self._on_device[name].reserve(nbytes)
            self._stream.move(device.address, tensor.address, tensor.nbytes)
            self._stream.clear(device.address + tensor.nbytes, nbytes - tensor.nbytes)
            return has_moved
        host, has_moved = self._on_host[name].reserve(nbytes)
        staged = host.array(shape, dtype)
        array = on_host(tensor)
        staged[: len(array)] = array
        staged[len(array) :] = 0
        if stays_on_host:
            return has_moved
        device, has_moved = self._on_device[name].reserve(nbytes)
        self._stream.upload(device.address, staged)
        return has_moved

    def _input_address(self, name: str) -> int:
        """Return where the engine reads an input."""
        blocks = self._on_host if self._is_read_on_host(name) else self._on_device
        return blocks[name].reserve(1)[0].address

    def _is_read_on_host(self, name: str) -> bool:
        """Tell whether TensorRT reads an input on the host, because its values decide shapes."""
        return bool(self._engine.get_tensor_location(name) == tensorrt.TensorLocation.HOST)

    def _values(self, call: Call) -> dict[str, Shape]:
        """Return the values of those inputs whose values decide shapes."""
        names = self._options.profiles[0].values
        return {name: tuple(int(value) for value in on_host(call.inputs[name]).ravel()) for name in names}

    def _output(self, name: str, shape: Shape) -> tuple[DeviceTensor, bool]:
        """Return room for an output, and whether it is a new place."""
        dtype = np.dtype(next(tensor.dtype for tensor in self._spec.outputs if tensor.name == name))
        block, has_moved = self._on_device[name].reserve(max(1, prod(shape) * dtype.itemsize))
        return DeviceTensor(block, shape, dtype), has_moved

    def _allocator(self, name: str) -> _OutputAllocator:
        """Return what gives an output of unknown size its memory."""
        return self._allocators.setdefault(name, _OutputAllocator(self._on_device[name]))

    def _allocated(self, name: str, tensor: DeviceTensor) -> DeviceTensor:
        """Return an output as it turned out to be."""
        allocator = self._allocators.get(name)
        return tensor if allocator is None else DeviceTensor(allocator.block(), allocator.shape, tensor.dtype)

    def _shared_context(self, profile: int) -> tensorrt.IExecutionContext:
        """Return the context of a profile that serves every shape which is not recorded."""
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int) -> tensorrt.IExecutionContext:
        """Return a context on a profile, with the working memory that all of them share."""
        strategy = tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise MissingCapabilityError(
                f"{self._path}: TensorRT cannot execute its engine ({self._logger.take()}); free memory of the GPU"
            )
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        self._insist(context.set_optimization_profile_async(profile, self._stream.handle), f"profile {profile}")
        return context

    def _enqueue(self, context: tensorrt.IExecutionContext) -> None:
        """Put one execution on the stream."""
        with tensorrt_errors(self._path, self._logger):
            self._insist(context.execute_async_v3(self._stream.handle), "to execute")

    def _insist(self, accepted: bool, what: str) -> None:
        """Raise where TensorRT refused something."""
        if not accepted:
            raise MissingCapabilityError(
                f"{self._path}: TensorRT {tensorrt_version()} refused {what} ({self._logger.take()}); "
                "choose --engine onnxruntime"
            )

    def _check_signature(self) -> None:
        """Raise unless the engine takes and returns what the manifest says."""
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        found = {name: _DTYPES.get(self._engine.get_tensor_dtype(name).name, "unknown") for name in names}
        expected = {tensor.name: tensor.dtype for tensor in (*self._spec.inputs, *self._spec.outputs)}
        if found != expected:
            raise MissingCapabilityError(
                f"{self._path}: its engine has the tensors {found}, expected {expected}; export the bundle again"
            )


class _OutputAllocator(tensorrt.IOutputAllocator):
    """Memory for an output whose size TensorRT knows only when it has computed it."""

    def __init__(self, room: GrowingBlock) -> None:
        tensorrt.IOutputAllocator.__init__(self)
        self._room = room
        self.shape: Shape = (0,)

    def block(self) -> Block:
        """Return the memory that was given out last."""
        return self._room.reserve(1)[0]

    def reallocate_output(self, tensor_name: str, memory: object, size: SupportsInt, alignment: SupportsInt) -> int:
        """Return the address of at least `size` bytes, or 0 where there are none; TensorRT asks before it writes."""
        try:
            return self._room.reserve(max(1, int(size)))[0].address
        except MissingCapabilityError:
            return 0  # an exception would end the process; with 0 TensorRT fails, and says so

    def reallocate_output_async(
        self, tensor_name: str, memory: object, size: SupportsInt, alignment: SupportsInt, stream: object
    ) -> int:
        """As `reallocate_output`; nothing on the stream uses the old memory any more."""
        return self.reallocate_output(tensor_name, memory, size, alignment)

    def notify_shape(self, tensor_name: str, shape: tensorrt.Dims) -> None:
        """Take note of the shape."""
        self.shape = _shape(shape)


def _shape(dims: tensorrt.Dims) -> Shape:
    """Return a shape of TensorRT's as a tuple."""
    return tuple(dims[axis] for axis in range(len(dims)))
