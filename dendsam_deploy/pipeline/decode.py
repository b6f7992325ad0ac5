"""Masks of a slice: its tiles through the encoder, its boxes through the decoder in batches of equal region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from dendsam_deploy.geometry import region_cells
from dendsam_deploy.instances import Masks
from dendsam_deploy.pipeline.infer import infer, tile_batches
from dendsam_deploy.runtimes.runner import keeps_tensors, share_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Decoding
    from dendsam_deploy.pipeline.prepare import PreparedSlice, TilePlan
    from dendsam_deploy.runtimes.runner import Runner, Tensor


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How boxes are decoded.

    Parameters
    ----------
    decoding : Decoding
        Regions on offer and the margin around a box, from the manifest.
    boxes_per_batch : int
        Most boxes of one call of the decoder on a CPU. A box costs ViT-B's decoder 16 to 33 MB while the call lasts,
        and larger batches are not faster. A GPU's runner knows best how many it wants.
    """

    decoding: Decoding
    boxes_per_batch: int = 16


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Encoded tiles of one slice.

    Parameters
    ----------
    values : ndarray or Resident, shape (T, 256, S/16, S/16), float32
        Encoder output.
    tile_index : ndarray, shape (T,), int64
        The tile that each one belongs to, ascending.
    """

    values: Tensor
    tile_index: NDArray[np.int64]

    def of_tiles(self, tile_index: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """Return embeddings that include those of some tiles, and for each of these its row in them.

        Rows of an array are picked where they do not follow each other. On a device, where picking would be a graph of
        its own, the tiles between them come along.
        """
        tiles, position = np.unique(tile_index, return_inverse=True)
        rows = np.searchsorted(self.tile_index, tiles)
        first, stop = int(rows[0]), int(rows[-1]) + 1
        if isinstance(self.values, np.ndarray) and stop - first > len(rows):
            return self.values[rows], position.astype(np.int64)
        return self.values[first:stop], (rows[position] - first).astype(np.int64)


def encode_tiles(
    prepared: PreparedSlice, tile_index: NDArray[np.int64], encoder: Runner, decoder: Runner
) -> Embeddings:
    """Encode some tiles of a slice and leave the result where the decoder takes it from.

    Parameters
    ----------
    prepared : PreparedSlice
        The slice.
    tile_index : ndarray, shape (N,), int64
        Tiles that are needed; repetitions are encoded once. At least one.
    encoder : Runner
        Image encoder.
    decoder : Runner
        Box decoder.
    """
    wanted = np.unique(tile_index)
    batches = list(tile_batches(wanted, encoder))
    inputs = (prepared.tile_inputs(int(wanted[rows][0]), len(wanted[rows])) for rows in batches)
    if keeps_tensors(encoder) and share_memory(encoder, decoder):
        room = encoder.allocate("embeddings", len(wanted))
        for rows, tensors in zip(batches, inputs, strict=True):
            encoder.run_into(tensors, {"embeddings": room[rows]})
        return Embeddings(room, wanted)
    return Embeddings(np.concatenate([infer(encoder, tensors)["embeddings"] for tensors in inputs]), wanted)


@dataclass(frozen=True, slots=True)
class BoxDecoder:
    """The decoder graph and how it is fed."""

    runner: Runner
    options: DecodeOptions

    @property
    def boxes_per_batch(self) -> int:
        """Most boxes of one call."""
        return self.runner.rows_per_call if keeps_tensors(self.runner) else self.options.boxes_per_batch

    def batches(
        self, boxes_xyxy: NDArray[np.float32], tile_index: NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Yield (region side in cells, indices of boxes): equal regions together, and within them equal tiles."""
        decoding = self.options.decoding
        longest_px = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).max(axis=1, initial=0.0)
        margins_px = decoding.margin_fraction * longest_px + decoding.margin_px
        regions = np.array(
            [
                region_cells(box, margin, decoding.region_sizes)
                for box, margin in zip(boxes_xyxy.tolist(), margins_px.tolist(), strict=True)
            ],
            np.int64,
        )
        for region in np.unique(regions):
            (members,) = np.nonzero(regions == region)
            members = members[np.argsort(tile_index[members], kind="stable")]
            for start in range(0, len(members), self.boxes_per_batch):
                yield int(region), members[start : start + self.boxes_per_batch]


def decode_masks(
    boxes_xyxy: NDArray[np.float32],
    box_index: NDArray[np.int64],
    tile_index: NDArray[np.int64],
    embeddings: Embeddings,
    decoder: BoxDecoder,
) -> Masks:
    """Decode all boxes of a slice.

    Parameters
    ----------
    boxes_xyxy : ndarray, shape (N, 4), float32
        Boxes in the tile px of their tile.
    box_index : ndarray, shape (N,), int64
        Which box of the slice each of them is, or is a part of.
    tile_index : ndarray, shape (N,), int64
        The tile of each box.
    embeddings : Embeddings
        Those tiles, encoded.
    decoder : BoxDecoder
        The graph and how it is fed.

    Returns
    -------
    Masks
        In the order of the boxes.
    """
    logits: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(boxes_xyxy)
    origins = np.zeros((len(boxes_xyxy), 2), np.int64)
    predicted_iou = np.zeros(len(boxes_xyxy), np.float32)
    for region, batch in decoder.batches(boxes_xyxy, tile_index):
        values, rows = embeddings.of_tiles(tile_index[batch])
        outputs = infer(
            decoder.runner,
            {
                "embeddings": values,
                "boxes": boxes_xyxy[batch],
                "tile_index": rows,
                "region": np.array([region], np.int64),
            },
        )
        for row, index in enumerate(batch):
            logits[index] = cast("NDArray[np.float32]", outputs["logits"][row])
        origins[batch] = outputs["origin"]
        predicted_iou[batch] = outputs["iou"]
    return Masks(tuple(logits), origins, tile_index, predicted_iou, box_index)


def boxes_in_tiles(
    boxes_xyxy: NDArray[np.float32], tile_index: NDArray[np.int64], plan: TilePlan
) -> NDArray[np.float32]:
    """Convert boxes ``(N, 4)`` from slice px to the tile px of their tiles, cut off where the tile ends."""
    corners = np.array([(tile.read.x0, tile.read.y0) * 2 for tile in plan.tiles], np.float32)[tile_index]
    sizes = np.array([(tile.read.width, tile.read.height) * 2 for tile in plan.tiles], np.float32)[tile_index]
    boxes: NDArray[np.float32] = np.clip(plan.frame.boxes_to_model(boxes_xyxy) - corners, 0, sizes)
    return boxes
