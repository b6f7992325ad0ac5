"""Thresholds of a grid of clicks, chosen on labelled slices, because models differ in how sure they are of their masks.

segment_anything's own thresholds suit its own weights. A small or freshly fine-tuned model may predict no IoU as high,
and a grid that returns nothing says little about grids. Masks are decoded once, with the lowest thresholds; all pairs
of thresholds are then tried on them.

References
----------
micro-sam chooses the thresholds of its automatic segmentation in the same way (``instance_segmentation`` grid search):
Archit et al. 2025, doi:10.1038/s41592-024-02580-4.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.evaluate.point_grid import find_grid_candidates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.point_grid import GridOptions
    from dendsam_deploy.evaluate.prompt_sources import Bench, TrueSlice
    from dendsam_deploy.metrics.summary import ObjectScores

PREDICTED_IOUS = (0.5, 0.6, 0.7, 0.8, 0.88)
STABILITIES = (0.6, 0.7, 0.8, 0.9, 0.95)
CHOICE_SCORE = "s_inst"
"""Mean over slices of this is what the best thresholds have most of."""


def best_grid(
    benches: Iterable[Bench],
    options: GridOptions,
    fixed: tuple[float | None, float | None],
    score: Callable[[TrueSlice, NDArray[np.uint32]], ObjectScores],
) -> GridOptions:
    """Return `options` with the thresholds that score best.

    Parameters
    ----------
    benches : iterable of Bench
        Labelled slices, one at a time.
    options : GridOptions
        What else the grid is like.
    fixed : (float or None, float or None)
        Predicted IoU and stability that were asked for; None are chosen, of `PREDICTED_IOUS` and `STABILITIES`.
    score : callable
        Gives the scores of a slice's label map (Y, X) uint32.
    """
    choices = [
        (given,) if given is not None else ladder
        for given, ladder in zip(fixed, (PREDICTED_IOUS, STABILITIES), strict=True)
    ]
    pairs = list(product(*choices))
    per_slice = [_scores(bench, options, pairs, score) for bench in benches]
    mean = np.mean(per_slice, axis=0)
    # Of equally good pairs the strictest, which is the last: more masks would only be more to paint.
    predicted_iou, stability = pairs[len(pairs) - 1 - int(np.argmax(mean[::-1]))]
    return replace(options, predicted_iou=predicted_iou, stability=stability)


def _scores(
    bench: Bench,
    options: GridOptions,
    pairs: list[tuple[float, ...]],
    score: Callable[[TrueSlice, NDArray[np.uint32]], ObjectScores],
) -> list[float]:
    """Return the score of a slice with each pair of thresholds."""
    decoder, recipe = bench.session.points, bench.recipe
    assert decoder is not None, "who asks for a grid has looked"
    ious, stabilities = zip(*pairs, strict=True)
    lowest = replace(options, predicted_iou=min(ious), stability=min(stabilities))
    found = find_grid_candidates(bench.clicked, decoder, recipe.plan, recipe.paint.mask_logit, lowest)
    scores = []
    for predicted_iou, stability in pairs:
        masks = found.chosen(replace(options, predicted_iou=predicted_iou, stability=stability))
        labels = bench.paint(masks.detections, masks.masks)
        scores.append(float(getattr(score(bench.truth, labels), CHOICE_SCORE)))
    return scores
