"""The seam between the pipeline and the engines: one verb, a context manager, and a public test double.

Every runner takes and returns numpy arrays. One on a GPU may also keep tensors where it computes (`ResidentRunner`), so
that tiles go up once, embeddings never come down, and the decoder's regions are all that crosses the bus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeGuard

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec


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
        """Execute the graph once. Names, dtypes and shapes are those of `spec`; nothing is cast or copied silently."""
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

    def __getitem__(self, rows: slice) -> Resident:
        """Return consecutive rows of the first axis, which share this tensor's memory."""
        ...

    def numpy(self) -> NDArray[np.generic]:
        """Return a copy in the memory of the host."""
        ...


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
        """Execute the graph once, on arrays and residents, and bring every output to the host."""
        ...

    def run_into(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Resident]) -> None:
        """Execute the graph once and write its outputs, all of which must be given, where they are to stay."""
        ...

    def upload(self, array: NDArray[np.generic]) -> Resident:
        """Copy an array to the device."""
        ...

    def allocate(self, output: str, rows: int) -> Resident:
        """Return room on the device for an output of that many rows, its contents undefined."""
        ...


def keeps_tensors(runner: Runner) -> TypeGuard[ResidentRunner]:
    """Tell whether a runner can leave tensors on its device."""
    return hasattr(runner, "run_into")


def share_memory(*runners: Runner) -> bool:
    """Tell whether tensors can pass between runners without leaving the device."""
    places = {(runner.engine, runner.device) for runner in runners}
    return len(places) == 1 and all(map(keeps_tensors, runners))


def check_inputs(inputs: Mapping[str, Tensor], spec: GraphSpec, where: str) -> None:
    """Raise unless inputs are the contract's: names, dtypes, fixed axes, and equal lengths of axes of one name.

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
