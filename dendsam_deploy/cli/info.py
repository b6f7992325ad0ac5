"""``info``: what a volume, a checkpoint, a bundle or a run is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from dendsam_deploy.cli.options import PATH, command, json_option

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.models.named_weights import KnownWeights

Facts = dict[str, Any]

_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt")


@command("info", "info ca1.tif")
@click.argument("path", type=PATH)
@json_option
@click.pass_context
def info(context: click.Context, path: Path, json_file: Path | None) -> None:
    """Say what a volume, a checkpoint, a bundle or a result is.

    PATH is an image or label volume, a checkpoint of SAM or YOLO, an ONNX file, a bundle, the folder that segment made,
    or the name of known weights such as sam_vit_b. Nothing in the file is run.
    """
    console: Console = context.obj
    facts = describe(path)
    console.result(_listed(facts), facts, json_file)


def describe(path: Path) -> Facts:
    """Return the facts of a path, among them its ``kind``: volume, sam, detector, graph, bundle, run or weights."""
    from dendsam_deploy.bundle.bundle import MANIFEST_FILE
    from dendsam_deploy.models.named_weights import known_weights
    from dendsam_deploy.models.tensor_file import looks_like_checkpoint
    from dendsam_deploy.pipeline.journal import JOURNAL_FILE

    if not path.exists() and (weights := known_weights().get(str(path))):
        return _weights_facts(weights)
    if (path / MANIFEST_FILE).is_file():
        return _bundle_facts(path)
    if (path / JOURNAL_FILE).is_file():
        return _run_facts(path)
    # Caches keep weights without a suffix, and a suffix proves nothing.
    if path.suffix.lower() in _CHECKPOINT_SUFFIXES or looks_like_checkpoint(path):
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
    """Describe weights; which library made them is told from the names in the file, none of which is looked up."""
    from dendsam_deploy.models.detector_file import is_detector_file
    from dendsam_deploy.models.tensor_file import pickled_names

    return _detector_facts(path) if is_detector_file(pickled_names(path)) else _sam_facts(path)


def _sam_facts(path: Path) -> Facts:
    """Describe a checkpoint of SAM from its names and shapes."""
    from dendsam_deploy.models.checkpoint_kinds import LAYOUTS, open_sam_file
    from dendsam_deploy.models.tensor_file import sha256_of

    with open_sam_file(path) as (_, found):
        record = found.training_record(path)
        lora = found.adapters
    return {
        "kind": "sam",
        "path": str(path),
        "layout": found.layout,
        "made_as": LAYOUTS[found.layout],
        "architecture": record.model_type,
        "image_size_px": record.image_size,
        "lora_ranks": [] if lora is None else list(lora.ranks),
        "lora_parts": [] if lora is None else list(lora.parts),
        "lora_blocks": [] if lora is None else list(lora.blocks),
        "segmentation_decoder": found.has_segmentation_decoder,
        "answers_prompts": found.layout != "unetr",
        "model_pixel_size_nm": record.model_pixel_size_nm,
        "zoom": record.zoom,
        "parameters": found.parameters,
        "dtypes": sorted({tensor.dtype for tensor in found.tensors.values()}),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "trained_by": found.trained_by or None,
        "training": record.summary or found.progress or None,
        "other_objects": list(found.foreign),
    }


def _detector_facts(path: Path) -> Facts:
    """Describe a checkpoint of ultralytics from what a closed process reads in it."""
    from dendsam_deploy.models.detector_file import read_detector_file
    from dendsam_deploy.models.tensor_file import sha256_of

    found = read_detector_file(path)
    version = f"ultralytics {found.version}".strip()
    return {
        "kind": "detector",
        "path": str(path),
        "architecture": found.architecture,
        "head": found.head,
        "image_size_px": found.image_size_px,
        "classes": list(found.class_names),
        "parameters": found.parameters,
        "dtypes": sorted({array.dtype.name for array in found.tensors.values()}),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "trained_by": f"dendsam-deploy with {version}" if found.record else version,
        "date": found.date or None,
        "licence": found.licence or None,
        "training": None if found.record is None else dataclasses.asdict(found.record),
    }


def _weights_facts(weights: KnownWeights) -> Facts:
    """Describe an entry of the registry of known weights, and whether its file is on this machine."""
    is_here = weights.place.is_file()
    return {
        "kind": "weights",
        "name": weights.name,
        "aliases": list(weights.aliases),
        "role": weights.role,
        "architecture": weights.architecture,
        "licence": weights.licence,
        "source": weights.source,
        "url": weights.url or weights.packaged or f"found by record {weights.zenodo_record} of Zenodo",
        "digest": weights.digest or "none published; noted on first use",
        "bytes": weights.place.stat().st_size if is_here else weights.size_bytes,
        "citation": weights.citation or None,
        "note": weights.note,
        "file": str(weights.place),
        "is_here": is_here,
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
        f"{key:<20} {_written(value)}" for key, value in facts.items() if value not in ("", []) and key != "settings"
    )


def _written(value: object) -> str:
    """Write a fact for people."""
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_written(item)}" for key, item in value.items())
    return "".join(sign if sign.isprintable() else "?" for sign in str(value))  # nothing that a terminal obeys
