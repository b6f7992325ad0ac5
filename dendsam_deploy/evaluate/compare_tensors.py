"""Level 2 of parity: what the graphs of SAM return, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.evaluate.findings import (
    Finding,
    count_true,
    largest_difference,
    lowest_cosine,
    max_over_std,
    not_finite,
    relative_max,
    relative_rms,
    rms_over_std,
    run_graph,
)
from dendsam_deploy.geometry import cut_regions, region_origins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Decoding
    from dendsam_deploy.bundle.reference import ReferenceInputs, SamOutputs
    from dendsam_deploy.runtimes.runner import Runner


def encode(encoder: Runner, inputs: ReferenceInputs) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Encode the tiles.

    Returns
    -------
    together, last : ndarray, shapes (T, 256, S/16, S/16) and (1, 256, S/16, S/16), float32
        All tiles from one call, and the last one, which is padded, from a call of its own: a graph that mixes the
        tiles of a batch up shows in the first, one that fails on a single tile in the second.
    """
    last = len(inputs.tiles) - 1
    calls = [
        run_graph(encoder, {"tiles": inputs.tiles[first:], "sizes": inputs.sizes[first:]})["embeddings"]
        for first in (0, last)
    ]
    together, alone = (embeddings.astype(np.float32, copy=False) for embeddings in calls)
    return together, alone


def compare_embeddings(
    embeddings: NDArray[np.float32], expected: NDArray[np.float32], inputs: ReferenceInputs, detail: str
) -> Iterator[Finding]:
    """Compare embeddings of whole tiles (level 2) and of padded ones, where preprocessing shows (level 1).

    Parameters
    ----------
    embeddings : ndarray, shape (K, 256, S/16, S/16), float32
        Of the last K tiles.
    expected : ndarray, shape (T, 256, S/16, S/16), float32
        The reference's, of all tiles.
    inputs : ReferenceInputs
        The tiles.
    detail : str
        What tells these findings apart from others of the same metrics.
    """
    yield Finding(2, "encoder", "wrong_shapes", embeddings.shape[1:] != expected.shape[1:], detail)
    if embeddings.shape[1:] != expected.shape[1:]:
        return
    expected, sizes = expected[-len(embeddings) :], inputs.sizes[-len(embeddings) :]
    padded = (sizes < inputs.tiles.shape[1]).any(axis=1)
    for is_padded, level, metric in ((True, 1, "padded_tile_relative_max"), (False, 2, "embedding_relative_max")):
        of_kind = padded == is_padded
        if of_kind.any():
            yield Finding(level, "encoder", metric, relative_max(embeddings[of_kind], expected[of_kind]), detail)
    yield Finding(2, "encoder", "embedding_relative_rms", relative_rms(embeddings, expected), detail)
    yield Finding(2, "encoder", "embedding_cosine", lowest_cosine(embeddings, expected), detail)
    yield Finding(2, "encoder", "not_finite", not_finite(embeddings), detail)


def compare_logits(
    decoder: Runner, inputs: ReferenceInputs, expected: SamOutputs, decoding: Decoding, box_counts: tuple[int, ...]
) -> Iterator[Finding]:
    """Compare the decoder, fed the reference's embeddings, for several numbers of boxes and every region (level 2)."""
    cells = expected.embeddings.shape[-1]
    calls = [(count, cells, f"boxes={count}") for count in box_counts]
    calls += [(len(inputs.boxes), region, f"region={region}") for region in decoding.region_sizes[:-1]]
    for count, region, detail in calls:
        some = _first(inputs, count)
        outputs = decode(decoder, expected.embeddings, some, region)
        yield from _compare_decoded(outputs, some, expected, region, detail)
    empty = decode(decoder, expected.embeddings, _first(inputs, 0), cells)
    yield Finding(2, "decoder", "wrong_shapes", _wrong_shapes(empty, 0, cells), "boxes=0")


def compare_end_to_end(
    decoder: Runner, embeddings: NDArray[np.float32], inputs: ReferenceInputs, expected: SamOutputs
) -> Iterator[Finding]:
    """Compare logits from the deployed encoder and decoder together (level 2)."""
    outputs = decode(decoder, embeddings, inputs, expected.embeddings.shape[-1])
    logits = outputs["logits"].astype(np.float32)
    value = max_over_std(logits, expected.logits) if logits.shape == expected.logits.shape else np.nan
    yield Finding(2, "chain", "end_to_end_logits_max_over_std", value)


def decode(
    decoder: Runner, embeddings: NDArray[np.float32], inputs: ReferenceInputs, region: int
) -> dict[str, NDArray[np.generic]]:
    """Decode the boxes of the inputs in one call."""
    return run_graph(
        decoder,
        {
            "embeddings": embeddings,
            "boxes": inputs.boxes,
            "tile_index": inputs.tile_index,
            "region": np.array([region], np.int64),
        },
    )


def _compare_decoded(
    outputs: dict[str, NDArray[np.generic]], inputs: ReferenceInputs, expected: SamOutputs, region: int, detail: str
) -> Iterator[Finding]:
    """Compare one call of the decoder with the reference's whole masks, cut where the decoder says."""
    count, cells = len(inputs.boxes), expected.embeddings.shape[-1]
    wrong = _wrong_shapes(outputs, count, region)
    yield Finding(2, "decoder", "wrong_shapes", wrong, detail)
    if wrong:
        return
    claimed = outputs["origin"].astype(np.int64)
    differing = (claimed != region_origins(inputs.boxes, region, cells)).any(axis=1)
    yield Finding(2, "decoder", "origins_differing", count_true(differing), detail)
    origin = np.clip(claimed, 0, expected.logits.shape[1] - 4 * region)
    wanted = cut_regions(expected.logits[:count], origin, region)
    logits, iou = outputs["logits"].astype(np.float32), outputs["iou"].astype(np.float32)
    yield Finding(2, "decoder", "logits_max_over_std", max_over_std(logits, wanted), detail)
    yield Finding(2, "decoder", "logits_rms_over_std", rms_over_std(logits, wanted), detail)
    yield Finding(2, "decoder", "predicted_iou_max_difference", largest_difference(iou, expected.iou[:count]), detail)
    yield Finding(2, "decoder", "not_finite", not_finite(logits) + not_finite(iou), detail)


def _wrong_shapes(outputs: dict[str, NDArray[np.generic]], count: int, region: int) -> int:
    """Count the outputs whose shape is not the contract's."""
    shapes = {"logits": (count, 4 * region, 4 * region), "origin": (count, 2), "iou": (count,)}
    return sum(outputs[name].shape != shape for name, shape in shapes.items())


def _first(inputs: ReferenceInputs, count: int) -> ReferenceInputs:
    """Return the inputs with the first `count` boxes."""
    return replace(inputs, boxes=inputs.boxes[:count], tile_index=inputs.tile_index[:count])
