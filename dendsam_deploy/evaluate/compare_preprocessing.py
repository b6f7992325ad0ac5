"""Level 1 of parity: the bytes that enter the graphs against the reference implementation's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.evaluate.findings import Finding, count_true
from dendsam_deploy.pipeline.prepare import plan_tiles, prepare_slice
from dendsam_deploy.volume.intensity import to_uint8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Preprocessing
    from dendsam_deploy.bundle.reference import ReferenceInputs


def compare_preprocessing(preprocessing: Preprocessing, inputs: ReferenceInputs) -> Iterator[Finding]:
    """Compare the bytes that enter the graphs with the reference implementation's (level 1)."""
    tile = inputs.tiles[0].astype(np.uint16)
    texture = np.add.outer(7 * np.arange(tile.shape[0]), 13 * np.arange(tile.shape[1])) % 97
    slice_u16 = (199 * tile + texture + 1003).astype(np.uint16)
    differing = count_true(to_uint8(slice_u16) != _stretched_as_micro_sam_does(slice_u16))
    yield Finding(1, "preprocessing", "bytes_differing", differing, "uint16")
    for index, (height, width) in enumerate(inputs.sizes.tolist()):
        plan = plan_tiles((height, width), preprocessing, None, 1.0)
        fed = prepare_slice(np.ascontiguousarray(inputs.tiles[index, :height, :width]), plan).tile_inputs(0)
        differing = count_true(fed["tiles"] != inputs.tiles[index]) + count_true(fed["sizes"] != inputs.sizes[index])
        yield Finding(1, "preprocessing", "bytes_differing", differing, f"tile={index}")


def _stretched_as_micro_sam_does(image: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Bring a slice to 8 bits in the words of ``micro_sam.util._to_image``, which `volume.intensity` is to equal."""
    stretched = image.astype("float32") - image.min()
    stretched /= stretched.max()
    scaled: NDArray[np.uint8] = (stretched * 255).astype("uint8")
    return scaled
