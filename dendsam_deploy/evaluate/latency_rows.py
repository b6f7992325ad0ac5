"""From samples to the rows of a report, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.latency import LEVELS, TORCH_REFERENCE, LatencyRow, Level, MatrixPeak, Ratio, VolumeEstimate
from dendsam_deploy.evaluate.latency_bench import Case, Sample
from dendsam_deploy.evaluate.latency_statistics import ratio_interval, summarise
from dendsam_deploy.pipeline.prepare import plan_tiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dendsam_deploy.bundle.manifest import Manifest
    from dendsam_deploy.bundle.parity import Combination
    from dendsam_deploy.evaluate.latency_plan import Subject

SLICE = Case("slice", "slice")

_GRAPHS = ("detector", "encoder", "decoder")
_UNITS = {"detector": "tile", "encoder": "tile", "decoder": "box"}
_USUAL_SLICES, _USUAL_HW = 1000, (2048, 2048)


@dataclass(slots=True)
class Measurements:
    """Samples of one combination, by what they executed; `warmup` holds those that do not count."""

    combination: Combination
    samples: dict[Case, list[Sample]] = field(default_factory=dict)
    warmup: dict[Case, list[Sample]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rates:
    """What turns times into rates.

    Parameters
    ----------
    flop : dict
        Useful operations, and those of segment_anything's encoder, of a call of a graph.
    peaks : tuple of MatrixPeak
        Rates of matrix products.
    """

    flop: dict[Case, tuple[float | None, float | None]]
    peaks: tuple[MatrixPeak, ...]

    def of_row(self, row: LatencyRow, case: Case) -> LatencyRow:
        """Return the row with its rates."""
        useful, reference = self.flop.get(case, (None, None))
        if not useful:
            return row
        rate = useful / row.median_ms / 1e6
        best = max((p.gflop_per_second for p in self.peaks if _is_of(p, row)), default=None)
        return replace(
            row,
            flop=useful,
            reference_flop=reference,
            gflop_per_second=rate,
            of_peak=None if best is None else rate / best,
        )


def rows_of(measured: Measurements, subject: Subject, rates: Rates, levels: Sequence[Level]) -> list[LatencyRow]:
    """Return the rows of one combination."""
    rows = []
    for case, samples in measured.samples.items():
        warmup = measured.warmup.get(case, [])
        if case.level in levels and samples:
            rows.append(rates.of_row(_row(measured.combination, case, samples, warmup, subject), case))
        if case.level == "slice" and "stage" in levels:
            rows += _stage_rows(measured.combination, samples, subject)
    return rows


def in_order(rows: Iterable[LatencyRow]) -> list[LatencyRow]:
    """Return rows level by level, with what is compared side by side and the fastest of it first."""
    listed = list(rows)
    names = [*_GRAPHS, *dict.fromkeys(row.name for row in listed if row.level != "graph")]

    def place(row: LatencyRow) -> tuple[int, int, int, int, float]:
        name, _, region = row.name.partition(":")
        return LEVELS.index(row.level), names.index(name), int(region or 0), row.batch, row.median_ms

    return sorted(listed, key=place)


def ratios_of(rows: Sequence[LatencyRow], tiles: int) -> list[Ratio]:
    """Return what follows from rows: end-to-end over encoder-only throughput, and each row over the torch reference.

    Parameters
    ----------
    rows : sequence of LatencyRow
        Of all combinations.
    tiles : int
        Tiles that are encoded for one slice.
    """
    found = []
    for row in rows:
        if row.level in ("slice", "volume"):
            encoders = [r for r in rows if (r.combination, r.name) == (row.combination, "encoder")]
            if encoders and tiles:
                encoder = min(encoders, key=lambda r: r.median_ms / r.batch)
                found.append(_ratio("end_to_end_over_encoder", row, encoder, tiles * row.batch / encoder.batch))
        reference = next((r for r in rows if r.engine == TORCH_REFERENCE and _is_same_work(r, row)), None)
        if reference is not None and row.engine != TORCH_REFERENCE:
            found.append(_ratio("over_torch_reference", row, reference))
    return found


def estimate_volume(
    rows: Sequence[LatencyRow], subject: Subject, manifest: Manifest, tiles: int
) -> VolumeEstimate | None:
    """Say how long a volume takes with the fastest combination: the user's own, or a thousand slices of 2048 x 2048.

    Parameters
    ----------
    rows : sequence of LatencyRow
        Of all combinations.
    subject : Subject
        The slices that were measured.
    manifest : Manifest
        How slices are cut.
    tiles : int
        Tiles of one measured slice.
    """
    for level in ("volume", "slice"):
        of_level = [row for row in rows if row.level == level and row.engine != TORCH_REFERENCE]
        if of_level:
            break
    else:
        return None
    best = min(of_level, key=lambda row: row.median_ms / row.batch)
    slice_s = best.median_ms / best.batch / 1000
    how = f"a run of {best.batch} slices" if level == "volume" else f"{len(best.samples_ms)} single slices"
    if not subject.is_synthetic:
        slices, slice_hw = subject.shape_zyx[0], subject.shape_zyx[1:]
        basis = f"{how} of {subject.name}"
    else:
        slices, slice_hw = _USUAL_SLICES, _USUAL_HW
        usual_tiles = len(plan_tiles(slice_hw, manifest.preprocessing, None, 1.0).tiles)
        slice_s *= usual_tiles / max(tiles, 1)
        basis = f"{how} of one tile with {subject.boxes} objects, for slices of {usual_tiles} such tiles at zoom 1"
    return VolumeEstimate(*best.combination, slices, slice_hw, slices * slice_s / 3600, basis)


def _row(
    combination: Combination, case: Case, samples: Sequence[Sample], warmup: Sequence[Sample], subject: Subject
) -> LatencyRow:
    """Summarise the samples of one case."""
    times = [sample.total_ms for sample in samples]
    summary = summarise(times)
    is_graph = case.level == "graph"
    per_second = case.batch * 1000 / summary.median_ms
    return LatencyRow(
        level=case.level,
        name=case.name if case.region is None else f"{case.name}:{case.region}",
        engine=combination.engine,
        device=combination.device,
        precision=combination.precision,
        batch=case.batch,
        unit=_UNITS.get(case.name, "slice"),
        boxes=None if is_graph else subject.boxes,
        objects=_mean(sample.objects for sample in samples),
        samples_ms=tuple(times),
        warmup_ms=tuple(sample.total_ms for sample in warmup),
        median_ms=summary.median_ms,
        p90_ms=summary.p90_ms,
        p99_ms=summary.p99_ms,
        mad_ms=summary.mad_ms,
        per_second=per_second,
        megavoxels_per_second=None if is_graph else per_second * _slice_voxels(subject) / 1e6,
        peak_rss_mb=_most(sample.rss_mb for sample in (*warmup, *samples)),
        peak_device_mb=_most(sample.device_mb for sample in (*warmup, *samples)),
    )


def _stage_rows(combination: Combination, samples: Sequence[Sample], subject: Subject) -> list[LatencyRow]:
    """Summarise the stages of slices."""
    rows = []
    for stage in dict.fromkeys(stage for sample in samples for stage in sample.stage_ms):
        times = [sample.stage_ms[stage] for sample in samples if sample.stage_ms.get(stage, 0) > 0]
        if times:
            parts = [Sample(ms) for ms in times]
            rows.append(replace(_row(combination, Case("stage", stage), parts, (), subject), unit="slice"))
    return rows


def _ratio(name: str, row: LatencyRow, base: LatencyRow, scale: float = 1.0) -> Ratio:
    """Return the throughput of a row over that of another, which does the work `scale` times."""
    value = scale * base.median_ms / row.median_ms
    low, high = (scale * bound for bound in ratio_interval(base.samples_ms, row.samples_ms))
    return Ratio(name, row.level, row.name, row.batch, *row.combination, value, low, high)


def _is_same_work(one: LatencyRow, other: LatencyRow) -> bool:
    """Tell whether two rows are about the same work, on whatever."""
    return (one.level, one.name, one.batch, one.boxes) == (other.level, other.name, other.batch, other.boxes)


def _is_of(peak: MatrixPeak, row: LatencyRow) -> bool:
    """Tell whether a peak is what a row is compared with."""
    return (peak.device, peak.precision) == (row.device, row.precision)


def _slice_voxels(subject: Subject) -> int:
    """Return the voxels of one slice."""
    return subject.shape_zyx[1] * subject.shape_zyx[2]


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _most(values: Iterable[float | None]) -> float | None:
    """Return the largest of the values that are known."""
    return max((value for value in values if value is not None), default=None)
