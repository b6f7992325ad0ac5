"""The seam between the pipeline and the engines: one verb, a context manager, and a public test double.

Every runner takes and returns numpy arrays. One on a GPU may also keep tensors where it computes (`ResidentRunner`).
Then the uint8 tiles of a slice go up once, for the detector and the encoder alike, and embeddings never come down. What
comes down are the detector's boxes, and of each object the logits of its own region: 16 KiB at the usual 16 cells,
where its part of a whole mask grid would be 256 KiB at 1024 px. Labels are painted of them on the host, on a thread of
its own while the device works at the next slice (`pipeline.run`), by the same code after every engine, so that equal
logits are equal labels. Nothing is painted on a device.

What every runner asks of its inputs, its devices and the tensors that it is given is settled here, too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeGuard, TypeVar

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec

_LONGEST_MESSAGE = 300


class Runner(Protocol):
    """One graph, loaded on one engine and device.

    Engines acquire their resources in ``__enter__`` and release them in ``__exit__``. Where `borrows_outputs` is true,
    the arrays that ``run`` returned are overwritten by the next call: copy what must live longer.
    """

    @property
    def spec(self) -> GraphSpec:
        """The graph's names, dtypes and shapes."""
        ...

    @property
    def engine(self) -> str:
        """Name of the engine, as on the command line."""
        ...

    @property
    def device(self) -> str:
        """Device that executes the graph, such as ``cpu`` or ``cuda:0``."""
        ...

    @property
    def borrows_outputs(self) -> bool:
        """Whether outputs are only valid until the next call."""
        ...

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Execute the graph once on C-contiguous arrays; nothing is cast or copied silently.

        Raises
        ------
        InvalidArgumentError
            Where an input is missing or of another dtype or shape than those of `spec`, or the runner was not entered.
        MissingCapabilityError
            Where the machine gives up during the execution, for example for lack of memory.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Resident(Protocol):
    """A tensor in the memory of one engine on one device; its first axis counts tiles or boxes.

    It is valid as long as the runner that made it is open.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of its elements."""
        ...

    @property
    def device(self) -> str:
        """Device that holds it, such as ``cpu`` or ``cuda:0``."""
        ...

    def __getitem__(self, rows: slice) -> Resident:
        """Return consecutive rows of the first axis, which share this tensor's memory."""
        ...

    def numpy(self) -> NDArray[np.generic]:
        """Return a copy in the memory of the host."""
        ...


Held = TypeVar("Held", bound=Resident)

Tensor: TypeAlias = "NDArray[np.generic] | Resident"
"""What a graph takes: an array of the host, or what a runner of the same engine and device holds."""


class ResidentRunner(Runner, Protocol):
    """A runner that can leave tensors on its device and take them from there.

    Residents of runners of the same engine and device are interchangeable.
    """

    @property
    def rows_per_call(self) -> int:
        """Tiles, or boxes for the decoder, that one call should hold to keep the device busy."""
        ...

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
        """Execute the graph once, on arrays and residents, and bring every output to the host; raises as `Runner`'s."""
        ...

    def run_into(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Resident]) -> None:
        """Execute the graph once and write its outputs, all of which must be given, where they are to stay.

        Raises
        ------
        InvalidArgumentError, MissingCapabilityError
            As `run` does, and where there is no room for an output, or of another size or on another device.
        """
        ...

    def upload(self, array: NDArray[np.generic]) -> Resident:
        """Copy an array to the device.

        Raises
        ------
        MissingCapabilityError
            Where there is no memory for it.
        """
        ...

    def allocate(self, output: str, rows: int) -> Resident:
        """Return room on the device for an output of that many rows, its contents undefined.

        Raises
        ------
        InvalidArgumentError
            For an output that does not exist, or of which more than the number of rows is open.
        MissingCapabilityError
            Where there is no memory for it.
        """
        ...


def keeps_tensors(runner: Runner) -> TypeGuard[ResidentRunner]:
    """Tell whether a runner can leave tensors on its device."""
    return hasattr(runner, "run_into")


def compiled_sha256(runner: Runner) -> str | None:
    """Return the digest of the compiled engine that a runner executes or executed; None for those that keep none."""
    digest: str | None = getattr(runner, "compiled_sha256", None)
    return digest


def share_memory(*runners: Runner) -> bool:
    """Tell whether tensors can pass between runners without leaving the device."""
    places = {(runner.engine, runner.device) for runner in runners}
    return len(places) == 1 and all(map(keeps_tensors, runners))


def gpu_of(device: str) -> int | None:
    """Return the number of the GPU that ``cuda`` or ``cuda:N`` names; None for ``cpu``.

    Raises
    ------
    InvalidArgumentError
        For any other spelling.

    Examples
    --------
    >>> gpu_of("cpu"), gpu_of("cuda"), gpu_of("cuda:2")
    (None, 0, 2)
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise InvalidArgumentError(f"device {device!r} is unknown; choose cpu, cuda or cuda:N")
    return None if device == "cpu" else int(match[1] or 0)


def line_of(error: BaseException) -> str:
    """Return the message of a library's exception as one line of bearable length."""
    return " ".join((str(error) or type(error).__name__).split())[:_LONGEST_MESSAGE]


def not_open(path: Path) -> InvalidArgumentError:
    """Return the error of a runner that is used before it was entered, or after it was left."""
    return InvalidArgumentError(f"{path}: the runner is not open; use it in a `with` block")


def check_inputs(inputs: Mapping[str, Tensor], spec: GraphSpec, where: str) -> dict[str, int]:
    """Raise unless inputs are the contract's: names, dtypes, fixed axes, and equal lengths of axes of one name.

    Returns
    -------
    dict
        Length of every free axis by its name.

    Raises
    ------
    InvalidArgumentError
        Names `where`, what was found and what was expected.
    """
    lengths: dict[str, int] = {}
    for tensor in spec.inputs:
        given = inputs.get(tensor.name)
        wanted = f"{tensor.dtype}{list(tensor.shape)}"
        if given is None:
            raise InvalidArgumentError(f"{where}: the input {tensor.name!r} is missing, expected {wanted}")
        fits = given.dtype.name == tensor.dtype and len(given.shape) == len(tensor.shape)
        for have, want in zip(given.shape, tensor.shape, strict=False):
            fits = fits and have == (lengths.setdefault(want, have) if isinstance(want, str) else want)
        if not fits or (isinstance(given, np.ndarray) and not given.flags.c_contiguous):
            found = f"{given.dtype}{list(given.shape)}"
            known = "".join(f", {name} = {length}" for name, length in lengths.items())
            raise InvalidArgumentError(
                f"{where}: the input {tensor.name!r} is {found}, expected contiguous {wanted}{known}"
            )
    return lengths


def shape_of_rows(spec: GraphSpec, output: str, rows: int, where: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Return shape and dtype of an output of which only the rows are open; see `ResidentRunner.allocate`.

    Raises
    ------
    InvalidArgumentError
        For an output that does not exist, or of which more is open.
    """
    tensor = next((tensor for tensor in spec.outputs if tensor.name == output), None)
    row = [length for length in tensor.shape[1:] if isinstance(length, int)] if tensor else []
    if tensor is None or len(row) < len(tensor.shape) - 1:
        raise InvalidArgumentError(f"{where}: {output!r} is no output of which only the rows are open")
    return (rows, *row), np.dtype(tensor.dtype)


def check_room(outputs: Mapping[str, Resident], spec: GraphSpec, lengths: Mapping[str, int], where: str) -> None:
    """Raise unless there is exactly the room for every output; a device would write beyond the end of a smaller one.

    Parameters
    ----------
    outputs : mapping
        What was given to `ResidentRunner.run_into`.
    spec : GraphSpec
        The graph.
    lengths : mapping
        Lengths of the free axes of its inputs, from `check_inputs`.
    where : str
        For messages.

    Raises
    ------
    InvalidArgumentError
        Names `where`, what was found and what was expected.
    """
    for tensor in spec.outputs:
        axis = tensor.shape[0]
        rows = lengths.get(axis, 0) if isinstance(axis, str) else axis
        shape, dtype = shape_of_rows(spec, tensor.name, rows, where)
        given = outputs.get(tensor.name)
        if given is None or (given.shape, given.dtype) != (shape, dtype):
            found = "missing" if given is None else f"{given.dtype}{list(given.shape)}"
            raise InvalidArgumentError(
                f"{where}: room for {tensor.name!r} is {found}, expected {dtype}{list(shape)} from `allocate`"
            )


def own_resident(tensor: object, kind: type[Held], runner: Runner, name: str) -> Held:
    """Return a resident that a runner's own engine keeps on the runner's own device.

    Parameters
    ----------
    tensor : object
        What was given.
    kind : type
        Residents of the engine.
    runner : Runner
        Who is to use it.
    name : str
        Name of the input or output.

    Raises
    ------
    InvalidArgumentError
        Where it lies elsewhere: nothing is moved behind the caller's back.
    """
    if not isinstance(tensor, kind) or tensor.device != runner.device:
        place = f"on {tensor.device}" if isinstance(tensor, kind) else "on another engine or device"
        raise InvalidArgumentError(
            f"the {runner.spec.role}'s {name!r} lies {place}; run all graphs on {runner.device} by {runner.engine}"
        )
    return tensor


def check_residents(inputs: Mapping[str, Tensor], kind: type[Resident], runner: Runner) -> None:
    """Raise unless all inputs that are no arrays are a runner's own; see `own_resident`."""
    for name in (tensor.name for tensor in runner.spec.inputs):
        if not isinstance(inputs[name], np.ndarray):
            own_resident(inputs[name], kind, runner, name)


class CallableRunner:
    """A runner around a Python function: the public test double of the seam.

    Parameters
    ----------
    spec : GraphSpec
        The contract that the function claims to fulfil.
    function : callable
        Takes and returns a mapping from tensor name to array.
    """

    engine = "callable"
    device = "cpu"
    borrows_outputs = False

    def __init__(
        self,
        spec: GraphSpec,
        function: Callable[[Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.generic]]],
    ) -> None:
        self.spec = spec
        self._function = function

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Call the function."""
        return self._function(inputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None
