"""What ``benchmark`` prints: rows of numbers, and sentences about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dendsam_deploy.bundle.latency import CombinationRecord, LatencyReport, LatencyRow, Ratio
    from dendsam_deploy.evaluate.regression import Change, RegressionReport

_SLOW_MACHINE = 0.9
_WORDS = 5
"""Columns on the left that hold words."""

_WHAT = ("level", "name", "engine", "device", "prec.", "batch")
_RATIOS = {
    "end_to_end_over_encoder": "the throughput of the encoder alone",
    "over_torch_reference": "the throughput of the torch modules",
}


def benchmark_table(report: LatencyReport) -> str:
    """Write what was measured, one line for each row, and what follows from it."""
    columns = ("n", "median ms", "p90 ms", "p99 ms", "MAD ms", "per second", "GFLOP/s", "of peak", "RSS MB", "GPU MB")
    table = _aligned([(*_WHAT, *columns), *map(_row_cells, report.rows)])
    return "\n".join([*_subject(report), "", *table, "", *_findings(report)])


def change_table(change: RegressionReport) -> str:
    """Write then and now, one line for each row that both files have."""
    columns = ("then ms", "now ms", "now/then", "95 % interval", "verdict")
    lines = _aligned([(*_WHAT, *columns), *map(_change_cells, change.changes)])
    faster = sum(row.verdict == "faster" for row in change.changes)
    lines.append(
        f"{len(change.slower)} slower, {faster} faster, of {len(change.changes)}; "
        f"{change.only_then} rows only then, {change.only_now} only now"
    )
    if change.machine_ratio is not None:
        remark = ": the machine itself was slower, or busy" if change.machine_ratio < _SLOW_MACHINE else ""
        lines.append(f"matrix products ran at {change.machine_ratio:.2f} of the rate then{remark}")
    return "\n".join(lines)


def _subject(report: LatencyReport) -> Iterator[str]:
    """Say what was measured, and where."""
    host, settings = report.host, report.settings
    machine = ", ".join([host["processor"], f"{host['cpu_cores']} cores", *host["gpus"]])
    yield f"{report.bundle} on {machine}; load before: {host['load_average']}"
    height, width = settings["slice_hw"]
    yield f"{settings['subject']}, {height} x {width} px, {settings['boxes_per_slice'] or 'detected'} objects in each"


def _findings(report: LatencyReport) -> Iterator[str]:
    """Say what follows from the rows."""
    for peak in report.matrix_peaks:
        rate = _short(peak.gflop_per_second)
        yield f"matrix products by {peak.by} on {peak.device} at {peak.precision}: {rate} GFLOP/s"
    yield from map(_start, report.combinations)
    yield from map(_ratio, report.ratios)
    for estimate in report.estimates:
        height, width = estimate.slice_hw
        yield (
            f"{estimate.slices} slices of {height} x {width} px take about {estimate.hours:.2g} hours here, by "
            f"{estimate.engine} on {estimate.device} at {estimate.precision}; from {estimate.basis}"
        )
    for row in report.left_out:
        what = ", ".join(filter(None, (f"{row.engine} on {row.device}", row.precision, row.row)))
        yield f"left out: {what}: {row.reason}"


def _start(record: CombinationRecord) -> str:
    """Say how long a fresh process needs."""
    text = (
        f"{record.engine} on {record.device} at {record.precision}: graphs loaded after {record.load_ms / 1000:.1f} s"
    )
    if record.first_result_ms is not None:
        text += f", first slice after {record.first_result_ms / 1000:.1f} s"
    return text if record.is_proven or record.is_reference else f"{text}; unproven: run `dendsam-deploy verify`"


def _ratio(ratio: Ratio) -> str:
    """Say a ratio."""
    what = ratio.row if ratio.batch == 1 else f"{ratio.row}, {ratio.batch} at once"
    place = f"{ratio.engine} on {ratio.device} at {ratio.precision}"
    return f"{what}, {place}: {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) times {_RATIOS[ratio.name]}"


def _row_cells(row: LatencyRow) -> tuple[str, ...]:
    """Write the numbers of a row."""
    rate = f"{_short(row.per_second)} {row.plural}"
    if row.megavoxels_per_second is not None and row.level != "stage":
        rate = f"{_short(row.megavoxels_per_second)} Mvx"
    return (
        *_what(row),
        str(len(row.samples_ms)),
        *map(_short, (row.median_ms, row.p90_ms, row.p99_ms, row.mad_ms)),
        rate,
        _short(row.gflop_per_second),
        "" if row.of_peak is None else f"{row.of_peak:.0%}",
        _short(row.peak_rss_mb),
        _short(row.peak_device_mb),
    )


def _change_cells(change: Change) -> tuple[str, ...]:
    """Write the numbers of a comparison."""
    return (
        *_what(change.row),
        _short(change.then_ms),
        _short(change.row.median_ms),
        f"{change.ratio:.2f}",
        f"{change.low:.2f} to {change.high:.2f}",
        change.verdict,
    )


def _what(row: LatencyRow) -> tuple[str, ...]:
    """Name a row."""
    return row.level, row.name, row.engine, row.device, row.precision, str(row.batch)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Write cells below each other: words to the left, numbers to the right; columns that are empty are left out."""
    filled = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in filled}
    return [
        "  ".join(
            row[column].ljust(widths[column]) if column < _WORDS else row[column].rjust(widths[column])
            for column in filled
        ).rstrip()
        for row in rows
    ]


def _short(value: float | None) -> str:
    """Write a number with three digits that count, or all before the point; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
