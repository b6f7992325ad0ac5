"""The record that a run is complete: ``run.json``, written last."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dendsam_deploy.durable import published
from dendsam_deploy.pipeline.journal import DETECTIONS_FILE, INSTANCES_FILE, RUN_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from dendsam_deploy.pipeline.job import Job

SCHEMA_VERSION = 1
"""Version of ``run.json``."""

_THREADS = (("read", "prepare"), ("detect", "encode", "decode", "paint"), ("write",), ("link",), ("publish",))
"""Stages that share a thread; the first three threads run side by side."""


@dataclass(frozen=True, slots=True)
class SegmentResult:
    """What `segment_volume` did.

    Parameters
    ----------
    out : Path
        The folder.
    slices, objects_2d, objects_3d : int
        Slices of the result, objects counted slice by slice, and 3-D objects.
    seconds : float
        Duration of the call that completed the run.
    stage_seconds : dict
        Duration of each stage, summed over slices, also of earlier calls. Reading and writing run beside the rest.
    limiting_stage : str
        The longest stage of the busiest thread.
    engine, device, precision : str
        What executed the graphs.
    fingerprint : str
        Digest of everything that decides the result.
    resumed_slices : int
        Slices that earlier calls had finished.
    notices : tuple of str
        What a careful person should know about this result.
    """

    out: Path
    slices: int
    objects_2d: int
    objects_3d: int
    seconds: float
    stage_seconds: dict[str, float]
    limiting_stage: str
    engine: str
    device: str
    precision: str
    fingerprint: str
    resumed_slices: int
    notices: tuple[str, ...]

    def to_document(self) -> dict[str, Any]:
        """Return the result as JSON values, with the keys of ``segment --json``."""
        return {**asdict(self), "out": str(self.out), "notices": list(self.notices)}


def write_record(job: Job, result: SegmentResult) -> None:
    """Write ``run.json``: the result, the settings, the environment, and the outputs with their sizes in bytes.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "input": job.volume.info.source,
        "z_offset": job.output.slices.start,
        "result": result.to_document(),
        "settings": job.journal.header.settings,
        "outputs": _output_sizes(job),
        "environment": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "packages": _package_versions(),
            "compiled_engines": job.session.compiled_engines,
            "trusted_engines": list(job.session.trusted_engines),
        },
    }
    with published(job.journal.folder / RUN_FILE) as stream:
        stream.write(json.dumps(document, indent=2).encode() + b"\n")


def completed_result(job: Job) -> SegmentResult | None:
    """Return the result of a run that is complete and whose outputs are all there; None otherwise."""
    path = job.journal.folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_bytes())
        known = {field.name for field in fields(SegmentResult)}
        values = {name: value for name, value in document["result"].items() if name in known}
        result = SegmentResult(**{**values, "out": job.journal.folder, "notices": tuple(values["notices"])})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged: it is written anew from the slices
    is_this_run = result.fingerprint == job.journal.header.fingerprint
    return result if is_this_run and document.get("outputs") == _output_sizes(job) else None


def sum_stages(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Add up the seconds of each stage, in the order in which a slice meets them."""
    total = dict.fromkeys((stage for thread in _THREADS for stage in thread), 0.0)
    for part in parts:
        for stage, seconds in part.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return {stage: round(seconds, 4) for stage, seconds in total.items()}


def limiting_stage(stage_seconds: dict[str, float]) -> str:
    """Return the longest stage of the thread that was busy for longest."""
    busiest = max(_THREADS, key=lambda stages: sum(stage_seconds[stage] for stage in stages))
    return max(busiest, key=lambda stage: stage_seconds[stage])


def _output_sizes(job: Job) -> dict[str, int | None]:
    """Return the size of each output file, -1 for a folder, None for what is missing."""
    folder = job.journal.folder
    paths = [job.output.labels_path(folder), folder / DETECTIONS_FILE, folder / INSTANCES_FILE]
    return {path.name: path.stat().st_size if path.is_file() else (-1 if path.is_dir() else None) for path in paths}


def _package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that take part in the arithmetic."""
    names = ("numpy", "scipy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")
    installed = {name: list(metadata.Distribution.discover(name=name)) for name in names}
    return {name: found[0].version for name, found in installed.items() if found}
