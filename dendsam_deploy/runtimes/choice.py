"""What a bundle runs on where nobody says it: the fastest combination that is proven and that works here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.latency import BENCHMARK_FILE, graph_digests, latency_from_json
from dendsam_deploy.bundle.manifest import PRECISIONS
from dendsam_deploy.bundle.parity import Combination
from dendsam_deploy.errors import InputFileError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.host import differences, examine_host, gpu_name
from dendsam_deploy.runtimes.runner import gpu_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.bundle.manifest import Manifest, Precision
    from dendsam_deploy.bundle.parity import ParityReport
    from dendsam_deploy.runtimes.session import SessionOptions

Timings = Mapping[Combination, float]
"""Median time of a slice, ms, by combination."""

PLACES = (
    ("cuda", "tensorrt"),
    ("cuda", "torch"),
    ("cuda", "onnxruntime"),
    ("cuda", "onnxruntime+tensorrt"),
    ("cuda", "torch+package"),
    ("cpu", "openvino"),
    ("cpu", "onnxruntime"),
    ("cpu", "torch"),
    ("cpu", "torch+package"),
)
"""Which engine runs on which kind of device, the preferred one first: what decides where nothing was measured."""

_ONLY_ON_REQUEST = frozenset(
    {
        ("cuda", "onnxruntime+tensorrt"),  # compiles every graph anew in every session; ``tensorrt`` does so once
        ("cuda", "torch+package"),  # leaves compiled code in the bundle
        ("cpu", "torch"),  # several times slower than the engines that are made for processors
        ("cpu", "torch+package"),
    }
)
"""What ``auto`` never takes."""

_FASTEST_FIRST: Mapping[str, tuple[Precision, ...]] = {
    "cuda": ("bf16", "fp16", "fp32", "int8"),
    # Half precision and int8 pay only on processors that have instructions for them: a measurement has to say so.
    "cpu": ("fp32", "bf16", "int8", "fp16"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why.

    Parameters
    ----------
    combination : Combination
        Engine, device and precision.
    is_proven : bool
        Whether `verify` has found it equal to the weights.
    reason : str
        For people; empty where there was nothing to choose or nothing to tell.
    """

    combination: Combination
    is_proven: bool
    reason: str = ""


def combinations_on_offer(
    manifest: Manifest, wishes: SessionOptions, engines: Sequence[str]
) -> tuple[Combination, ...]:
    """Return every combination that fits the wishes and that the bundle has graphs for, the preferred ones first.

    A bundle has a precision if it has the encoder at it; other graphs that it lacks there run at fp32.

    Parameters
    ----------
    manifest : Manifest
        The bundle's manifest.
    wishes : SessionOptions
        What the user asked for.
    engines : sequence of str
        Names of the engines that this program knows.

    Raises
    ------
    InvalidArgumentError
        For a device or precision that does not exist.
    MissingCapabilityError
        For an engine that does not exist, or a device or precision that it or the bundle does not have.
    """
    devices = _devices(wishes.device)
    if wishes.engine != "auto" and wishes.engine not in engines:
        raise MissingCapabilityError(
            f"engine {wishes.engine!r} is not available; choose auto or {', '.join(sorted(engines))}"
        )
    precisions = _precisions(manifest, wishes.precision)
    offered = tuple(
        Combination(engine, devices[kind], precision)
        for kind, engine in PLACES
        if kind in devices and engine in engines and _is_wished((kind, engine), wishes)
        for precision in _FASTEST_FIRST[kind]
        if precision in precisions
    )
    if not offered:
        kinds = " and ".join(kind for kind, engine in PLACES if engine == wishes.engine)
        raise MissingCapabilityError(
            f"device {wishes.device}: the engine {wishes.engine} runs on {kinds}; choose --device {kinds} or another "
            "engine"
        )
    return offered


def times_measured_here(bundle: Bundle) -> Timings:
    """Return the times that `benchmark` left in a bundle, if they are about these graphs and a machine like this one.

    A file that cannot be read counts as none: times only decide between combinations that are proven alike, and a
    bundle must stay usable when a later version writes them differently.
    """
    path = bundle.path / BENCHMARK_FILE
    try:
        report = latency_from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, InputFileError):
        return {}
    is_about_this = report.graphs == graph_digests(bundle.manifest)
    return report.slice_ms if is_about_this and not differences(report.host, examine_host().to_document()) else {}


def machine_of(device: str) -> str:
    """Return what computes on a device of this machine: the processor's instruction sets, or the name of the GPU.

    A device that this version does not know, of which a proof may tell all the same, stays what it is.
    """
    if device == "cpu":
        host = examine_host()
        return " ".join((host.architecture, *host.instructions))
    kind, _, index = device.partition(":")
    name = gpu_name(int(index)) if kind == "cuda" and index.isdecimal() else None
    return name or device


def proven_here(bundle: Bundle) -> tuple[Combination, ...]:
    """Return the combinations that `verify` has proven, as far as the proofs hold on this machine."""
    return () if bundle.parity is None else bundle.parity.proven_on(cache(machine_of))


def _is_wished(place: tuple[str, str], wishes: SessionOptions) -> bool:
    """Tell whether wishes allow an engine on a kind of device."""
    return wishes.engine == place[1] or (wishes.engine == "auto" and place not in _ONLY_ON_REQUEST)


def choose(
    bundle: Bundle, offered: Sequence[Combination], why_not: Callable[[str, str], str | None], timings_ms: Timings
) -> Choice:
    """Choose one of several combinations.

    Proven ones come first, by their measured times, and engines that were not measured in the order of the offer; where
    none is proven, fp32 on the first engine that works. An engine that does not work here is passed over.

    Parameters
    ----------
    bundle : Bundle
        The bundle and what is proven about it.
    offered : sequence of Combination
        From `combinations_on_offer`.
    why_not : callable
        Takes engine and device; returns why they do not work here, or None.
    timings_ms : mapping
        Median time of a slice by combination, measured on this machine.

    Raises
    ------
    MissingCapabilityError
        Where none of them works here.
    """
    parity = bundle.parity
    known = proven_here(bundle)
    proven = [combination for combination in offered if combination in known]
    ranked = _ranked(proven, timings_ms)
    others = _unproven(offered, proven, parity)
    refusals: dict[tuple[str, str], str | None] = {}
    for combination in (*ranked, *others):
        place = combination.engine, combination.device
        if place not in refusals:
            refusals[place] = why_not(*place)
        if refusals[place] is None:
            return Choice(combination, combination in proven, _reason(combination, ranked, parity, timings_ms))
    raise nothing_works(bundle, refusals)


def nothing_works(bundle: Bundle, refusals: Mapping[tuple[str, str], str | None]) -> MissingCapabilityError:
    """Return the error that gives the reason of every engine and device."""
    listed = "; ".join(f"{engine} on {device}: {reason}" for (engine, device), reason in refusals.items())
    return MissingCapabilityError(f"nothing here runs {bundle.path}: {listed}; see `dendsam-deploy doctor`")


def _ranked(proven: Sequence[Combination], timings_ms: Timings) -> list[Combination]:
    """Order combinations: by time as far as that was measured.

    That only one of two was measured tells nothing about the other, and the usual preference decides between them: a
    GPU stands before the CPU, and an engine before those that it is preferred to.
    """

    def fastest(kind: str) -> Combination | None:
        return min(
            (c for c in proven if _kind(c) == kind and c in timings_ms), key=timings_ms.__getitem__, default=None
        )

    best = {kind: fastest(kind) for kind in ("cuda", "cpu")}
    gpu, cpu = best["cuda"], best["cpu"]
    cpu_first = gpu is not None and cpu is not None and timings_ms[cpu] < timings_ms[gpu]
    measured = {(c.engine, c.device) for c in proven if c in timings_ms}

    def rank(combination: Combination) -> tuple[bool, int, bool, float]:
        leader = best[_kind(combination)]
        place = 1
        if leader is not None and (combination.engine, combination.device) not in measured:
            place = 0 if proven.index(combination) < _first_of(leader, proven) else 2
        is_behind = (_kind(combination) == "cpu") != cpu_first
        return is_behind, place, combination not in timings_ms, timings_ms.get(combination, 0.0)

    return sorted(proven, key=rank)


def _first_of(combination: Combination, offered: Sequence[Combination]) -> int:
    """Return where the engine of a combination appears first."""
    return next(n for n, c in enumerate(offered) if (c.engine, c.device) == (combination.engine, combination.device))


def _unproven(
    offered: Sequence[Combination], proven: Sequence[Combination], parity: ParityReport | None
) -> list[Combination]:
    """Return what to fall back on: one precision, fp32 where it may be chosen; what failed `verify` comes last."""
    precision = min((c.precision for c in offered), key=PRECISIONS.index)
    rest = [c for c in offered if c.precision == precision and c not in proven]
    return sorted(rest, key=lambda c: parity is not None and bool(parity.failures_of(*c)))


def _reason(
    chosen: Combination, ranked: Sequence[Combination], parity: ParityReport | None, timings_ms: Timings
) -> str:
    """Say why a combination was chosen, or why it must not be trusted."""
    if chosen not in ranked:
        failed = len(parity.failures_of(*chosen)) if parity is not None else 0
        return f"{failed} limits broken" if failed else ""
    measured = sum(c in timings_ms for c in ranked)
    if chosen in timings_ms and measured > 1:
        return f"the fastest of {measured} that were measured here"
    not_measured = "; not measured here" if measured and chosen not in timings_ms else ""
    return f"preferred of {len(ranked)} proven ones{not_measured}" if len(ranked) > 1 else ""


def _kind(combination: Combination) -> str:
    """Return ``cpu`` or ``cuda``."""
    return combination.device.partition(":")[0]


def _devices(wish: str) -> dict[str, str]:
    """Return kind -> name of the devices that a wish allows."""
    if wish == "auto":
        return {"cuda": "cuda:0", "cpu": "cpu"}
    gpu = gpu_of(wish)
    return {"cpu": "cpu"} if gpu is None else {"cuda": f"cuda:{gpu}"}


def _precisions(manifest: Manifest, wish: Precision | None) -> tuple[Precision, ...]:
    """Return the precisions that a bundle has, of which only a wish counts where there is one."""
    roles = {graph.role for graph in manifest.graphs}
    have = tuple(
        precision
        for precision in PRECISIONS
        if manifest.graph("encoder", precision) is not None
        and all(manifest.graph(role, precision) or manifest.graph(role, "fp32") for role in roles)
    )
    if wish is not None and wish not in PRECISIONS:
        raise InvalidArgumentError(f"precision {wish!r} is unknown; choose {', '.join(PRECISIONS)}")
    if not have or (wish is not None and wish not in have):
        raise MissingCapabilityError(
            f"the bundle {manifest.name!r} has no full set of graphs at {wish or 'any precision'}; it has "
            f"{', '.join(have) or 'none'}: choose one of those or export the bundle at that precision"
        )
    return have if wish is None else (wish,)
