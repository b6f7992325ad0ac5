"""The stored reference: a few tiles and boxes with what the original modules make of them."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.bundle.contract import EMBEDDING_CHANNELS, MASKS_PER_CLICK
from dendsam_deploy.errors import BundleError
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX, LOGIT_STRIDE_PX

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ReferenceInputs:
    """Tiles and boxes on which graphs are compared.

    Parameters
    ----------
    tiles : ndarray, shape (T, S, S), uint8
        Structured images, zero beyond `sizes`.
    sizes : ndarray, shape (T, 2), int64
        Valid height and width of each tile; at least one is smaller than S.
    boxes : ndarray, shape (N, 4), float32
        Corners ``(x0, y0, x1, y1)`` in tile px.
    tile_index : ndarray, shape (N,), int64
        The tile of each box.
    """

    tiles: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    boxes: NDArray[np.float32]
    tile_index: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DetectorOutputs:
    """What a detector makes of the tiles: `boxes` float32 (T, K, 4) in tile px and `scores` float32 (T, K)."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamOutputs:
    """What a SAM makes of the tiles and boxes.

    Parameters
    ----------
    embeddings : ndarray, shape (T, 256, S/16, S/16), float32
        Of the tiles.
    logits : ndarray, shape (N, S/4, S/4), float32
        Of the boxes, on the whole grid of their tile.
    iou : ndarray, shape (N,), float32
        Predicted IoU.
    """

    embeddings: NDArray[np.float32]
    logits: NDArray[np.float32]
    iou: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PointAnswers:
    """Clicks into the tiles, and what a SAM makes of them.

    Parameters
    ----------
    points : ndarray, shape (M, P, 2), float32
        Points ``(x, y)`` in tile px.
    labels : ndarray, shape (M, P), int64
        1 in the object, 0 beside it, -1 padding.
    tile_index : ndarray, shape (M,), int64
        The tile of each prompt.
    logits : ndarray, shape (M, 4, S/4, S/4), float32
        Of the masks that answer each prompt, see `contract.MASKS_PER_CLICK`.
    iou : ndarray, shape (M, 4), float32
        Predicted IoU.
    """

    points: NDArray[np.float32]
    labels: NDArray[np.int64]
    tile_index: NDArray[np.int64]
    logits: NDArray[np.float32]
    iou: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StoredReference:
    """Content of ``reference.npz``.

    `detector` is None where there is no trusted detector to compare with, `points` where the bundle takes no clicks.
    """

    inputs: ReferenceInputs
    sam: SamOutputs
    detector: DetectorOutputs | None
    points: PointAnswers | None = None


_POINTS = "prompted_"
_POINT_ARRAYS = tuple(field.name for field in dataclasses.fields(PointAnswers))


def save_reference(path: Path, reference: StoredReference) -> None:
    """Write a reference. Its arrays are not compressed: network outputs do not shrink, and readers can trust sizes."""
    parts = (reference.inputs, reference.sam)
    arrays = {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}
    if reference.detector is not None:
        arrays |= {"detector_boxes": reference.detector.boxes, "detector_scores": reference.detector.scores}
    if reference.points is not None:
        arrays |= {_POINTS + name: getattr(reference.points, name) for name in _POINT_ARRAYS}
    np.savez(path, **arrays)


def load_reference(path: Path, tile_size_px: int) -> StoredReference:
    """Read a reference.

    Parameters
    ----------
    path : Path
        The bundle's ``reference.npz``.
    tile_size_px : int
        Side S of the bundle's tiles.

    Raises
    ------
    BundleError
        Where an array is missing, damaged, or of another dtype or shape.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name.removesuffix(".npy"): _read_array(archive, name) for name in archive.namelist()}
    # A damaged archive fails in any of these ways, depending on where the damage lies.
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise BundleError(f"{path}: not a stored reference ({error}); export the bundle again") from error
    _check_arrays(path, arrays, tile_size_px)
    detector = None
    if "detector_boxes" in arrays:
        detector = DetectorOutputs(arrays["detector_boxes"], arrays["detector_scores"])
    inputs = ReferenceInputs(arrays["tiles"], arrays["sizes"], arrays["boxes"], arrays["tile_index"])
    points = None
    if any(name.startswith(_POINTS) for name in arrays):
        points = PointAnswers(**{name: arrays[_POINTS + name] for name in _POINT_ARRAYS})
    sam = SamOutputs(arrays["embeddings"], arrays["logits"], arrays["iou"])
    return StoredReference(inputs, sam, detector, points)


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """Read one member after comparing the size that its header promises with the bytes that are there."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which no exported reference is")
    with archive.open(member) as stream:
        shape, fortran_order, dtype = _read_header(stream)
        promised = dtype.itemsize * math.prod(shape)
        if dtype.hasobject or fortran_order or stream.tell() + promised != member.file_size:
            raise ValueError(f"{name} has a header that does not fit its {member.file_size} bytes")
        # Writable, as every other array of the pipeline: engines share memory with their inputs.
        return np.frombuffer(bytearray(stream.read()), dtype).reshape(shape)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Read the header of an array in numpy's format, version 1."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"array format {version}, expected (1, 0)")
    return np.lib.format.read_array_header_1_0(stream)


def _check_arrays(path: Path, arrays: dict[str, NDArray[Any]], tile_size_px: int) -> None:
    """Check the names, dtypes and shapes of all arrays against each other."""
    tiles, boxes = (len(arrays[name]) if name in arrays and arrays[name].ndim else 0 for name in ("tiles", "boxes"))
    cells, grid = tile_size_px // EMBEDDING_STRIDE_PX, tile_size_px // LOGIT_STRIDE_PX
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "tiles": ("uint8", (tiles, tile_size_px, tile_size_px)),
        "sizes": ("int64", (tiles, 2)),
        "boxes": ("float32", (boxes, 4)),
        "tile_index": ("int64", (boxes,)),
        "embeddings": ("float32", (tiles, EMBEDDING_CHANNELS, cells, cells)),
        "logits": ("float32", (boxes, grid, grid)),
        "iou": ("float32", (boxes,)),
    }
    if "detector_boxes" in arrays:
        candidates = arrays["detector_boxes"].shape[1] if arrays["detector_boxes"].ndim > 1 else 0
        expected["detector_boxes"] = ("float32", (tiles, candidates, 4))
        expected["detector_scores"] = ("float32", (tiles, candidates))
    if any(name.startswith(_POINTS) for name in arrays):
        expected |= _expected_points(arrays, grid)
    if unknown := sorted(arrays.keys() ^ expected.keys()):
        raise BundleError(f"{path}: arrays are missing or unknown ({', '.join(unknown)}); export the bundle again")
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if (array.dtype.name, array.shape) != (dtype, shape):
            raise BundleError(f"{path}: {name} is {array.dtype}{array.shape}, expected {dtype}{shape}; export again")
    if not tiles or not boxes or not _within(arrays, tiles, tile_size_px):
        raise BundleError(f"{path}: it names tiles or sizes that it does not hold; export the bundle again")


def _expected_points(arrays: dict[str, NDArray[Any]], grid: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each array about clicks; their numbers are those of the labels."""
    labels = arrays.get(_POINTS + "labels")
    prompts, points = labels.shape if labels is not None and labels.ndim == 2 else (0, 0)
    return {
        _POINTS + "points": ("float32", (prompts, points, 2)),
        _POINTS + "labels": ("int64", (prompts, points)),
        _POINTS + "tile_index": ("int64", (prompts,)),
        _POINTS + "logits": ("float32", (prompts, MASKS_PER_CLICK, grid, grid)),
        _POINTS + "iou": ("float32", (prompts, MASKS_PER_CLICK)),
    }


def _within(arrays: dict[str, NDArray[Any]], tiles: int, tile_size_px: int) -> bool:
    """Tell whether every prompt names an existing tile and every size fits a tile."""
    clicked = arrays.get(_POINTS + "tile_index", np.zeros(0, np.int64))
    index = np.concatenate([arrays["tile_index"], clicked]).astype(np.int64)
    sizes = arrays["sizes"].astype(np.int64)
    return bool(((index >= 0) & (index < tiles)).all() and ((sizes >= 1) & (sizes <= tile_size_px)).all())
