"""A session without any network: bright discs are detected, encoded as they are and decoded analytically.

The "embedding" of a tile is its own intensities, average-pooled to S/16 in channel 0. The "decoder" ignores it and
returns for each box a paraboloid that is zero on the ellipse in the box, sampled at the centres of the S/4 grid.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs
from dendsam_deploy.bundle.manifest import (
    SCHEMA_VERSION,
    Decoding,
    FileDigest,
    GraphSpec,
    Manifest,
    Preprocessing,
    Role,
    Thresholds,
)
from dendsam_deploy.runtimes.runner import CallableRunner
from dendsam_deploy.runtimes.session import Session

Tensors = dict[str, NDArray[np.generic]]


def graph_spec(role: Role, tile_size: int) -> GraphSpec:
    """The contract of one graph."""
    file = FileDigest(f"{role}.onnx", f"digest-of-{role}", 1)
    return GraphSpec(role, "fp32", 17, (file,), graph_inputs(role, tile_size), graph_outputs(role, tile_size))


def make_manifest(tile_size: int = 64, overlap: int = 24, **preprocessing: float | None) -> Manifest:
    """A manifest for slices of small round objects."""
    cells = tile_size // 16
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name="discs",
        created_utc="2026-01-01T00:00:00Z",
        licence="CC0-1.0",
        model_type="tiny",
        sources=(),
        graphs=tuple(graph_spec(role, tile_size) for role in ("detector", "encoder", "decoder")),
        preprocessing=Preprocessing(
            "minmax_uint8",
            tile_size,
            overlap,
            preprocessing.get("model_pixel_size_nm"),
            preprocessing.get("zoom", 1.0),
        ),
        decoding=Decoding(tuple(sorted({max(cells // 2, 1), cells})), 0.1, 4.0),
        thresholds=Thresholds(detection_score=0.3, nms_iou=0.7, mask_logit=0.0, min_area_px=12),
        producers={},
        extra_files=(),
    )


def detect_discs(inputs: Mapping[str, NDArray[np.generic]]) -> Tensors:
    """Box every connected bright region of a tile; the score is its brightness. Padded to a fixed number of rows."""
    boxes = np.zeros((len(inputs["tiles"]), 50, 4), np.float32)
    scores = np.zeros(boxes.shape[:2], np.float32)
    for row, tile in enumerate(inputs["tiles"]):
        regions, _ = ndimage.label(tile > 40)
        for index, (rows, columns) in enumerate(ndimage.find_objects(regions)):
            boxes[row, index] = columns.start, rows.start, columns.stop, rows.stop
            scores[row, index] = tile[rows, columns].max() / 255
    return {"boxes": boxes, "scores": scores}


def encode_by_pooling(inputs: Mapping[str, NDArray[np.generic]]) -> Tensors:
    """Average each 16 x 16 cell into channel 0."""
    tiles = inputs["tiles"]
    count, cells = len(tiles), tiles.shape[1] // 16
    embeddings = np.zeros((count, 256, cells, cells), np.float32)
    embeddings[:, 0] = tiles.reshape(count, cells, 16, cells, 16).mean(axis=(2, 4))
    return {"embeddings": embeddings}


def ellipse_logits(box: NDArray[np.float32], y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``8 (1 - r^2)``, with ``r`` the distance from the box's centre in units of its half sides."""
    half_w, half_h = np.maximum((box[2:] - box[:2]) / 2, 0.5)
    centre_x, centre_y = (box[:2] + box[2:]) / 2
    return 8 * (1 - ((x - centre_x) / half_w) ** 2 - ((y - centre_y) / half_h) ** 2)


def decode_ellipses(inputs: Mapping[str, NDArray[np.generic]]) -> Tensors:
    """Return the ellipse in each box, on the region that the contract describes."""
    grid = inputs["embeddings"].shape[2]
    boxes, region = inputs["boxes"], int(inputs["region"][0])
    assert inputs["tile_index"].max(initial=0) < max(len(inputs["embeddings"]), 1)
    centre = (boxes[:, :2] + boxes[:, 2:])[:, ::-1] / 32
    first = np.clip(np.floor(centre - region / 2 + 0.5).astype(np.int64), 0, grid - region)
    logits = np.empty((len(boxes), 4 * region, 4 * region), np.float32)
    for row, (box, corner) in enumerate(zip(boxes, first * 4, strict=True)):
        y, x = ((corner[axis] + np.arange(4 * region) + 0.5) * 4 for axis in (0, 1))
        logits[row] = ellipse_logits(box, y[:, None], x[None])
    return {"logits": logits, "origin": first * 4, "iou": np.full(len(boxes), 0.9, np.float32)}


class CountingFunction:
    """A function that remembers how often it was called."""

    def __init__(self, function: Callable[[Mapping[str, NDArray[np.generic]]], Tensors]) -> None:
        self.function = function
        self.calls: list[dict[str, tuple[int, ...]]] = []

    def __call__(self, inputs: Mapping[str, NDArray[np.generic]]) -> Tensors:
        self.calls.append({name: value.shape for name, value in inputs.items()})
        return self.function(inputs)


def make_session(
    manifest: Manifest | None = None,
    detector: Callable[[Mapping[str, NDArray[np.generic]]], Tensors] = detect_discs,
    encoder: Callable[[Mapping[str, NDArray[np.generic]]], Tensors] = encode_by_pooling,
    decoder: Callable[[Mapping[str, NDArray[np.generic]]], Tensors] = decode_ellipses,
) -> Session:
    """A session that runs the whole pipeline in milliseconds."""
    manifest = manifest or make_manifest()
    specs = {graph.role: graph for graph in manifest.graphs}
    return Session(
        manifest,
        encoder=CallableRunner(specs["encoder"], encoder),
        decoder=CallableRunner(specs["decoder"], decoder),
        detector=CallableRunner(specs["detector"], detector) if "detector" in specs else None,
        is_proven=True,
    )


def draw_discs(shape_hw: tuple[int, int], discs: list[tuple[float, float, float]]) -> NDArray[np.uint8]:
    """Bright discs ``(y, x, radius)`` on black, each of another brightness."""
    rows, columns = np.indices(shape_hw) + 0.5
    image = np.zeros(shape_hw, np.uint8)
    for number, (y, x, radius) in enumerate(discs):
        image[np.hypot(rows - y, columns - x) < radius] = 250 - 7 * (number % 20)
    return image
