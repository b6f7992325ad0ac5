"""The lanes of a benchmark: combinations that are loaded side by side and take turns, and the time that it may take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.latency import TORCH_REFERENCE, CombinationRecord, LeftOut, MatrixPeak
from dendsam_deploy.bundle.parity import Combination
from dendsam_deploy.errors import DendsamError, MissingCapabilityError
from dendsam_deploy.evaluate.latency_bench import Case
from dendsam_deploy.evaluate.latency_plan import BenchmarkOptions, Subject, bench_setup, graph_cases
from dendsam_deploy.evaluate.latency_rows import SLICE, Measurements
from dendsam_deploy.evaluate.latency_worker import Worker
from dendsam_deploy.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import ExitStack
    from pathlib import Path

    from dendsam_deploy.bundle.bundle import Bundle

_LEAST_SAMPLES = 3
_QUICK_CALL_MS, _WARM_CALLS = 50.0, 3
_MOST_VOLUME_SLICES = 16

_MOST_OF_TIME = 1 / 20
"""Part of the whole time that one row may take with more than the fewest samples."""

_TOLERATED_OVERRUN = 1.3


@dataclass(slots=True)
class Lane:
    """One combination: its worker, and what was measured on it."""

    worker: Worker
    record: CombinationRecord
    measured: Measurements
    cases: tuple[Case, ...]

    @property
    def slice_ms(self) -> float:
        """Duration of its first slice."""
        first = self.measured.warmup.get(SLICE)
        return first[0].total_ms if first else 0.0

    def take(self, case: Case, index: int) -> None:
        """Take a sample that counts."""
        self.measured.samples.setdefault(case, []).append(self.worker.take(case, index))


@dataclass(slots=True)
class Course:
    """A benchmark on its way: the time that it may take, and what had to be left out.

    Parameters
    ----------
    options : BenchmarkOptions
        What was asked for.
    workspace : Path
        Folder for results that nobody wants.
    progress : callable
        Told what is being measured.
    started : float
        Reading of the clock at the beginning.
    left_out : list of LeftOut
        What was not measured so far.
    """

    options: BenchmarkOptions
    workspace: Path
    progress: ProgressCallback
    started: float = field(default_factory=time.perf_counter)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.started

    @property
    def left_s(self) -> float:
        """Seconds that are left of those that it was to take."""
        return max(0.0, self.options.seconds - self.elapsed_s)

    def tell(self, note: str) -> None:
        """Report how far it is; a benchmark that takes longer than it was to is nearly done until it is."""
        self.progress(
            Progress("benchmark", min(self.elapsed_s, 0.99 * self.options.seconds), self.options.seconds, note)
        )

    def tell_of_preparation(self, progress: Progress) -> None:
        """Report how far an engine is with a slow preparation, such as compiling."""
        share = f", {progress.done / progress.total:.0%}" if progress.total > 1 else ""
        self.tell(f"{progress.stage}: {progress.note}{share}")

    def leave_out(self, combination: Combination, row: str | None, reason: object) -> None:
        """Note that something was not measured."""
        self.left_out.append(LeftOut(*combination, row, str(reason)))


def open_lanes(
    bundle: Bundle, wanted: Sequence[Combination], subject: Subject, course: Course, stack: ExitStack
) -> list[Lane]:
    """Load every combination, one after the other, and warm it up; leave out what fails or takes too long.

    Parameters
    ----------
    bundle : Bundle
        The bundle.
    wanted : sequence of Combination
        The preferred one first. The torch reference is added where its checkpoint is given.
    subject : Subject
        The slices.
    course : Course
        Options, and where to note what was left out.
    stack : ExitStack
        Closes the workers.

    Raises
    ------
    DendsamError
        Where an engine, a precision or the reference that was asked for fails, or everything.
    """
    options = course.options
    lanes: list[Lane] = []
    failures: dict[Combination, DendsamError] = {}
    references = [Combination(TORCH_REFERENCE, "cpu", "fp32")] if options.sam else []
    for combination in (*wanted, *references):
        if combination in wanted and _has_no_time_for_more(lanes, course):
            course.leave_out(combination, None, f"no time within {options.seconds:g} s; ask for it, or give more time")
            continue
        course.tell(f"loading {combination}")
        try:
            setup = bench_setup(bundle, combination, subject, options, course.workspace)
            worker = stack.enter_context(Worker(setup, course.tell_of_preparation))
            lanes.append(_warm_lane(worker, bundle, course))
        except DendsamError as error:
            course.leave_out(combination, None, error)
            failures[combination] = error
    wishes = {*options.engines, *options.precisions, *(combination.engine for combination in references)}
    missing = wishes - {word for lane in lanes for word in lane.measured.combination}
    for combination, failure in failures.items():
        if not lanes or missing & set(combination):
            raise failure
    return lanes


def _has_no_time_for_more(lanes: Sequence[Lane], course: Course) -> bool:
    """Tell whether one more combination, that nobody asked for, would leave too little time for those before it."""
    if not lanes or course.options.engines or course.options.precisions:
        return False
    share = (len(lanes) + 1) / len(lanes)
    sampling_s = 2 * _LEAST_SAMPLES * sum(lane.slice_ms for lane in lanes) / 1000
    return share * (course.elapsed_s + sampling_s) > _TOLERATED_OVERRUN * course.options.seconds


def _warm_lane(worker: Worker, bundle: Bundle, course: Course) -> Lane:
    """Let a worker segment its first slice, and call every graph at every shape once or more."""
    setup = worker.setup
    measured = Measurements(setup.combination)
    has_detector = any(graph.role == "detector" for graph in bundle.manifest.graphs)
    if setup.engine != TORCH_REFERENCE or setup.detector is not None or not has_detector:
        measured.warmup[SLICE] = [worker.take(SLICE, 0)]
    first_ms = (time.perf_counter() - worker.started) * 1000 if measured.warmup else None
    cases = graph_cases(bundle.manifest, worker.graphs, setup.precision, worker.encoder_batches)
    for case in cases if "graph" in course.options.levels else ():
        if case.name == "encoder" and case.batch == 1 and SLICE in measured.warmup:
            continue  # the slice has warmed it
        course.tell(f"warming up the {_spoken(case)} on {setup.combination}")
        try:
            calls = [worker.take(case, 0)]
            if calls[0].total_ms < _QUICK_CALL_MS:
                calls += [worker.take(case, index) for index in range(1, _WARM_CALLS)]
        except MissingCapabilityError as error:  # a batch that is too large, for example
            course.leave_out(setup.combination, f"{case.name}, batch {case.batch}", error)
            cases = tuple(kept for kept in cases if kept != case)
            continue
        measured.warmup[case] = calls
    record = CombinationRecord(*setup.combination, worker.graphs, worker.is_proven, worker.load_ms, first_ms)
    return Lane(worker, record, measured, cases if "graph" in course.options.levels else ())


def measure_peaks(lanes: Sequence[Lane], course: Course) -> tuple[MatrixPeak, ...]:
    """Measure the rate of matrix products by every engine, and by numpy on the CPU."""
    peaks = []
    is_measured_by_numpy = False
    for lane in lanes:
        engine, device, precision = lane.measured.combination
        if device == "cpu" and not is_measured_by_numpy:
            course.tell("measuring matrix products by numpy")
            peaks.append(MatrixPeak("numpy", device, "fp32", lane.worker.numpy_peak() / 1e9))
            is_measured_by_numpy = True
        if engine == TORCH_REFERENCE:
            continue
        course.tell(f"measuring matrix products by {lane.measured.combination}")
        if (rate := lane.worker.engine_peak()) is not None:
            peaks.append(MatrixPeak(engine, device, precision, rate / 1e9))
    return tuple(peaks)


def measure_alternating(lanes: Sequence[Lane], course: Course) -> None:
    """Take samples of everything but whole volumes: cheap things first, so that slow ones get the time they leave."""
    groups: dict[Case, list[Lane]] = {}
    for lane in lanes:
        for case in (*lane.cases, *([SLICE] if _wants_slices(lane, course.options) else [])):
            groups.setdefault(case, []).append(lane)
    ordered = sorted(groups, key=lambda case: _round_ms(case, groups[case]))
    for position, case in enumerate(ordered):
        share_s = min(course.left_s / (len(ordered) - position), _MOST_OF_TIME * course.options.seconds)
        _alternate(case, groups[case], course, share_s)


def _alternate(case: Case, lanes: Sequence[Lane], course: Course, share_s: float) -> None:
    """Let combinations take turns with one thing until there are enough samples, or the time is up."""
    until = time.perf_counter() + share_s
    least = min(_LEAST_SAMPLES, course.options.repeats)
    for turn in range(course.options.repeats):
        if turn >= least and time.perf_counter() >= until:
            return
        for place in range(len(lanes)):
            lane = lanes[(turn + place) % len(lanes)]
            course.tell(f"{_spoken(case)} on {lane.measured.combination}")
            lane.take(case, turn)


def _wants_slices(lane: Lane, options: BenchmarkOptions) -> bool:
    """Tell whether slices are sampled; a whole volume is estimated from them, too."""
    return SLICE in lane.measured.warmup and bool({"slice", "stage", "volume"} & set(options.levels))


def _round_ms(case: Case, lanes: Iterable[Lane]) -> float:
    """Return about how long one sample of each combination takes."""
    return sum(
        lane.measured.warmup[case][-1].total_ms if case in lane.measured.warmup else lane.slice_ms for lane in lanes
    )


def measure_volume(lanes: Sequence[Lane], subject: Subject, course: Course) -> None:
    """Let the combination with the fastest slices segment as much of the volume as the time allows."""
    able = [lane for lane in lanes if SLICE in lane.measured.samples and lane.worker.setup.engine != TORCH_REFERENCE]
    if not able:
        return
    best = min(able, key=lambda lane: min(sample.total_ms for sample in lane.measured.samples[SLICE]))
    slice_s = min(sample.total_ms for sample in best.measured.samples[SLICE]) / 1000
    room = subject.slices[1] - subject.slices[0]
    count = min(room, _MOST_VOLUME_SLICES, max(2, int(course.left_s / slice_s)))
    case = Case("volume", "volume", count)
    for turn in range(min(_LEAST_SAMPLES, course.options.repeats)):
        if turn and course.left_s < count * slice_s:
            return
        course.tell(f"{count} slices on {best.measured.combination}")
        best.take(case, turn)


def count_operations(lanes: Sequence[Lane], course: Course) -> dict[Case, tuple[float | None, float | None]]:
    """Count the operations of every call of a graph; one that cannot be counted has none."""
    counts: dict[Case, tuple[float | None, float | None]] = {}
    for lane in lanes:
        for case in lane.cases:
            if case not in counts:
                course.tell(f"counting the operations of the {_spoken(case)}")
                try:
                    counts[case] = lane.worker.flop(case)
                except DendsamError:
                    counts[case] = None, None
    return counts


def encoded_tiles(lanes: Sequence[Lane]) -> int:
    """Return how many tiles of a slice were encoded."""
    found = [
        sample.tiles
        for lane in lanes
        for sample in (*lane.measured.warmup.get(SLICE, ()), *lane.measured.samples.get(SLICE, ()))
        if sample.tiles is not None
    ]
    return round(sum(found) / len(found)) if found else 0


def _spoken(case: Case) -> str:
    """Name a case for people."""
    if case.name == "decoder":
        return f"decoder, {case.batch} boxes, region {case.region}"
    return f"{case.name}, {case.batch} at once" if case.batch > 1 else case.name
