"""How fast is a bundle on this machine? Graphs, stages, slices and a volume, engines side by side.

Method. Each combination of engine, device and precision is loaded in a process of its own, which does nothing between
its turns. What is compared alternates sample by sample, and the order rotates, so that a machine that becomes slower
becomes slower for all. Warm-up is apart and reported. No sample repeats the input of the one before it, and nothing is
kept between samples. Durations are taken inside the process, around calls that return when the result is there.

References
----------
Reddi et al. 2020, "MLPerf Inference Benchmark", arXiv:1911.02549: single-stream percentiles, no caching.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.latency import BENCHMARK_FILE, LatencyReport, LeftOut, graph_digests, latency_to_json
from dendsam_deploy.durable import write_text
from dendsam_deploy.errors import CheckpointError, StorageError
from dendsam_deploy.evaluate.latency_lanes import (
    Course,
    count_operations,
    encoded_tiles,
    measure_alternating,
    measure_peaks,
    measure_volume,
    open_lanes,
)
from dendsam_deploy.evaluate.latency_plan import BenchmarkOptions, Subject, choose_combinations, choose_subject
from dendsam_deploy.evaluate.latency_rows import Rates, estimate_volume, in_order, ratios_of, rows_of
from dendsam_deploy.host import examine_host
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress

__all__ = ["BenchmarkOptions", "benchmark_bundle"]


def benchmark_bundle(
    path: Path, options: BenchmarkOptions | None = None, progress: ProgressCallback = no_progress
) -> LatencyReport:
    """Measure a bundle on this machine.

    Parameters
    ----------
    path : Path
        The bundle.
    options : BenchmarkOptions, optional
        What to measure, and for how long.
    progress : callable
        Told what is being measured.

    Returns
    -------
    LatencyReport
        `store_report` puts it into the bundle.

    Raises
    ------
    BundleError, UnsafeFileError, VolumeError, CheckpointError
        Where a file cannot be used.
    InvalidArgumentError
        For an engine, device or precision that does not exist.
    MissingCapabilityError
        Where one that was asked for does not work here, or nothing does.
    """
    given = options or BenchmarkOptions()
    host = examine_host()
    bundle = Bundle.open(path)
    for checkpoint in (given.sam, given.detector):
        if checkpoint is not None and not checkpoint.is_file():
            raise CheckpointError(f"{checkpoint}: no such file; give the checkpoint that the bundle was exported from")
    with tempfile.TemporaryDirectory(prefix="dendsam-benchmark-") as folder, ExitStack() as stack:
        workspace = Path(folder)
        course = Course(given.settled, workspace, progress)
        wanted, left_out = choose_combinations(bundle, course.options)
        course.left_out += left_out
        subject = choose_subject(bundle.manifest, course.options, workspace)
        lanes = open_lanes(bundle, wanted, subject, course, stack)
        peaks = measure_peaks(lanes, course)
        measure_alternating(lanes, course)
        if "volume" in course.options.levels:
            measure_volume(lanes, subject, course)
        rates = Rates(count_operations(lanes, course), peaks)
        left_out = tuple(_without_paths(row, bundle.path, workspace, subject.volume) for row in course.left_out)
    rows = in_order(row for lane in lanes for row in rows_of(lane.measured, subject, rates, course.options.levels))
    tiles = encoded_tiles(lanes)
    estimate = estimate_volume(rows, subject, bundle.manifest, tiles)
    progress(Progress("benchmark", given.settled.seconds, given.settled.seconds))
    return LatencyReport(
        bundle=bundle.manifest.name,
        graphs=graph_digests(bundle.manifest),
        created_utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        host=host.to_document(),
        command=_command(path, given),
        settings=_settings(subject, course.options, tiles),
        combinations=tuple(lane.record for lane in lanes),
        rows=tuple(rows),
        ratios=tuple(ratios_of(rows, tiles)),
        matrix_peaks=peaks,
        estimates=() if estimate is None else (estimate,),
        left_out=left_out,
    )


def check_storable(path: Path) -> None:
    """Find out before measuring that the report cannot be put into the bundle.

    Raises
    ------
    StorageError
        Where its folder may not be written to.
    """
    if path.is_dir() and not os.access(path, os.W_OK):
        raise StorageError(f"{path}: {BENCHMARK_FILE} cannot be written there; copy the bundle and measure the copy")


def store_report(path: Path, report: LatencyReport) -> Path:
    """Write ``benchmark.json`` into a bundle, in place of an earlier one.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    file = path / BENCHMARK_FILE
    write_text(file, latency_to_json(report))
    return file


def _settings(subject: Subject, options: BenchmarkOptions, tiles: int) -> dict[str, object]:
    """Return what was decided, as JSON values."""
    return {
        "subject": subject.name,
        "slice_hw": list(subject.shape_zyx[1:]),
        "tiles_per_slice": tiles,
        "boxes_per_slice": subject.boxes,
        "threads": options.threads,
        "levels": list(options.levels),
        "repeats": options.repeats,
        "seconds": options.seconds,
    }


def _command(path: Path, options: BenchmarkOptions) -> str:
    """Return the command that measures the same; of paths only the names, which say nothing about the machine."""
    words = ["dendsam-deploy", "benchmark", path.resolve().name]
    default = BenchmarkOptions()
    for flag, name in (
        ("--engine", "engines"),
        ("--device", "devices"),
        ("--precision", "precisions"),
        ("--threads", "threads"),
        ("--trust-engine", "trusted_engines"),
        ("--volume", "volume"),
        ("--voxel-size", "voxel_size_nm"),
        ("--boxes", "boxes"),
        ("--levels", "levels"),
        ("--repeats", "repeats"),
        ("--seconds", "seconds"),
        ("--sam", "sam"),
        ("--detector", "detector"),
    ):
        value = getattr(options, name)
        if value == getattr(default, name):
            continue
        if name in ("engines", "devices", "precisions", "trusted_engines"):
            words += [word for each in value for word in (flag, each)]
        elif isinstance(value, tuple):
            words += [flag, ",".join(part if isinstance(part, str) else f"{part:g}" for part in value)]
        else:
            words += [flag, value.name if isinstance(value, Path) else f"{value:g}"]
    return shlex.join([*words, "--quick"] if options.quick else words)


def _without_paths(row: LeftOut, *paths: Path) -> LeftOut:
    """Return a row whose reason names files without their folders."""
    reason = row.reason
    for path in paths:
        for folder in {str(path), str(path.resolve())}:
            reason = reason.replace(folder, path.name)
    return LeftOut(row.engine, row.device, row.precision, row.row, reason)
