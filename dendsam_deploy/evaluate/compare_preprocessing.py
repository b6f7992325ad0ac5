"""Level 1 of parity: the bytes that enter the graphs against the reference implementation's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.evaluate.findings import Finding, count_true
from dendsam_deploy.pipeline.infer import on_host
from dendsam_deploy.pipeline.prepare import plan_tiles, prepare_slice
from dendsam_deploy.volume.intensity import to_uint8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Preprocessing
    from dendsam_deploy.bundle.reference import ReferenceInputs

_ZOOMS = (0.4, 0.75, 1.6)
_RESAMPLED_HW = (201, 173)  # enough to see every phase of a filter, and odd so that no axis divides evenly
_FIXED_POINT_BITS = 22  # of Pillow's filter weights for 8-bit images


def compare_preprocessing(preprocessing: Preprocessing, inputs: ReferenceInputs) -> Iterator[Finding]:
    """Compare what the pipeline makes of slices with the reference implementations, byte for byte.

    Parameters
    ----------
    preprocessing : Preprocessing
        How the bundle prepares slices.
    inputs : ReferenceInputs
        Tiles of the reference.
    """
    tile = inputs.tiles[0].astype(np.uint16)
    texture = np.add.outer(7 * np.arange(tile.shape[0]), 13 * np.arange(tile.shape[1])) % 97
    slice_u16 = (199 * tile + texture + 1003).astype(np.uint16)
    for image in (slice_u16, slice_u16.astype(np.float32) / 7 - 500):
        differing = count_true(to_uint8(image) != _stretched_as_micro_sam_does(image))
        yield Finding(1, "preprocessing", "bytes_differing", differing, str(image.dtype))
    for index, (height, width) in enumerate(inputs.sizes.tolist()):
        plan = plan_tiles((height, width), preprocessing, None, 1.0)
        fed = prepare_slice(np.ascontiguousarray(inputs.tiles[index, :height, :width]), plan)
        differing = count_true(on_host(fed.tiles) != inputs.tiles[index])
        differing += count_true(fed.sizes != inputs.sizes[index])
        yield Finding(1, "preprocessing", "bytes_differing", differing, f"tile={index}")
    height, width = (min(have, most) for have, most in zip(inputs.sizes[0].tolist(), _RESAMPLED_HW, strict=True))
    crop = np.ascontiguousarray(inputs.tiles[0, :height, :width])
    for zoom in dict.fromkeys((*_ZOOMS, preprocessing.zoom or 1.0)):
        roomy = replace(preprocessing, tile_size_px=math.ceil(max(height, width) * zoom) + 1, overlap_px=0)
        plan = plan_tiles((height, width), roomy, None, zoom)
        prepared = prepare_slice(crop, plan)
        ((fed_height, fed_width),) = prepared.sizes.tolist()
        resampled = on_host(prepared.tiles)[0, :fed_height, :fed_width]
        differing = count_true(resampled != resampled_as_sam_does(crop, plan.frame.model_hw))
        yield Finding(1, "preprocessing", "bytes_differing", differing, f"zoom={zoom:g}")


def _stretched_as_micro_sam_does(image: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Bring a slice to 8 bits in the words of ``micro_sam.util._to_image``, which `volume.intensity` is to equal."""
    stretched = image.astype("float32") - image.min()
    stretched /= stretched.max()
    scaled: NDArray[np.uint8] = (stretched * 255).astype("uint8")
    return scaled


def resampled_as_sam_does(image: NDArray[np.uint8], shape_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resample ``(H, W)`` as ``segment_anything.utils.transforms.ResizeLongestSide`` does, written out from scratch.

    There it is Pillow's bilinear resize: along x and then along y, a triangle around each target pixel's centre, as
    wide as the coarser of the two pixel sizes, its weights in fixed point and each pass rounded to 8 bits.

    References
    ----------
    https://github.com/python-pillow/Pillow, ``src/libImaging/Resample.c``
    """
    along_x = _filtered(image.astype(np.int64).T, shape_hw[1]).T
    return _filtered(along_x, shape_hw[0]).astype(np.uint8)


def _filtered(rows: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Resample the first axis of integers 0 to 255 to `length`; an axis of that length stays as it is."""
    if len(rows) == length:
        return rows
    step = len(rows) / length
    reach = max(step, 1.0)
    centres = (np.arange(length) + 0.5) * step
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + reach + 0.5).astype(np.int64), len(rows))
    source = np.arange(len(rows))
    weights = np.maximum(1 - np.abs((source[None] - centres[:, None] + 0.5) / reach), 0)
    weights[(source[None] < first[:, None]) | (source[None] >= last[:, None])] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.floor(weights * 2**_FIXED_POINT_BITS + 0.5).astype(np.int64)
    rounding = 1 << (_FIXED_POINT_BITS - 1)
    filtered: NDArray[np.int64] = np.clip((fixed @ rows + rounding) >> _FIXED_POINT_BITS, 0, 255)
    return filtered
