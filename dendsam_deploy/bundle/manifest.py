"""The manifest of a bundle: what the graphs are, where they came from, and how slices must be prepared for them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from dendsam_deploy.bundle.records import RecordError, object_from_json, record_from_json
from dendsam_deploy.errors import BundleError

SCHEMA_VERSION = 2
"""Version of the manifest that this program writes; version 1, without `GraphSpec.attention`, is read as well."""

Role = Literal["detector", "encoder", "decoder", "points"]
"""Parts of the chain; ``points``, the decoder for clicks, is not part of every bundle, and `segment` needs none."""

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
AttentionForm = Literal["added", "widened"]
"""How a graph computes relative position, see `models.plain_encoder`."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, numpy dtype name and shape of a graph's input or output; a string names a free axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file of the bundle (path relative to it) or a source checkpoint (bare name): SHA-256 and size in bytes."""

    file: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that the graphs were exported from; `kind` is its architecture, such as ``vit_b`` or ``yolo``."""

    role: Literal["sam", "detector"]
    kind: str
    checkpoint: FileDigest


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One ONNX file: its part in the chain, its precision, its tensors and the files that it consists of.

    `files[0]` is the graph itself; further entries are external weight data. `attention` is None where no relative
    position is computed.
    """

    role: Role
    precision: Precision
    opset: int
    files: tuple[FileDigest, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attention: AttentionForm | None = None


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a slice becomes tiles.

    Parameters
    ----------
    normalisation : str
        ``minmax_uint8``: slices that are not uint8 are stretched from their own extremes to 0..255 and truncated.
    tile_size_px : int
        Side S of the model's square input.
    overlap_px : int
        Least overlap of neighbouring tiles, model px.
    model_pixel_size_nm : float or None
        Size of a model pixel in training, where it is known.
    zoom : float or None
        Model px per slice px in training; used where a pixel size is unknown. None: see `geometry.choose_zoom`.
    """

    normalisation: Literal["minmax_uint8"]
    tile_size_px: int
    overlap_px: int
    model_pixel_size_nm: float | None
    zoom: float | None


@dataclass(frozen=True, slots=True)
class Decoding:
    """Which regions the box decoder evaluates.

    Parameters
    ----------
    region_sizes : tuple of int
        Sides on offer in embedding cells, ascending; the last one is S/16, the whole grid.
    margin_fraction : float
        Margin around a box on each side, as a fraction of its longer side.
    margin_px : float
        Margin added to that, tile px.
    """

    region_sizes: tuple[int, ...]
    margin_fraction: float
    margin_px: float


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Defaults of `segment` for this bundle.

    Parameters
    ----------
    detection_score : float
        Least detection score of a box.
    nms_iou : float
        Largest IoU of two boxes of one slice.
    mask_logit : float
        Logit above which a pixel is foreground.
    min_area_px : int
        Least area of an object in one slice, model px.
    """

    detection_score: float
    nms_iou: float
    mask_logit: float
    min_area_px: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a program needs to know about a bundle before it opens a graph."""

    schema_version: int
    name: str
    created_utc: str
    licence: str
    model_type: str
    sources: tuple[Source, ...]
    graphs: tuple[GraphSpec, ...]
    preprocessing: Preprocessing
    decoding: Decoding
    thresholds: Thresholds
    producers: dict[str, str]
    extra_files: tuple[FileDigest, ...]

    def graph(self, role: Role, precision: Precision) -> GraphSpec | None:
        """Return the graph of a role at a precision, or None where the bundle has none."""
        return next((g for g in self.graphs if g.role == role and g.precision == precision), None)

    def to_json(self) -> str:
        """Return the manifest as indented JSON with a stable order of keys."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Read a manifest and check every key, type and version.

        Raises
        ------
        BundleError
            Names `source`, the offending key, what was found and what was expected.
        """
        try:
            document = object_from_json(text)
        except RecordError as error:
            raise BundleError(f"{source}: {error}; export the bundle again") from error
        version = document.get("schema_version")
        if version not in (1, SCHEMA_VERSION):
            raise BundleError(
                f"{source}: schema version {version!r}, this program reads 1 to {SCHEMA_VERSION}; "
                "export the bundle again or use the version of dendsam-deploy that wrote it"
            )
        if version == 1:
            _bring_up_to_date(document)
        try:
            return record_from_json(cls, document, "manifest", is_strict=True)
        except RecordError as error:
            raise BundleError(f"{source}: {error}") from error


def _bring_up_to_date(document: dict[str, Any]) -> None:
    """Turn a manifest of version 1 into one of today, in place."""
    document["schema_version"] = SCHEMA_VERSION
    graphs = document.get("graphs")
    for graph in graphs if isinstance(graphs, list) else []:
        if isinstance(graph, dict):
            graph.setdefault("attention", None)
