"""ONNX Runtime with its tensors kept where it computes: what crosses the bus is what the caller asks for, no more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnxruntime

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.runner import check_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec
    from dendsam_deploy.runtimes.runner import Resident, Tensor

_ROWS_PER_CALL = {"detector": 4, "encoder": 4, "decoder": 64}
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
    first : int
        Row of the whole tensor at which these begin.
    """

    memory: onnxruntime.OrtValue
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
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
        return DeviceTensor(self.memory, (max(stop - start, 0), *self.shape[1:]), self.dtype, self.first + start)

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
        """Execute the graph once; inputs are C-contiguous arrays or residents that fit `spec`, outputs come down.

        Raises
        ------
        InvalidArgumentError
            Where an input is missing or of another dtype or shape, or the runner was not entered.
        MissingCapabilityError
            Where the machine gives up during the execution, for example for lack of memory.
        """
        names = [output.name for output in self.spec.outputs]
        with self._guarded():
            binding = self._binding(inputs)
            for name in names:
                binding.bind_output(name, "cpu")
            self._execute(binding)
            return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def run_into(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Resident]) -> None:
        """Execute the graph once and write its outputs where they are to stay; raises as `run` does."""
        with self._guarded():
            binding = self._binding(inputs)
            for output in self.spec.outputs:
                held = self._own(outputs.get(output.name), output.name)
                if held.dtype.name != output.dtype or len(held.shape) != len(output.shape):
                    found = f"{held.dtype}{list(held.shape)}"
                    raise InvalidArgumentError(
                        f"{self._path}: room for {output.name!r} is {found}, expected {output.dtype}"
                        f"{list(output.shape)}; take it from `allocate`"
                    )
                binding.bind_output(output.name, *self._place, held.dtype.type, held.shape, held.address)
            self._execute(binding)

    def upload(self, array: NDArray[np.generic]) -> DeviceTensor:
        """Copy a C-contiguous array to the device.

        Raises
        ------
        MissingCapabilityError
            Where there is no memory for it.
        """
        with self._guarded():
            memory = onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._place)
        return DeviceTensor(memory, array.shape, array.dtype)

    def allocate(self, output: str, rows: int) -> DeviceTensor:
        """Return room for an output of that many rows.

        Raises
        ------
        InvalidArgumentError
            For an output that does not exist, or of which more than the number of rows is open.
        MissingCapabilityError
            Where there is no memory for it.
        """
        spec = next((spec for spec in self.spec.outputs if spec.name == output), None)
        row_shape = [length for length in spec.shape[1:] if isinstance(length, int)] if spec else []
        if spec is None or len(row_shape) < len(spec.shape) - 1:
            raise InvalidArgumentError(f"{self._path}: {output!r} is no output of which only the rows are open")
        shape, dtype = (rows, *row_shape), np.dtype(spec.dtype)
        with self._guarded():
            memory = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, *self._place)
        return DeviceTensor(memory, shape, dtype)

    @property
    def _place(self) -> tuple[Literal["cpu", "cuda"], int]:
        """The device as ONNX Runtime names it."""
        if self.device == "cpu":
            return "cpu", 0
        return "cuda", int(self.device.removeprefix("cuda:"))

    def _binding(self, inputs: Mapping[str, Tensor]) -> onnxruntime.IOBinding:
        """Bind the inputs where they are. A binding lives for one call: it holds on to the arrays that it has seen."""
        binding = self._open_session().io_binding()
        # Checked here because a binding reports everything, a wrong input and a full memory, by one exception.
        check_inputs(inputs, self.spec, str(self._path))
        for tensor in self.spec.inputs:
            value = inputs[tensor.name]
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(tensor.name, value)
            else:
                held = self._own(value, tensor.name)
                binding.bind_input(tensor.name, *self._place, held.dtype.type, held.shape, held.address)
        return binding

    def _own(self, tensor: Tensor | None, name: str) -> DeviceTensor:
        """Return a resident of this engine and device."""
        if not isinstance(tensor, DeviceTensor) or tensor.memory.device_name() != self._place[0]:
            found = "missing" if tensor is None else "on another engine or device"
            raise InvalidArgumentError(f"{self._path}: {name!r} is {found}; run all graphs on {self.device}")
        return tensor

    def _execute(self, binding: onnxruntime.IOBinding) -> None:
        """Run and wait until the outputs are there."""
        binding.synchronize_inputs()
        self._open_session().run_with_iobinding(binding)
        binding.synchronize_outputs()


def portable_runner(path: Path, spec: GraphSpec, options: RunnerOptions) -> OnnxRunner:
    """Return the runner for a device: on a GPU one that keeps tensors there, on the CPU the plain one.

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
    return (OnnxRunner if options.device == "cpu" else BoundRunner)(path, spec, options)
