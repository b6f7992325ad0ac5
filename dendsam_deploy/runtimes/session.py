"""A bundle's graphs, chosen and loaded for one engine, device and precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from dendsam_deploy.progress import ProgressCallback, no_progress
from dendsam_deploy.runtimes.choice import Choice, choose, combinations_on_offer, nothing_works, times_measured_here
from dendsam_deploy.runtimes.probe import why_not
from dendsam_deploy.runtimes.runner import compiled_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.bundle.manifest import GraphSpec, Manifest, Precision, Role
    from dendsam_deploy.bundle.parity import Combination
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
        Precision of the encoder, and of the other graphs where the bundle has them at it; they run at fp32 otherwise.
    threads : int or None
        Threads of one operator on the CPU; None takes one per physical core.
    trusted_engines : tuple of str
        SHA-256 of compiled engines that may be loaded, which runs code, although somebody else made them.
    progress : callable
        Told about slow preparations of an engine, such as compiling.
    with_points : bool
        Whether the decoder for points is loaded as well. `segment` needs none.
    """

    engine: str = "auto"
    device: str = "auto"
    precision: Precision | None = None
    threads: int | None = None
    trusted_engines: tuple[str, ...] = ()
    progress: ProgressCallback = field(default=no_progress, compare=False, repr=False)
    with_points: bool = False


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
        Precision of the encoder; a graph that the bundle does not have at it runs at fp32.
    is_proven : bool
        Whether `verify` has found these graphs on this engine, device and precision equal to their weights.
    reason : str
        Why this engine, device and precision were chosen, for people; empty where the user said it.
    points : Runner or None
        Decoder for points; None where it was not asked for, or the bundle has none.
    proven_engines : mapping
        SHA-256 by graph of the compiled engines that the proof was made with.
    trusted_engines : tuple of str
        SHA-256 of compiled engines that the user trusts although somebody else made them.
    """

    manifest: Manifest
    encoder: Runner
    decoder: Runner
    detector: Runner | None
    precision: Precision = "fp32"
    is_proven: bool = False
    reason: str = ""
    points: Runner | None = None
    proven_engines: Mapping[Role, str] = field(default_factory=dict)
    trusted_engines: tuple[str, ...] = ()

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
        others = [runner.spec for runner in self.runners if runner.spec.precision != self.precision]
        mixed = f"{' and '.join(spec.role for spec in others)} at {others[0].precision}" if others else ""
        remarks = "; ".join(filter(None, (proof, self.reason, mixed)))
        return f"{self.manifest.name} on {self.engine}, {self.device}, {self.precision} ({remarks})"

    @property
    def runners(self) -> tuple[Runner, ...]:
        """The runners that exist, in the order in which a slice meets them."""
        everything = (self.detector, self.encoder, self.decoder, self.points)
        return tuple(runner for runner in everything if runner is not None)

    @property
    def compiled_engines(self) -> dict[Role, str]:
        """SHA-256 of the compiled engines that execute the graphs, by graph; empty where an engine keeps none."""
        return {runner.spec.role: digest for runner in self.runners if (digest := compiled_sha256(runner))}

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            for runner in self.runners:
                opened.enter_context(runner)
            opened.pop_all()  # every runner is open: keep them so; after a failure, those before it were closed
        return self._as_opened()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        closing = ExitStack()
        for runner in self.runners:
            closing.push(runner)
        closing.__exit__(kind, error, traceback)  # runners are told: of a GPU that hangs, they must not wait for it

    def _as_opened(self) -> Self:
        """Return the session as it turned out: unproven where a graph was compiled anew since it was proven."""
        others = [role for role, digest in self.compiled_engines.items() if self.proven_engines.get(role) != digest]
        if not (self.is_proven and others):
            return self
        reason = f"`verify` knows other compiled engines of the {' and the '.join(others)} than those here"
        return replace(self, is_proven=False, reason=reason)


RunnerMaker = Callable[["Path", "GraphSpec", SessionOptions], "Runner"]
"""Makes a runner of a graph; its options name a device, never ``auto``."""


def open_session(bundle: Bundle, options: SessionOptions) -> Session:
    """Choose how a bundle runs on this machine; the graphs are loaded when the session is entered.

    Parameters
    ----------
    bundle : Bundle
        The graphs.
    options : SessionOptions
        Wishes. What they leave open is filled in with the fastest combination that `verify` has proven and that
        works here; where none is proven, with fp32 on the first engine that works.

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
    offered = combinations_on_offer(bundle.manifest, options, tuple(ENGINES))
    times_ms = times_measured_here(bundle)
    if len({(engine, device) for engine, device, _ in offered}) == 1:
        # There is no other engine to turn to, so the reason for which this one fails is the best message.
        choice = choose(bundle, offered, lambda engine, device: None, times_ms)
    else:
        choice = choose(bundle, offered, lambda engine, device: why_not(ENGINES[engine], device, options), times_ms)
    return session_on(bundle, choice, options)


def runnable_combinations(bundle: Bundle, options: SessionOptions) -> tuple[Combination, ...]:
    """Return every combination that a bundle has graphs for and whose engine works on this machine.

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
    """
    offered = combinations_on_offer(bundle.manifest, options, tuple(ENGINES))
    places = dict.fromkeys((engine, device) for engine, device, _ in offered)
    refusals = {(engine, device): why_not(ENGINES[engine], device, options) for engine, device in places}
    found = tuple(c for c in offered if refusals[c.engine, c.device] is None)
    if not found:
        raise nothing_works(bundle, refusals)
    return found


def session_on(bundle: Bundle, choice: Choice, options: SessionOptions) -> Session:
    """Return the session of a bundle on a combination that was chosen already.

    Parameters
    ----------
    bundle : Bundle
        The graphs.
    choice : Choice
        What they run on.
    options : SessionOptions
        Of these only the threads, trusted engines and `with_points` count.

    Raises
    ------
    MissingCapabilityError
        Where the engine does not work on this machine.
    """
    engine, device, precision = choice.combination
    options = replace(options, engine=engine, device=device, precision=precision)

    def runner(role: Role) -> Runner | None:
        graph = bundle.manifest.graph(role, precision) or bundle.manifest.graph(role, "fp32")
        maker = ENGINES[_POINT_ENGINES.get(engine, engine) if role == "points" else engine]
        return maker(bundle.graph_path(role, graph.precision), graph, options) if graph else None

    encoder, decoder = runner("encoder"), runner("decoder")
    assert encoder is not None, "`combinations_on_offer` saw to it"
    assert decoder is not None, "`combinations_on_offer` saw to it"
    return Session(
        manifest=bundle.manifest,
        encoder=encoder,
        decoder=decoder,
        detector=runner("detector"),
        precision=precision,
        is_proven=choice.is_proven,
        reason=choice.reason,
        proven_engines={} if bundle.parity is None else bundle.parity.compiled_of(choice.combination),
        trusted_engines=options.trusted_engines,
        points=runner("points") if options.with_points else None,
    )


def _portable_runner(path: Path, spec: GraphSpec, options: SessionOptions) -> Runner:
    """Return a runner on ONNX Runtime, which is imported here because it costs 0.2 s."""
    from dendsam_deploy.runtimes.portable import RunnerOptions  # noqa: PLC0415  (see above)
    from dendsam_deploy.runtimes.portable_binding import portable_runner  # noqa: PLC0415

    return portable_runner(path, spec, RunnerOptions(options.device, options.threads))


def _planned_runner(path: Path, spec: GraphSpec, options: SessionOptions) -> Runner:
    """Return a runner on ONNX Runtime's TensorRT provider."""
    from dendsam_deploy.runtimes.portable import RunnerOptions  # noqa: PLC0415  (see above)
    from dendsam_deploy.runtimes.portable_binding import portable_runner  # noqa: PLC0415

    return portable_runner(path, spec, RunnerOptions(options.device, options.threads, provider="tensorrt"))


def _compiled_runner(path: Path, spec: GraphSpec, options: SessionOptions) -> Runner:
    """Return a runner on OpenVINO, which is an extra."""
    from dendsam_deploy.runtimes.compiled_cpu import CompiledRunner  # noqa: PLC0415  (see above)

    return CompiledRunner(path, spec, options.device, options.threads)


def _engine_runner(path: Path, spec: GraphSpec, options: SessionOptions) -> Runner:
    """Return a runner on TensorRT, which is an extra."""
    from dendsam_deploy.runtimes.gpu_engine import EngineOptions, EngineRunner  # noqa: PLC0415  (see above)

    return EngineRunner(path, spec, EngineOptions(options.device, options.trusted_engines, options.progress))


def _captured_runner(path: Path, spec: GraphSpec, options: SessionOptions) -> Runner:
    """Return a runner on torch, which is an extra."""
    from dendsam_deploy.runtimes.captured import CapturedOptions, CapturedRunner  # noqa: PLC0415  (see above)

    return CapturedRunner(path, spec, CapturedOptions(options.device, options.threads, progress=options.progress))


def _packaged_runner(path: Path, spec: GraphSpec, options: SessionOptions) -> Runner:
    """Return a runner on torch whose programs are compiled once and kept."""
    from dendsam_deploy.runtimes.captured import CapturedOptions, CapturedRunner  # noqa: PLC0415  (see above)

    packaged = CapturedOptions(
        options.device,
        options.threads,
        is_packaged=True,
        trusted=options.trusted_engines,
        progress=options.progress,
    )
    return CapturedRunner(path, spec, packaged)


ENGINES: Mapping[str, RunnerMaker] = MappingProxyType(
    {
        "onnxruntime": _portable_runner,
        "onnxruntime+tensorrt": _planned_runner,
        "openvino": _compiled_runner,
        "tensorrt": _engine_runner,
        "torch": _captured_runner,
        "torch+package": _packaged_runner,
    }
)
"""Engines by name. A new engine is one file with a runner, one row here, and one in `choice.PLACES`."""

_POINT_ENGINES: Mapping[str, str] = MappingProxyType(
    # Compiling for every number of points takes TensorRT longer than a comparison lasts.
    {"tensorrt": "onnxruntime", "onnxruntime+tensorrt": "onnxruntime"}
)
"""What runs the decoder for points where the session's own engine does not; the runner names its engine."""
