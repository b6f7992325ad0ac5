"""Quality against box error: how exact a detector's boxes have to be, and whether this detector's are.

Every edge of every true box is moved by a share of the side that it bounds, drawn between ``-a`` and ``a``; the masks
that such boxes prompt are painted and scored as all others. Between jittered boxes and a detector's stands one number:
edges that are drawn so are off by ``a / 2`` on average, and the mean offset of a detector's edges is measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.instances import Detections, box_iou
from dendsam_deploy.metrics.bootstrap import mean_intervals
from dendsam_deploy.metrics.summary import ObjectScores

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.prompt_sources import TrueSlice
    from dendsam_deploy.evaluate.score_report import Bounds

JITTERS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Levels ``a``: parts of a box's side."""

CURVE_SCORE = "s_inst"
"""The score that the verdict is about: it falls with every loss of overlap, where PQ looks at one threshold."""

TOLERATED_LOSS = 0.1
"""A detector is good enough if its boxes cost at most this part of what exact boxes reach."""

_MATCH_IOU = 0.5


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Scores at one level of jitter.

    Parameters
    ----------
    jitter : float
        Largest offset of an edge, as a part of the side.
    scores : ObjectScores
        Means over slices and repetitions.
    intervals : mapping
        Of the means over slices, by score.
    """

    jitter: float
    scores: ObjectScores
    intervals: Mapping[str, Bounds]


@dataclass(frozen=True, slots=True)
class DetectorError:
    """How far a detector's boxes are from the true ones.

    Parameters
    ----------
    matched, missed, extra : int
        Pairs of a detection and a true box of IoU .5 or more, one to one; true boxes and detections without a partner.
        With a sparse truth no detection is extra.
    edge_error : float or None
        Mean offset of the matched boxes' edges, as a part of the true side; None without any pair.
    box_iou : float or None
        Mean IoU of the matched boxes.
    """

    matched: int
    missed: int
    extra: int
    edge_error: float | None
    box_iou: float | None

    @property
    def equivalent_jitter(self) -> float | None:
        """The level of jitter whose edges are off by as much on average."""
        return None if self.edge_error is None else 2 * self.edge_error


@dataclass(frozen=True, slots=True)
class BoxErrorCurve:
    """The curve of one bundle, and where its detector lies on it.

    Parameters
    ----------
    bundle : str
        Its name.
    repeats : int
        Draws at each level but 0.
    points : tuple of CurvePoint
        Ascending in jitter, the first one exact boxes.
    detector : DetectorError or None
        None where the bundle has no detector.
    detector_score : float or None
        What the detector's own boxes reach, all its errors together.
    """

    bundle: str
    repeats: int
    points: tuple[CurvePoint, ...]
    detector: DetectorError | None
    detector_score: float | None

    def at(self, jitter: float) -> float:
        """Return the score at a level of jitter, linear between the levels and constant beyond the last."""
        levels = [point.jitter for point in self.points]
        return float(np.interp(jitter, levels, [getattr(point.scores, CURVE_SCORE) for point in self.points]))

    @property
    def is_good_enough(self) -> bool | None:
        """Whether the detector's boxes cost at most `TOLERATED_LOSS`; None where there is no detector."""
        if self.detector_score is None:
            return None
        return self.detector_score >= (1 - TOLERATED_LOSS) * self.at(0)

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        error, score = self.detector, self.detector_score
        if error is None or score is None:
            return "The bundle has no detector, so the curve only says how exact boxes from elsewhere have to be."
        exact = self.at(0)
        if error.edge_error is None or not exact:
            return "Not good enough: the detector finds none of the objects."
        jitter = 2 * error.edge_error
        for_offsets, in_all = exact - self.at(jitter), exact - score
        objects = error.matched + error.missed
        beyond = ", which is beyond the curve" if jitter > self.points[-1].jitter else ""
        plural = "" if error.extra == 1 else "es"
        where = (
            f"its boxes' edges are off by {error.edge_error:.1%} of the side on average, like exact boxes jittered by "
            f"up to {jitter:.0%}{beyond}; that costs {for_offsets:.3f} of S_inst {exact:.3f}, and all its errors "
            f"together, {error.missed} of {objects} objects missed and {error.extra} box{plural} too many among them, "
            f"cost {in_all:.3f} ({in_all / exact:.0%})"
        )
        if self.is_good_enough:
            return f"Good enough: {where}."
        remedy = (
            "what would help is tighter boxes"
            if for_offsets > in_all / 2
            else "what would help is finding the right objects, not tighter boxes"
        )
        return f"Not good enough: {where}; {remedy}."

    def to_document(self) -> dict[str, object]:
        """Return the curve as JSON values."""
        error = self.detector
        return {
            "bundle": self.bundle,
            "score": CURVE_SCORE,
            "repeats": self.repeats,
            "points": [
                {
                    "jitter": point.jitter,
                    **asdict(point.scores),
                    "intervals": {name: list(ends) for name, ends in point.intervals.items()},
                }
                for point in self.points
            ],
            "detector": None
            if error is None
            else {**asdict(error), "equivalent_jitter": error.equivalent_jitter, "score": self.detector_score},
            "good_enough": self.is_good_enough,
            "verdict": self.verdict,
        }


def jittered_boxes(truth: TrueSlice, seed: int, repeats: int) -> Iterator[tuple[int, Detections]]:
    """Yield (number of the level in `JITTERS`, boxes): the exact ones once, every other level `repeats` times.

    The draws depend on the seed and the slice alone.
    """
    boxes = truth.boxes
    scores = np.ones(len(boxes), np.float32)
    side = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    yield 0, Detections(boxes, scores)
    rng = np.random.default_rng((seed, truth.z))
    for _ in range(repeats):
        for level, jitter in enumerate(JITTERS[1:], start=1):
            moved = boxes + rng.uniform(-jitter, jitter, boxes.shape) * side
            yield level, Detections(moved.astype(np.float32), scores)


def curve_points(
    scores: Sequence[Sequence[Sequence[ObjectScores]]], resamples: int, seed: int
) -> tuple[CurvePoint, ...]:
    """Put the scores of a curve together.

    Parameters
    ----------
    scores : sequence
        ``scores[slice][level]`` are those of all repetitions.
    resamples, seed : int
        Draws of slices behind the intervals, see `metrics.bootstrap`; 0 for none.
    """
    names = [field.name for field in fields(ObjectScores)]
    points = []
    for level, jitter in enumerate(JITTERS):
        # One number for each slice: repetitions tell nothing about other slices.
        values = np.array(
            [[np.mean([getattr(one, name) for one in of_slice[level]]) for name in names] for of_slice in scores]
        )
        means = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
        intervals: dict[str, Bounds] = {}
        if resamples and len(values) > 1:
            ends = mean_intervals(values, resamples, seed).tolist()
            intervals = {name: (low, high) for name, low, high in zip(names, *ends, strict=True)}
        points.append(CurvePoint(jitter, ObjectScores(**means), intervals))
    return tuple(points)


@dataclass(frozen=True, slots=True)
class BoxErrors:
    """A detector's boxes in one slice: mean edge error and IoU of each matched one, and how many were not matched."""

    edge_errors: tuple[float, ...]
    box_iou: tuple[float, ...]
    missed: int
    extra: int


def measure_boxes(detections: Detections, truth: TrueSlice, *, sparse_truth: bool) -> BoxErrors:
    """Compare a detector's boxes with the true ones of a slice.

    Parameters
    ----------
    detections : Detections
        What it found, slice px.
    truth : TrueSlice
        The slice.
    sparse_truth : bool
        Whether detections of nothing may be right.
    """
    boxes = truth.boxes
    iou = box_iou(detections.boxes_xyxy, boxes)
    pairs = _match(iou)
    mine, other = np.array(pairs, np.intp).reshape(-1, 2).T
    side = np.tile(boxes[other, 2:] - boxes[other, :2], 2)
    offsets = np.abs(detections.boxes_xyxy[mine] - boxes[other]) / side
    free = detections.boxes_xyxy[np.setdiff1d(np.arange(len(detections)), mine)].tolist()
    return BoxErrors(
        edge_errors=tuple(offsets.mean(axis=1).tolist()),
        box_iou=tuple(iou[mine, other].tolist()),
        missed=len(boxes) - len(pairs),
        extra=0 if sparse_truth else sum(not _is_void(box, truth) for box in free),
    )


def detector_error(slices: Sequence[BoxErrors]) -> DetectorError:
    """Put the errors of several slices together."""
    edges = [error for each in slices for error in each.edge_errors]
    overlaps = [iou for each in slices for iou in each.box_iou]
    return DetectorError(
        matched=len(edges),
        missed=sum(each.missed for each in slices),
        extra=sum(each.extra for each in slices),
        edge_error=float(np.mean(edges)) if edges else None,
        box_iou=float(np.mean(overlaps)) if overlaps else None,
    )


def _match(iou: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Pair rows and columns of IoU ``(N, M)`` one to one, the pairs of the largest IoU first."""
    pairs: list[tuple[int, int]] = []
    free = iou.copy()
    while free.size and free.max() >= _MATCH_IOU:
        mine, other = divmod(int(free.argmax()), free.shape[1])
        pairs.append((mine, other))
        free[mine], free[:, other] = -1, -1
    return pairs


def _is_void(box_xyxy: Sequence[float], truth: TrueSlice) -> bool:
    """Tell whether the middle of a box lies on something that is not judged."""
    height, width = truth.components.shape
    x, y = (int((box_xyxy[axis] + box_xyxy[axis + 2]) / 2) for axis in (0, 1))
    return int(truth.components[min(y, height - 1), min(x, width - 1)]) in truth.void
