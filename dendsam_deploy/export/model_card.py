"""The model card: what a person should know before using a bundle, generated from what the files record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dendsam_deploy.bundle.manifest import Manifest

_ULTRALYTICS_LICENCE = """
{origin} Ultralytics software, whose licence is AGPL-3.0; its authors hold that it covers models made with it as well.
Settle that question before passing this bundle on or offering it as a service (<https://ultralytics.com/license>).
The SAM graphs contain nothing of it."""


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """What the checkpoints say about their training; empty where they say nothing."""

    sam: Mapping[str, object]
    detector: Mapping[str, object]


def model_card(manifest: Manifest, facts: TrainingFacts) -> str:
    """Write the model card of a bundle as Markdown.

    Parameters
    ----------
    manifest : Manifest
        The bundle's manifest; its list of extra files may still be empty.
    facts : TrainingFacts
        Recorded by the training commands in their checkpoints.
    """
    return "\n".join(
        [
            *_purpose(manifest),
            *_sources(manifest),
            *_training(facts),
            *_limits(manifest),
            *_licence(manifest),
        ]
    )


def _purpose(manifest: Manifest) -> Iterator[str]:
    """Say what the bundle is and how it is used."""
    size = manifest.preprocessing.tile_size_px
    yield f"# {manifest.name}"
    yield ""
    yield (
        f"A Segment Anything model ({manifest.model_type}, {size} x {size} px) that segments dendrites in sections of "
        "electron-microscopy volumes from boxes, as ONNX graphs that run without torch."
    )
    if not any(graph.role == "detector" for graph in manifest.graphs):
        yield "It has no detector: boxes come from elsewhere (`segment --boxes`)."
    yield ""
    yield "    dendsam-deploy segment VOLUME -b THIS_FOLDER"
    yield "    dendsam-deploy verify THIS_FOLDER"
    yield ""


def _sources(manifest: Manifest) -> Iterator[str]:
    """List the checkpoints and the graphs made from them."""
    yield "## Where it comes from"
    yield ""
    yield "| part | architecture | file | SHA-256 |"
    yield "| --- | --- | --- | --- |"
    for source in manifest.sources:
        file = source.checkpoint
        yield f"| {source.role} | {source.kind} | {file.file} | {file.sha256 or 'random weights'} |"
    yield ""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.producers.items()))
    yield f"Exported {manifest.created_utc} with {versions}."
    yield ""


def _training(facts: TrainingFacts) -> Iterator[str]:
    """Repeat what the checkpoints record."""
    yield "## Training"
    yield ""
    for role, recorded in (("SAM", facts.sam), ("Detector", facts.detector)):
        if not recorded:
            yield f"- {role}: the checkpoint records nothing about its training."
            continue
        yield f"- {role}:"
        for name, value in recorded.items():
            yield f"    - {name.replace('_', ' ')}: {value}"
    yield ""


def _limits(manifest: Manifest) -> Iterator[str]:
    """Say for which images the model is meant."""
    preprocessing = manifest.preprocessing
    yield "## Limits"
    yield ""
    if preprocessing.model_pixel_size_nm is not None:
        yield (
            f"- Made for pixels of {preprocessing.model_pixel_size_nm:g} nm: volumes that record their voxel size are "
            "resampled to that."
        )
    elif preprocessing.zoom is not None:
        yield f"- Trained at a zoom of {preprocessing.zoom:g}; its pixel size is not recorded, so check the scale."
    else:
        yield "- The scale that it was trained at is not recorded: check the zoom on a few sections first."
    yield f"- An object larger than {preprocessing.tile_size_px} model px does not fit into one tile."
    yield "- Tissue, stain or microscope other than in training: evaluate a few labelled sections before trusting it."
    yield "- `parity.json` says how closely the graphs equal the weights; without that file nobody has checked."
    yield ""


def _licence(manifest: Manifest) -> Iterator[str]:
    """State the licences."""
    yield "## Licence"
    yield ""
    yield f"Weights: {manifest.licence}. Segment Anything is Apache-2.0."
    kinds = {source.kind for source in manifest.sources if source.role == "detector"}
    if kinds:
        origin = "If the detector was made with" if "onnx" in kinds else "The detector was made with"
        yield _ULTRALYTICS_LICENCE.format(origin=origin)
    yield ""
