"""Has something become slower? Two benchmarks of the same machine, row by row, with a rule that knows about noise.

A row is slower if its median grew by more than the tolerance *and* the interval of the ratio of the medians, by
resampling the raw samples of both files, lies above 1. It is faster if the same holds the other way round. Rows with
fewer than three samples on either side are shown and not judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dendsam_deploy.bundle.latency import LatencyReport, LatencyRow, latency_from_json
from dendsam_deploy.errors import InputFileError, InvalidArgumentError
from dendsam_deploy.evaluate.latency_statistics import ratio_interval
from dendsam_deploy.host import differences

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path
    from typing import Any

Verdict = Literal["slower", "faster", "same", "not judged"]
Divide = Literal["host", "bundle"]
"""What two files may differ in if the user says so: the machine, or the graphs."""

LEAST_SAMPLES = 3
"""Samples of a row on both sides below which it is not judged."""


@dataclass(frozen=True, slots=True)
class RegressionOptions:
    """How two benchmarks are compared.

    Parameters
    ----------
    tolerance : float
        Growth of a median that is let pass, as a fraction.
    across : tuple of {"host", "bundle"}
        What may be another one in the other file.
    """

    tolerance: float = 0.1
    across: tuple[Divide, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 10:
            raise InvalidArgumentError(f"tolerance is {self.tolerance:g}, expected 0 to 10, such as 0.1 for 10 %")


@dataclass(frozen=True, slots=True)
class Change:
    """One row then and now.

    Parameters
    ----------
    row : LatencyRow
        As it is now.
    then_ms : float
        Its median in the other file.
    ratio, low, high : float
        Median now over median then, and the interval that holds it in 95 of 100 cases.
    verdict : str
        ``slower``, ``faster``, ``same`` or ``not judged``.
    """

    row: LatencyRow
    then_ms: float
    ratio: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class RegressionReport:
    """All rows that both files have.

    Parameters
    ----------
    changes : tuple of Change
        In the order of the new report.
    only_then, only_now : int
        Rows that the other file does not have.
    machine_ratio : float or None
        Rate of matrix products now over then, the median over what both files have: far below 1 the machine itself was
        slower, or busy.
    """

    changes: tuple[Change, ...]
    only_then: int
    only_now: int
    machine_ratio: float | None

    def to_document(self) -> list[dict[str, object]]:
        """Return the comparisons as JSON values, without the samples, which both files have."""
        named = ("level", "name", "engine", "device", "precision", "batch")
        return [
            {name: getattr(change.row, name) for name in named}
            | {"then_ms": change.then_ms, "now_ms": change.row.median_ms, "ratio": change.ratio}
            | {"low": change.low, "high": change.high, "verdict": change.verdict}
            for change in self.changes
        ]

    @property
    def slower(self) -> tuple[Change, ...]:
        """What became slower."""
        return tuple(change for change in self.changes if change.verdict == "slower")


def read_report(path: Path) -> LatencyReport:
    """Read a file that ``benchmark`` wrote.

    Raises
    ------
    InputFileError
        Where it is something else, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path}: cannot be read ({error}); give the JSON file of an earlier benchmark") from error
    return latency_from_json(text, str(path))


def check_comparable(
    then: LatencyReport, host: Mapping[str, Any], graphs: Mapping[str, str], across: Collection[Divide], source: str
) -> None:
    """Refuse to compare times of different machines or bundles that the user has not said to be different.

    Parameters
    ----------
    then : LatencyReport
        The other benchmark.
    host : mapping
        This machine, as `host.HostFacts.to_document` describes it.
    graphs : mapping
        SHA-256 of the graphs that are to be measured now.
    across : collection of str
        What may be different.
    source : str
        The other file, for messages.

    Raises
    ------
    InvalidArgumentError
        Names the difference and the option that permits it.
    """
    apart = differences(then.host, dict(host))
    if apart and "host" not in across:
        raise InvalidArgumentError(
            f"{source}: measured on another machine ({'; '.join(apart)}), so times cannot be compared; measure again "
            "here, or say --across host"
        )
    changed = sorted(file for file in {*then.graphs, *graphs} if then.graphs.get(file) != graphs.get(file))
    if changed and "bundle" not in across:
        raise InvalidArgumentError(
            f"{source}: about other graphs ({', '.join(changed)} differ); measure this bundle again, or say --across "
            "bundle to compare two exports"
        )


def compare_reports(
    then: LatencyReport, now: LatencyReport, options: RegressionOptions, source: str
) -> RegressionReport:
    """Compare two benchmarks row by row; `check_comparable` says whether that makes sense.

    Raises
    ------
    InvalidArgumentError
        Where they have no row in common that can be judged: a comparison of nothing would always pass. Likewise where
        they were measured with different numbers of threads.
    """
    threads_then, threads = (report.settings.get("threads") for report in (then, now))
    if threads_then != threads:
        raise InvalidArgumentError(
            f"{source}: measured with {threads_then or 'all'} threads, now with {threads or 'all'}; use the same number"
        )
    earlier = {_key(row, then): row for row in then.rows}
    changes = tuple(
        _change(earlier[_key(row, now)], row, options.tolerance) for row in now.rows if _key(row, now) in earlier
    )
    if not any(change.verdict != "not judged" for change in changes):
        raise InvalidArgumentError(
            f"{source}: none of its {len(then.rows)} rows can be judged against the {len(now.rows)} of now; measure "
            f"the same engines, levels and slices, at least {LEAST_SAMPLES} samples each"
        )
    return RegressionReport(
        changes, len(then.rows) - len(changes), len(now.rows) - len(changes), _machine_ratio(then, now)
    )


def _change(then: LatencyRow, now: LatencyRow, tolerance: float) -> Change:
    """Judge one row."""
    ratio = now.median_ms / then.median_ms
    low, high = ratio_interval(now.samples_ms, then.samples_ms)
    verdict: Verdict = "same"
    if min(len(then.samples_ms), len(now.samples_ms)) < LEAST_SAMPLES:
        verdict = "not judged"
    elif ratio > 1 + tolerance and low > 1:
        verdict = "slower"
    elif ratio < 1 / (1 + tolerance) and high < 1:
        verdict = "faster"
    return Change(now, then.median_ms, ratio, low, high, verdict)


def _key(row: LatencyRow, report: LatencyReport) -> tuple[object, ...]:
    """Return what makes a row the same in two files; a slice of another volume is another thing."""
    subject = report.settings.get("subject"), tuple(report.settings.get("slice_hw", ()))
    return (*row.key, *(subject if row.level != "graph" else ()))


def _machine_ratio(then: LatencyReport, now: LatencyReport) -> float | None:
    """Compare the rates of matrix products."""
    earlier = {(peak.by, peak.device, peak.precision): peak.gflop_per_second for peak in then.matrix_peaks}
    ratios = sorted(
        peak.gflop_per_second / earlier[peak.by, peak.device, peak.precision]
        for peak in now.matrix_peaks
        if (peak.by, peak.device, peak.precision) in earlier
    )
    return ratios[len(ratios) // 2] if ratios else None
