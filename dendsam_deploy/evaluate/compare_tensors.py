"""Level 2 of parity: what the graphs of SAM return, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from dendsam_deploy.evaluate.findings import (
    Finding,
    count_true,
    largest_difference,
    lowest_cosine,
    max_over_std,
    not_finite,
    relative_max,
    run_graph,
)
from dendsam_deploy.geometry import cut_regions, region_origins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.reference import ReferenceInputs, SamOutputs
    from dendsam_deploy.runtimes.runner import Runner
    from dendsam_deploy.runtimes.session import Session


def encode(encoder: Runner, inputs: ReferenceInputs) -> NDArray[np.float32]:
    """Return the embeddings of the tiles, encoded one at a time as in the pipeline."""
    encoded = [
        run_graph(encoder, {"tiles": inputs.tiles[i : i + 1], "sizes": inputs.sizes[i : i + 1]})["embeddings"]
        for i in range(len(inputs.tiles))
    ]
    return np.concatenate(encoded).astype(np.float32, copy=False)


def compare_embeddings(
    embeddings: NDArray[np.float32], expected: NDArray[np.float32], inputs: ReferenceInputs
) -> Iterator[Finding]:
    """Compare embeddings of whole tiles (level 2) and of padded ones, where preprocessing shows (level 1)."""
    padded = (inputs.sizes < inputs.tiles.shape[1]).any(axis=1)
    for is_padded, level, metric in ((True, 1, "padded_tile_relative_max"), (False, 2, "embedding_relative_max")):
        of_kind = padded == is_padded
        if of_kind.any():
            yield Finding(level, "encoder", metric, relative_max(embeddings[of_kind], expected[of_kind]))
    yield Finding(2, "encoder", "embedding_cosine", lowest_cosine(embeddings, expected))
    yield Finding(2, "encoder", "not_finite", not_finite(embeddings))


def compare_logits(
    session: Session, inputs: ReferenceInputs, expected: SamOutputs, box_counts: tuple[int, ...]
) -> Iterator[Finding]:
    """Compare the decoder, fed the reference's embeddings, for several numbers of boxes and every region (level 2)."""
    cells = expected.embeddings.shape[-1]
    calls = [(count, cells, f"boxes={count}") for count in box_counts]
    calls += [(len(inputs.boxes), region, f"region={region}") for region in session.manifest.decoding.region_sizes[:-1]]
    for count, region, detail in calls:
        some = _first(inputs, count)
        outputs = _decode(session.decoder, expected.embeddings, some, region)
        yield from _compare_decoded(outputs, expected, region, detail)
        differing = (outputs["origin"] != region_origins(some.boxes, region, cells)).any(axis=1)
        yield Finding(2, "decoder", "origins_differing", count_true(differing), detail)
    empty = _decode(session.decoder, expected.embeddings, _first(inputs, 0), cells)
    shapes = {"logits": (0, 4 * cells, 4 * cells), "origin": (0, 2), "iou": (0,)}
    wrong = sum(empty[name].shape != shape for name, shape in shapes.items())
    yield Finding(2, "decoder", "wrong_shapes", wrong, "boxes=0")


def compare_end_to_end(
    session: Session, embeddings: NDArray[np.float32], inputs: ReferenceInputs, expected: SamOutputs
) -> Iterator[Finding]:
    """Compare logits from the deployed encoder and decoder together (level 2)."""
    cells = expected.embeddings.shape[-1]
    outputs = _decode(session.decoder, embeddings, inputs, cells)
    value = max_over_std(cast("NDArray[np.float32]", outputs["logits"]), expected.logits)
    yield Finding(2, "chain", "end_to_end_logits_max_over_std", value)


def _compare_decoded(
    outputs: dict[str, NDArray[np.generic]], expected: SamOutputs, region: int, detail: str
) -> Iterator[Finding]:
    """Compare one call of the decoder with the reference's whole masks, cut where the decoder says."""
    count = len(outputs["origin"])
    origin = np.clip(outputs["origin"].astype(np.int64), 0, expected.logits.shape[1] - 4 * region)
    wanted = cut_regions(expected.logits[:count], origin, region)
    logits, iou = outputs["logits"].astype(np.float32), outputs["iou"].astype(np.float32)
    yield Finding(2, "decoder", "logits_max_over_std", max_over_std(logits, wanted), detail)
    yield Finding(2, "decoder", "predicted_iou_max_difference", largest_difference(iou, expected.iou[:count]), detail)
    yield Finding(2, "decoder", "not_finite", not_finite(logits) + not_finite(iou), detail)


def _decode(
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


def _first(inputs: ReferenceInputs, count: int) -> ReferenceInputs:
    """Return the inputs with the first `count` boxes."""
    return replace(inputs, boxes=inputs.boxes[:count], tile_index=inputs.tile_index[:count])
