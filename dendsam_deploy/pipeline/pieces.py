"""The result of one slice as a file: what a run resumes from and what linking reads."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Instances, RunLengths

if TYPE_CHECKING:
    from numpy.typing import NDArray


def bytes_from_instances(instances: Instances) -> bytes:
    """Encode the objects of a slice as an npz file; equal objects give equal bytes."""
    windows = [
        (runs.window.y0, runs.window.x0, runs.window.height, runs.window.width) for runs in instances.run_lengths
    ]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        ids=instances.ids,
        boxes_xyxy=instances.boxes_xyxy,
        scores=instances.scores,
        predicted_iou=instances.predicted_iou,
        areas_px=instances.areas_px,
        windows=np.array(windows, np.int64).reshape(-1, 4),
        run_counts=np.array([len(runs.runs) for runs in instances.run_lengths], np.int64),
        runs=np.concatenate([np.zeros((0, 3), np.int32), *(runs.runs for runs in instances.run_lengths)]),
    )
    return buffer.getvalue()


def instances_from_bytes(data: bytes) -> Instances:
    """Decode what `bytes_from_instances` made; the caller has checked the digest."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        ends = np.cumsum(arrays["run_counts"])[:-1]
        runs = np.split(arrays["runs"], ends) if len(arrays["run_counts"]) else []
        return Instances(
            ids=arrays["ids"],
            boxes_xyxy=arrays["boxes_xyxy"],
            scores=arrays["scores"],
            predicted_iou=arrays["predicted_iou"],
            areas_px=arrays["areas_px"],
            run_lengths=tuple(
                RunLengths(Window(*window), part) for window, part in zip(arrays["windows"].tolist(), runs, strict=True)
            ),
        )


def paint_instances(instances: Instances, ids: NDArray[np.uint32], shape_hw: tuple[int, int]) -> NDArray[np.uint32]:
    """Paint the objects of a slice with new labels.

    Parameters
    ----------
    instances : Instances
        Objects that share no pixel.
    ids : ndarray, shape (N,), uint32
        The new label of each.
    shape_hw : (int, int)
        Shape of the slice.

    Returns
    -------
    ndarray, shape `shape_hw`, uint32
        0 is background.
    """
    # A run adds its label where it begins and takes it away where it ends; uint32 wraps, so the running sum is exact.
    steps = np.zeros((shape_hw[0], shape_hw[1] + 1), np.uint32)
    for label, encoded in zip(ids, instances.run_lengths, strict=True):
        rows, first, length = encoded.runs.T
        rows, first = rows + encoded.window.y0, first + encoded.window.x0
        np.add.at(steps, (rows, first), label)
        np.subtract.at(steps, (rows, first + length), label)
    labels: NDArray[np.uint32] = np.cumsum(steps[:, :-1], axis=1, dtype=np.uint32)
    return labels
