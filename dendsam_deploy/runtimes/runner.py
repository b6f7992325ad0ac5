"""The seam between the pipeline and the engines: one verb, a context manager, and a public test double."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

    import numpy as np
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
