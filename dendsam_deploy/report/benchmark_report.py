"""The page of a benchmark: how fast, how sure, where the time goes, and how far from what the machine can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dendsam_deploy.durable import published
from dendsam_deploy.report.figures import rate_curves, sample_strips, waterfall
from dendsam_deploy.report.page import render_page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dendsam_deploy.bundle.latency import LatencyReport, LatencyRow
    from dendsam_deploy.bundle.parity import Combination

_STAGES = ("read", "prepare", "detect", "encode", "decode", "paint")
"""Stages in the order in which a slice meets them; a name that is not listed comes last."""

_RATIOS = {
    "end_to_end_over_encoder": "throughput of the whole over that of the encoder alone",
    "over_torch_reference": "throughput over that of the original torch modules",
}


def write_benchmark_report(path: Path, report: LatencyReport) -> None:
    """Write the page of a benchmark, whole or not at all.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    with published(path) as stream:
        stream.write(render_benchmark_report(report).encode())


def render_benchmark_report(report: LatencyReport) -> str:
    """Return the page of a benchmark."""
    fastest = _fastest(report)
    content = {
        "report": report,
        "fastest": fastest,
        "fastest_ms": None if fastest is None else report.slice_ms[fastest],
        "encoder": _best_row(report, "encoder"),
        "charts": _charts(report, fastest),
        "ratio_names": _RATIOS,
        "environment": _environment(report),
        "settings": {
            name: "as found or planned" if value is None else value for name, value in report.settings.items()
        },
        "has_gpu": any(row.peak_device_mb is not None for row in report.rows),
        "label": _label,
        "samples": sum(len(row.samples_ms) for row in report.rows if row.level != "stage"),
    }
    return render_page("benchmark.html.jinja", content)


def _fastest(report: LatencyReport) -> Combination | None:
    """Return the combination with the fastest slices."""
    return min(report.slice_ms, key=report.slice_ms.__getitem__, default=None)


def _best_row(report: LatencyReport, name: str) -> LatencyRow | None:
    """Return the fastest row of a graph, by unit of work."""
    rows = [row for row in report.of_level("graph") if row.name == name]
    return max(rows, key=lambda row: row.per_second, default=None)


def _charts(report: LatencyReport, fastest: Combination | None) -> dict[str, str]:
    """Draw the charts of the page; what was not measured has none."""
    charts = {}
    stages = {
        row.name: row.median_ms
        for row in sorted(report.of_level("stage"), key=lambda row: _place(row.name))
        if row.combination == fastest
    }
    if stages:
        charts["waterfall"] = waterfall(stages)
    if slices := report.of_level("slice"):
        charts["slice"] = sample_strips(_by_combination(slices), "one slice")
    graphs = report.of_level("graph")
    for name in ("encoder", "detector"):
        rows = [row for row in graphs if row.name == name and row.batch == 1]
        if rows:
            charts[name] = sample_strips(_by_combination(rows), f"one call of the {name}")
    decoders = [row for row in graphs if row.name == _usual_decoder(graphs)]
    if decoders:
        most = max(row.batch for row in decoders)
        charts["decoder"] = sample_strips(
            _by_combination([row for row in decoders if row.batch == most]), f"{most} boxes in one call of the decoder"
        )
        charts["boxes"] = rate_curves(_rates(decoders), "boxes in one call of the decoder", "boxes per second")
    return charts


def _usual_decoder(rows: Sequence[LatencyRow]) -> str:
    """Return the name of the decoder's rows on the region at which several numbers of boxes were measured."""
    names = [row.name for row in rows if row.unit == "box"]
    return max(names, key=names.count, default="")


def _by_combination(rows: Sequence[LatencyRow]) -> dict[str, tuple[float, ...]]:
    """Return the samples of rows by what executed them, the fastest first."""
    ordered = sorted(rows, key=lambda row: row.median_ms)
    return {_label(row.combination): row.samples_ms for row in ordered}


def _rates(rows: Sequence[LatencyRow]) -> dict[str, list[tuple[int, float]]]:
    """Return pairs of batch and rate, by what executed them."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row.batch):
        curves.setdefault(_label(row.combination), []).append((row.batch, row.per_second))
    return curves


def _label(combination: Combination) -> str:
    """Name a combination briefly."""
    engine, device, precision = combination
    return f"{engine}, {precision}" if device == "cpu" else f"{engine}, {device}, {precision}"


def _place(stage: str) -> int:
    """Return where a stage stands in the order."""
    return _STAGES.index(stage) if stage in _STAGES else len(_STAGES)


def _environment(report: LatencyReport) -> dict[str, str]:
    """Return the facts about the machine, as they are to be read."""
    facts = {
        name.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in report.host.items()
        if name != "packages" and value not in (None, [], "")
    }
    packages = report.host.get("packages", {})
    return {**facts, "packages": ", ".join(f"{name} {version}" for name, version in packages.items())}
