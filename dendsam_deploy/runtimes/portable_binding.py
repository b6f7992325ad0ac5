"""ONNX Runtime with its tensors kept where it computes: what crosses the bus is what the caller asks for, no more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnxruntime

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.runner import check_inputs, check_room, own_resident, shape_of_rows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec
    from dendsam_deploy.runtimes.runner import Resident, Tensor

_ROWS_PER_CALL = {"detector": 4, "encoder": 4, "decoder": 64, "points": 64}
"""Tiles and boxes that fill a GPU; more of them only take more memory."""


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """Rows of a tensor in ONNX Runtime's memory on a device.

    Parameters
    ----------
    memory : onnxruntime.OrtValue
        The whole tensor, kept alive.
    shape : tuple of int
        Shape of these rows.
    dtype : dtype
        Type of the elements.
    device : str
        What holds it.
    first : int
        Row of the whole tensor at which these begin.
    """

    memory: onnxruntime.OrtValue
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    device: str
    first: int = 0

    @property
    def address(self) -> int:
        """Address of the first element, in the device's address space."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return int(self.memory.data_ptr()) + self.first * row_bytes

    def __getitem__(self, rows: slice) -> DeviceTensor:
        """Return consecutive rows, which share this tensor's memory."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise InvalidArgumentError(f"rows {rows} of a tensor on a device are not consecutive")
        shape = (max(stop - start, 0), *self.shape[1:])
        return DeviceTensor(self.memory, shape, self.dtype, self.device, self.first + start)

    def numpy(self) -> NDArray[np.generic]:
        """Return a copy in the memory of the host."""
        whole: NDArray[np.generic] = self.memory.numpy()
        return whole[self.first : self.first + self.shape[0]].copy()


class BoundRunner(OnnxRunner):
    """A graph on ONNX Runtime whose inputs and outputs may stay on its device (`runner.ResidentRunner`).

    Any device serves, the CPU as well: there, residents are arrays under another name, and nothing is gained.
    """

    @property
    def rows_per_call(self) -> int:
        """Tiles, or boxes for the decoder, that one call should hold to keep the device busy."""
        return _ROWS_PER_CALL[self.spec.role]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
        """Execute the graph once and bring its outputs down; see `runner.ResidentRunner`."""
        names = [output.name for output in self.spec.outputs]
        with self._guarded():
            binding, _ = self._binding(inputs)
            for name in names:
                binding.bind_output(name, "cpu")
            self._execute(binding)
            return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def run_into(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Resident]) -> None:
        """Execute the graph once and leave its outputs where they are to stay; see `runner.ResidentRunner`."""
        with self._guarded():
            binding, lengths = self._binding(inputs)
            check_room(outputs, self.spec, lengths, str(self._path))
            for name in (output.name for output in self.spec.outputs):
                held = own_resident(outputs[name], DeviceTensor, self, name)
                binding.bind_output(name, *self._place, held.dtype.type, held.shape, held.address)
            self._execute(binding)

    def upload(self, array: NDArray[np.generic]) -> DeviceTensor:
        """Copy a C-contiguous array to the device; see `runner.ResidentRunner`."""
        with self._guarded():
            memory = onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._place)
        return DeviceTensor(memory, array.shape, array.dtype, self.device)

    def allocate(self, output: str, rows: int) -> DeviceTensor:
        """Return room for an output of that many rows; see `runner.ResidentRunner`."""
        shape, dtype = shape_of_rows(self.spec, output, rows, str(self._path))
        with self._guarded():
            memory = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, *self._place)
        return DeviceTensor(memory, shape, dtype, self.device)

    @property
    def _place(self) -> tuple[Literal["cpu", "cuda"], int]:
        """The device as ONNX Runtime names it."""
        if self.device == "cpu":
            return "cpu", 0
        return "cuda", int(self.device.removeprefix("cuda:"))

    def _binding(self, inputs: Mapping[str, Tensor]) -> tuple[onnxruntime.IOBinding, dict[str, int]]:
        """Bind the inputs where they are; returns the lengths of their free axes, too.

        A binding lives for one call: it holds on to the arrays that it has seen.
        """
        binding = self._open_session().io_binding()
        # Checked here because a binding reports everything, a wrong input and a full memory, by one exception.
        lengths = check_inputs(inputs, self.spec, str(self._path))
        for tensor in self.spec.inputs:
            value = inputs[tensor.name]
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(tensor.name, value)
            else:
                held = own_resident(value, DeviceTensor, self, tensor.name)
                binding.bind_input(tensor.name, *self._place, held.dtype.type, held.shape, held.address)
        return binding, lengths

    def _execute(self, binding: onnxruntime.IOBinding) -> None:
        """Run and wait until the outputs are there."""
        binding.synchronize_inputs()
        self._open_session().run_with_iobinding(binding)
        binding.synchronize_outputs()


def portable_runner(path: Path, spec: GraphSpec, options: RunnerOptions) -> OnnxRunner:
    """Return the runner for a device: on a GPU one that keeps tensors there, on the CPU the plain `OnnxRunner`."""
    return (OnnxRunner if options.device == "cpu" else BoundRunner)(path, spec, options)
