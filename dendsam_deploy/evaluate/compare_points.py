"""Level 2 of parity: what the decoder for points returns, fed the reference's embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.evaluate.findings import (
    Finding,
    largest_difference,
    max_over_std,
    not_finite,
    rms_over_std,
    run_graph,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.reference import PointAnswers
    from dendsam_deploy.runtimes.runner import Runner


def compare_points(decoder: Runner, embeddings: NDArray[np.float32], expected: PointAnswers) -> Iterator[Finding]:
    """Compare masks and predicted IoU of clicks with segment_anything's; one point, and none, at least by their shape.

    Parameters
    ----------
    decoder : Runner
        The decoder for points, open.
    embeddings : ndarray, shape (T, 256, S/16, S/16), float32
        The reference's.
    expected : PointAnswers
        Clicks and what the reference makes of them.
    """
    count, points = expected.labels.shape
    for prompts, length in ((count, points), (1, 1), (0, 1)):
        detail = f"prompts={prompts}, points={length}"
        outputs = run_graph(
            decoder,
            {
                "embeddings": embeddings,
                "points": expected.points[:prompts, :length],
                "labels": expected.labels[:prompts, :length],
                "tile_index": expected.tile_index[:prompts],
            },
        )
        wanted = {"logits": (prompts, *expected.logits.shape[1:]), "iou": (prompts, *expected.iou.shape[1:])}
        wrong = sum(outputs[name].shape != shape for name, shape in wanted.items())
        yield Finding(2, "points", "wrong_shapes", wrong, detail)
        if wrong or not prompts:
            continue
        logits, iou = (outputs[name].astype(np.float32) for name in ("logits", "iou"))
        yield Finding(2, "points", "not_finite", not_finite(logits) + not_finite(iou), detail)
        if length == points:
            yield Finding(2, "points", "logits_max_over_std", max_over_std(logits, expected.logits), detail)
            yield Finding(2, "points", "logits_rms_over_std", rms_over_std(logits, expected.logits), detail)
            difference = largest_difference(iou, expected.iou)
            yield Finding(2, "points", "predicted_iou_max_difference", difference, detail)
