"""``info``: what a volume, a checkpoint, a bundle or a run is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from dendsam_deploy.cli.options import PATH, command, extra, json_option

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console

Facts = dict[str, Any]

_CHECKPOINT_SUFFIXES = (".pt", ".pth")


@command("info", "info ca1.tif")
@click.argument("path", type=PATH)
@json_option
@click.pass_context
def info(context: click.Context, path: Path, json_file: Path | None) -> None:
    """Say what a volume, a checkpoint, a bundle or a result is.

    PATH is an image or label volume, a checkpoint of SAM or YOLO, an ONNX file, a bundle, or the folder that segment
    made.
    """
    console: Console = context.obj
    facts = describe(path)
    console.result(_listed(facts), facts, json_file)


def describe(path: Path) -> Facts:
    """Return the facts of a path, among them its ``kind``: volume, sam, detector, graph, bundle or run."""
    from dendsam_deploy.bundle.bundle import MANIFEST_FILE
    from dendsam_deploy.pipeline.journal import JOURNAL_FILE

    if (path / MANIFEST_FILE).is_file():
        return _bundle_facts(path)
    if (path / JOURNAL_FILE).is_file():
        return _run_facts(path)
    if path.suffix.lower() in _CHECKPOINT_SUFFIXES:
        return _checkpoint_facts(path)
    if path.suffix.lower() == ".onnx":
        return _graph_facts(path)
    return _volume_facts(path)


def _graph_facts(path: Path) -> Facts:
    """Describe an ONNX file outside a bundle, such as a detector that `export` is to take."""
    from dendsam_deploy.runtimes.portable import graph_signature

    return {"kind": "graph", "path": str(path), **graph_signature(path)}


def _volume_facts(path: Path) -> Facts:
    """Describe an image or label volume from what its files record."""
    from dendsam_deploy.volume.open import open_volume

    with open_volume(path) as volume:
        found = volume.info
    return {
        "kind": "volume",
        "path": found.source,
        "format": found.format,
        "encoding": found.detail,
        "shape_zyx": list(found.shape_zyx),
        "dtype": found.dtype.name,
        "voxel_size_nm": None if found.voxel_size_nm is None else list(found.voxel_size_nm),
    }


def _checkpoint_facts(path: Path) -> Facts:
    """Describe weights; which library made them is told from the names in the file, before anything is loaded."""
    from dendsam_deploy.models.pickled_names import pickled_names

    if any(name.startswith("ultralytics.") for name in pickled_names(path)):
        with extra("train"):
            from dendsam_deploy.models.detector import load_detector
        detector = load_detector(path)
        return {
            "kind": "detector",
            "path": str(path),
            "architecture": detector.architecture,
            "image_size_px": detector.image_size_px,
            "classes": list(detector.class_names),
            "sha256": detector.sha256,
            "training": None if detector.record is None else dataclasses.asdict(detector.record),
        }
    with extra("train"):
        from dendsam_deploy.models.weights import load_sam
    sam = load_sam(path)
    return {
        "kind": "sam",
        "path": str(path),
        "architecture": sam.record.model_type,
        "image_size_px": sam.record.image_size,
        "model_pixel_size_nm": sam.record.model_pixel_size_nm,
        "zoom": sam.record.zoom,
        "sha256": sam.sha256,
        "training": sam.record.summary or None,
    }


def _bundle_facts(path: Path) -> Facts:
    """Describe a bundle after checking the digests of its files."""
    from dendsam_deploy.bundle.bundle import Bundle

    bundle = Bundle.open(path)
    manifest = bundle.manifest
    return {
        "kind": "bundle",
        "path": str(path),
        "name": manifest.name,
        "created_utc": manifest.created_utc,
        "licence": manifest.licence,
        "model_type": manifest.model_type,
        "sources": [f"{source.role} {source.kind}: {source.checkpoint.file}" for source in manifest.sources],
        "graphs": [f"{graph.role} {graph.precision}: {graph.files[0].file}" for graph in manifest.graphs],
        "tile_size_px": manifest.preprocessing.tile_size_px,
        "model_pixel_size_nm": manifest.preprocessing.model_pixel_size_nm,
        "zoom": manifest.preprocessing.zoom,
        "parity": "unproven" if bundle.parity is None else "passed" if bundle.parity.passed else "failed",
    }


def _run_facts(path: Path) -> Facts:
    """Describe the result of ``segment``, finished or not."""
    from dendsam_deploy.pipeline.journal import LABEL_FILES, read_journal

    journal = read_journal(path)
    labels = [name for name in LABEL_FILES.values() if (path / name).exists()]
    return {
        "kind": "run",
        "path": str(path),
        "finished_slices": len(journal.entries),
        "objects_2d": sum(entry.objects for entry in journal.entries.values()),
        "labels": str(path / labels[0]) if labels else None,
        "fingerprint": journal.header.fingerprint,
        "settings": journal.header.settings,
    }


def _listed(facts: Facts) -> str:
    """Write facts as lines; what is unknown is said to be. The many settings of a run are left to --json."""
    return "\n".join(
        f"{key:<20} {_written(value)}" for key, value in facts.items() if value != "" and key != "settings"
    )


def _written(value: object) -> str:
    """Write a fact for people."""
    if value is None:
        return "not recorded"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_written(item)}" for key, item in value.items())
    return str(value)
