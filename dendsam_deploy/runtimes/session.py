"""A bundle's graphs, chosen and loaded for one engine, device and precision."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.manifest import PRECISIONS
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.bundle.manifest import GraphSpec, Manifest, Precision, Role
    from dendsam_deploy.runtimes.runner import Runner


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a bundle is to run on. ``auto`` and None leave the choice to the program; a wish is fulfilled or refused.

    Parameters
    ----------
    engine : str
        ``auto`` or a name in `ENGINES`.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    precision : str or None
        Precision of every graph.
    threads : int or None
        Threads of one operator on the CPU; None takes one per physical core.
    """

    engine: str = "auto"
    device: str = "auto"
    precision: Precision | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """The runners of a bundle; a context manager that holds them open.

    Made by `open_session`, or straight from any runners that fulfil the contract.

    Parameters
    ----------
    manifest : Manifest
        How slices must be prepared, and the thresholds of this bundle.
    encoder, decoder : Runner
        Image encoder and box decoder.
    detector : Runner or None
        None where the bundle has none: boxes must then come from elsewhere.
    precision : str
        Precision of the graphs.
    is_proven : bool
        Whether `verify` has found these graphs on this engine, device and precision equal to their weights.
    """

    manifest: Manifest
    encoder: Runner
    decoder: Runner
    detector: Runner | None
    precision: Precision = "fp32"
    is_proven: bool = False

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self.encoder.engine

    @property
    def device(self) -> str:
        """Device that executes the graphs."""
        return self.encoder.device

    @property
    def description(self) -> str:
        """What was chosen, for people."""
        proof = "proven" if self.is_proven else "unproven: run `dendsam-deploy verify`"
        return f"{self.manifest.name} on {self.engine}, {self.device}, {self.precision} ({proof})"

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            for runner in self._runners:
                opened.enter_context(runner)
            opened.pop_all()  # every runner is open: keep them so; after a failure, those before it were closed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ExitStack() as closing:
            for runner in self._runners:
                closing.push(runner)

    @property
    def _runners(self) -> tuple[Runner, ...]:
        """The runners that exist, in the order in which a slice meets them."""
        return tuple(runner for runner in (self.detector, self.encoder, self.decoder) if runner is not None)


def open_session(bundle: Bundle, options: SessionOptions) -> Session:
    """Choose how a bundle runs on this machine; the graphs are loaded when the session is entered.

    Parameters
    ----------
    bundle : Bundle
        The graphs.
    options : SessionOptions
        Wishes.

    Raises
    ------
    InvalidArgumentError
        For an engine, device or precision that does not exist.
    MissingCapabilityError
        For one that exists, but not on this machine or in this bundle.

    Examples
    --------
    >>> with open_session(Bundle.open("exports/ca1"), SessionOptions()) as session:  # doctest: +SKIP
    ...     segment_volume("ca1.tif", session, SegmentOptions())
    """
    precision = _choose_precision(bundle, options.precision)
    open_runner = _choose_engine(options.engine)

    def runner(role: Role) -> Runner | None:
        graph = bundle.manifest.graph(role, precision)
        return open_runner(bundle.graph_path(role, precision), graph, options) if graph else None

    encoder, decoder = runner("encoder"), runner("decoder")
    assert encoder is not None, "`_choose_precision` saw to it"
    assert decoder is not None, "`_choose_precision` saw to it"
    return Session(
        manifest=bundle.manifest,
        encoder=encoder,
        decoder=decoder,
        detector=runner("detector"),
        precision=precision,
        is_proven=bundle.parity is not None and bundle.parity.proves(encoder.engine, encoder.device, precision),
    )


def _portable_runner(path: Path, spec: GraphSpec, options: SessionOptions) -> Runner:
    """Return a runner on ONNX Runtime, which is imported here because it costs 0.2 s."""
    from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions  # noqa: PLC0415  (see above)

    device = "cpu" if options.device == "auto" else options.device
    return OnnxRunner(path, spec, RunnerOptions(device, options.threads))


def _compiled_runner(path: Path, spec: GraphSpec, options: SessionOptions) -> Runner:
    """Return a runner on OpenVINO, which is an extra."""
    from dendsam_deploy.runtimes.compiled_cpu import CompiledRunner  # noqa: PLC0415  (see above)

    return CompiledRunner(path, spec, options.device, options.threads)


ENGINES: Mapping[str, Callable[[Path, GraphSpec, SessionOptions], Runner]] = MappingProxyType(
    {"onnxruntime": _portable_runner, "openvino": _compiled_runner}
)
"""Engines by name, the preferred one first. A new engine is one file with a runner and one row here."""


def _choose_engine(name: str) -> Callable[[Path, GraphSpec, SessionOptions], Runner]:
    """Return the maker of runners of an engine."""
    if name == "auto":
        return next(iter(ENGINES.values()))
    if name not in ENGINES:
        raise MissingCapabilityError(f"engine {name!r} is not available; choose auto or {', '.join(ENGINES)}")
    return ENGINES[name]


def _choose_precision(bundle: Bundle, wish: Precision | None) -> Precision:
    """Return a precision at which the bundle has every graph that it has at all; without a wish the most exact one."""
    roles = {graph.role for graph in bundle.manifest.graphs}
    have = [
        precision
        for precision in PRECISIONS
        if all(bundle.manifest.graph(role, precision) is not None for role in roles)
    ]
    if wish is not None and wish not in PRECISIONS:
        raise InvalidArgumentError(f"precision {wish!r} is unknown; choose {', '.join(PRECISIONS)}")
    if not have or (wish is not None and wish not in have):
        raise MissingCapabilityError(
            f"{bundle.path}: has no full set of graphs at {wish or 'any precision'}; it has "
            f"{', '.join(have) or 'none'}: choose one of those or export the bundle at that precision"
        )
    return wish or have[0]
