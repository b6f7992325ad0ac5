"""What goes into ``reference.npz``: tiles and boxes to compare on, and what the original modules make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage

from dendsam_deploy.bundle.manifest import FileDigest
from dendsam_deploy.bundle.reference import DetectorOutputs, PointAnswers, ReferenceInputs, SamOutputs
from dendsam_deploy.errors import VolumeError
from dendsam_deploy.geometry import Window
from dendsam_deploy.models.reference import OriginalDetector, decode_boxes, decode_points, encode_tiles
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.open import open_volume
from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from segment_anything.modeling import Sam

SMALLEST_BOX_PX = 8

_CLICKED_BOXES, _CLICK_SEED = 8, 22
"""Prompts of points in the reference; three whole masks each are 6 MB at 1024 px."""


@dataclass(frozen=True, slots=True)
class ReferenceOptions:
    """Which tiles and boxes.

    Parameters
    ----------
    tile_size_px : int
        Side of the square tiles.
    volume : Path or None
        Volume to take the tiles from, evenly spread over its slices; None makes a phantom.
    tiles : int
        How many; the last one is smaller than the model's input, because padding is where preprocessing errs.
    boxes : int
        How many in all.
    seed : int
        Decides about the phantom and the boxes.
    """

    tile_size_px: int
    volume: Path | None = None
    tiles: int = 2
    boxes: int = 64
    seed: int = 20


def reference_inputs(options: ReferenceOptions) -> ReferenceInputs:
    """Choose tiles and boxes.

    Boxes of the phantom's objects, jittered as a detector's would be, alternate with boxes of any size and place, so
    that neither small objects nor odd prompts go untested. The first box spans its whole tile.

    Raises
    ------
    VolumeError
        Where the volume cannot be read.
    """
    rng = np.random.default_rng(options.seed)
    size = options.tile_size_px
    tiles = np.zeros((options.tiles, size, size), np.uint8)
    sizes = np.zeros((options.tiles, 2), np.int64)
    object_boxes: list[NDArray[np.float32]] = []
    for index, (image, labels) in enumerate(_images(options)):
        limit_hw = (size, size) if index + 1 < options.tiles else (size * 3 // 4 + 3, size * 5 // 8 + 5)
        window = Window(0, 0, *limit_hw).clipped((image.shape[0], image.shape[1]))
        tiles[index, : window.height, : window.width] = image[window.slices]
        sizes[index] = window.height, window.width
        object_boxes.append(_label_boxes(labels[window.slices]))
    boxes, tile_index = [], np.arange(options.boxes, dtype=np.int64) % options.tiles
    for number, tile in enumerate(tile_index.tolist()):
        height, width = sizes[tile].tolist()
        if number == 0:
            boxes.append(np.array([0, 0, width, height]))
        elif number % 4 < 2 and len(object_boxes[tile]):
            boxes.append(_jittered(object_boxes[tile][rng.integers(len(object_boxes[tile]))], (height, width), rng))
        else:
            boxes.append(_any_box((height, width), rng))
    return ReferenceInputs(tiles, sizes, np.array(boxes, np.float32), tile_index)


def sam_outputs(sam: Sam, inputs: ReferenceInputs) -> SamOutputs:
    """Return what segment_anything makes of the tiles and boxes."""
    embeddings = encode_tiles(sam, torch.from_numpy(inputs.tiles), torch.from_numpy(inputs.sizes))
    boxes, tile_index = torch.from_numpy(inputs.boxes), torch.from_numpy(inputs.tile_index)
    logits, iou = decode_boxes(sam, embeddings, boxes, tile_index)
    return SamOutputs(embeddings.numpy(), logits.numpy(), iou.numpy())


def point_answers(sam: Sam, inputs: ReferenceInputs, embeddings: NDArray[np.float32]) -> PointAnswers:
    """Return what segment_anything makes of clicks: in the middle of boxes, beside them, and with padding."""
    rng = np.random.default_rng(_CLICK_SEED)
    few = slice(0, _CLICKED_BOXES)
    boxes, tile_index = inputs.boxes[few], inputs.tile_index[few]
    points = rng.uniform(0, 1, (len(boxes), 3, 2)).astype(np.float32) * inputs.sizes[tile_index][:, None, ::-1]
    points[:, 0] = (boxes[:, :2] + boxes[:, 2:]) / 2
    labels = rng.integers((1, 0, -1), 2, (len(boxes), 3))
    points = points.astype(np.float32)
    tensors = (torch.from_numpy(array) for array in (embeddings, points, labels, tile_index))
    logits, iou = decode_points(sam, *tensors)
    return PointAnswers(points, labels, tile_index, logits.numpy(), iou.numpy())


def detector_outputs(detector: OriginalDetector, inputs: ReferenceInputs, candidates: int) -> DetectorOutputs:
    """Return the best `candidates` boxes of each tile that ultralytics finds."""
    boxes, scores = detector(torch.from_numpy(inputs.tiles))
    scores, best = scores.topk(min(candidates, scores.shape[1]), dim=1)
    boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
    return DetectorOutputs(boxes.numpy(), scores.numpy())


def checkpoint_digest(path: Path, sha256: str) -> FileDigest:
    """Describe the file that weights were read from; an architecture that is only named has none, and no size."""
    return FileDigest(path.name, sha256, path.stat().st_size if path.is_file() else 0)


def _images(options: ReferenceOptions) -> list[tuple[NDArray[np.uint8], NDArray[np.uint32]]]:
    """Return grey images and their labels, which are empty for a volume of the user's."""
    size = options.tile_size_px
    if options.volume is None:
        phantom = make_phantom(PhantomOptions(shape_zyx=(options.tiles, size, size), seed=options.seed))
        return list(zip(phantom.raw, phantom.labels_2d, strict=True))
    with open_volume(options.volume) as volume:
        depth, height, width = volume.info.shape_zyx
        if min(height, width) < SMALLEST_BOX_PX:
            raise VolumeError(f"{options.volume}: slices of {height} x {width} px, expected at least 8 x 8")
        window = Window((height - size) // 2, (width - size) // 2, size, size).clipped((height, width))
        levels = [round((index + 1) * depth / (options.tiles + 1)) for index in range(options.tiles)]
        images = [to_uint8(volume.read(min(z, depth - 1), window), f"{options.volume}: slice {z}") for z in levels]
    return [(image, np.zeros(image.shape, np.uint32)) for image in images]


def _label_boxes(labels: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Return the bounding boxes ``(N, 4)`` of labels ``(Y, X)`` that are not too small to prompt."""
    found = [place for place in ndimage.find_objects(labels.astype(np.int32)) if place is not None]
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in found], np.float32).reshape(-1, 4)
    large: NDArray[np.bool_] = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= SMALLEST_BOX_PX
    return boxes[large]


def _jittered(box: NDArray[np.float32], size_hw: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """Move each side of a box by up to a tenth of its length; no side leaves the image."""
    height, width = size_hw
    side = np.tile(box[2:] - box[:2], 2)
    moved: NDArray[np.float64] = np.clip(box + rng.uniform(-0.1, 0.1, 4) * side, 0, [width, height, width, height])
    return moved


def _any_box(size_hw: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a box anywhere in an image, its sides log-uniform between the smallest and the whole image."""
    limit = np.array(size_hw[::-1], np.float64)
    side = np.exp(rng.uniform(np.log(SMALLEST_BOX_PX), np.log(limit)))
    corner = rng.uniform(0, 1, 2) * (limit - side)
    return np.concatenate([corner, corner + side])
