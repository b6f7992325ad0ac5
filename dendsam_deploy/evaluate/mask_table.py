"""All masks of a volume in columns: what is known of each, and whether it is right where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.pipeline.link import LinkOptions, SliceObjects, link_slices
from dendsam_deploy.pipeline.neighbours import agreements
from dendsam_deploy.pipeline.pieces import paint_instances
from dendsam_deploy.progress import Progress
from dendsam_deploy.volume.label_objects import label_components

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.instances import Instances
    from dendsam_deploy.pipeline.scored_masks import ScoredVolume
    from dendsam_deploy.progress import ProgressCallback
    from dendsam_deploy.volume.volume import VolumeReader


@dataclass(frozen=True, slots=True)
class MaskTable:
    """The N masks of a volume, ascending by slice and label.

    Parameters
    ----------
    z, label, object_id : ndarray, shape (N,), int64
        Slice, number in the slice, 3-D object.
    boxes_xyxy : ndarray, shape (N, 4), float32
        The boxes that prompted them, slice px.
    qualities : ndarray, shape (N, 4), float64
        Detection score, predicted IoU, stability and agreement, as in `mask_choice.MaskCriteria`; NaN where a mask has
        no neighbouring slice.
    below, above : ndarray, shape (N,), float64
        Agreement with slice z - 1 and z + 1; NaN where it is not known.
    area_px : ndarray, shape (N,), int64
        Area, slice px.
    """

    z: NDArray[np.int64]
    label: NDArray[np.int64]
    object_id: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    qualities: NDArray[np.float64]
    below: NDArray[np.float64]
    above: NDArray[np.float64]
    area_px: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.z)

    def rows_of(self, z: int) -> slice:
        """Return the rows of a slice."""
        first, stop = np.searchsorted(self.z, [z, z + 1])
        return slice(int(first), int(stop))


@dataclass(frozen=True, slots=True)
class JudgingOptions:
    """When a mask is right.

    Parameters
    ----------
    right_iou : float
        IoU with an object of the truth from which a mask is right.
    background_labels : tuple of int
        Labels of the truth that are no objects, such as membrane; 0 never is one.
    sparse_truth : bool
        The truth shows only some objects: masks that touch none of them are neither right nor wrong.
    """

    right_iou: float = 0.5
    background_labels: tuple[int, ...] = ()
    sparse_truth: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.right_iou <= 1:
            raise InvalidArgumentError(
                f"the IoU of a right mask is {self.right_iou}, expected more than 0 and at most 1"
            )


def collect_masks(scored: ScoredVolume, progress: ProgressCallback) -> MaskTable:
    """Put together what is known of the masks of a finished run, and link them into 3-D objects."""
    links = link_slices((SliceObjects(z, found) for z, found in _reported(scored, "link", progress)), LinkOptions())
    columns: list[tuple[NDArray[np.generic], ...]] = []
    for z, agreement in agreements(_reported(scored, "compare", progress)):
        found = scored.load(z)
        objects, count = found.instances, len(found.instances)
        qualities = np.column_stack([objects.scores, objects.predicted_iou, found.stability, agreement.best])
        columns.append(
            (
                np.full(count, z),
                objects.ids.astype(np.int64),
                links.ids_of(z)[objects.ids].astype(np.int64),
                objects.boxes_xyxy,
                qualities.astype(np.float64).reshape(count, 4),
                agreement.below.astype(np.float64),
                agreement.above.astype(np.float64),
                objects.areas_px,
            )
        )
    return MaskTable(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def judge_masks(
    table: MaskTable, scored: ScoredVolume, truth: VolumeReader, slices: range | None, options: JudgingOptions
) -> tuple[NDArray[np.float64], tuple[int, ...]]:
    """Compare the masks of labelled slices with the truth.

    Parameters
    ----------
    table : MaskTable
        All masks.
    scored : ScoredVolume
        Where their pixels are.
    truth : VolumeReader
        Labels of the whole volume.
    slices : range or None
        Slices whose truth is complete; None takes those that show an object of the truth.
    options : JudgingOptions
        What counts.

    Returns
    -------
    truth_iou : ndarray, shape (N,), float64
        Largest IoU of each mask with a connected piece of a label; NaN for masks of other slices, and with a sparse
        truth for those that touch no object.
    labelled : tuple of int
        The slices that were compared.

    Raises
    ------
    VolumeError
        If none of the slices shows an object of the truth.
    """
    best = np.full(len(table), np.nan)
    is_empty, labelled = True, []
    for z in scored.slices if slices is None else slices:
        labels = truth.read(z).astype(np.uint32)
        labels[np.isin(labels, options.background_labels)] = 0
        pieces, ids = label_components(labels)
        if slices is None and not len(ids):
            continue
        is_empty &= not len(ids)
        labelled.append(z)
        found = scored.load(z).instances
        painted = paint_instances(found, found.ids, pieces.shape)
        overlaps = ObjectOverlaps.from_table(ContingencyTable.from_labels(painted, pieces))
        met, iou = overlaps.best_segments()
        rows = table.rows_of(z)
        place = np.searchsorted(overlaps.truth_ids, table.label[rows])
        best[rows] = np.where((met[place] == 0) & options.sparse_truth, np.nan, iou[place])
    if is_empty:
        raise VolumeError(
            f"{truth.info.source}: shows no object in the slices that are looked at, so no mask can be judged; name "
            "slices that are labelled"
        )
    return best, tuple(labelled)


def separate_twins(table: MaskTable, scored: ScoredVolume, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return 3-D objects ``(N,)`` under which no two kept masks of a slice melt into one.

    Two parts of one dendrite may touch in a slice, and as pixels of one label they would be one object to train on. The
    smaller one gets a number of its own.
    """
    ids = table.object_id.copy()
    following = int(ids.max(initial=0)) + 1
    for z in np.unique(table.z[kept]).tolist():
        rows = np.arange(len(table))[table.rows_of(z)][kept[table.rows_of(z)]]
        twins = rows[np.isin(ids[rows], _repeated(ids[rows]))]
        if not len(twins):
            continue
        found = scored.load(z).instances
        chosen = np.isin(found.ids, table.label[twins])
        numbers = np.where(chosen, found.ids, 0).astype(np.uint32)
        height = max(runs.window.y1 for runs in found.run_lengths)
        width = max(runs.window.x1 for runs in found.run_lengths)
        row_of = dict(zip(table.label[twins].tolist(), twins.tolist(), strict=True))
        for one, other in _touching(paint_instances(found, numbers, (height, width))):
            first, second = row_of[one], row_of[other]
            if ids[first] == ids[second]:
                ids[first if table.area_px[first] < table.area_px[second] else second] = following
                following += 1
    return ids


def _repeated(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the values that occur more than once."""
    distinct, counts = np.unique(values, return_counts=True)
    return distinct[counts > 1]


def _touching(labels: NDArray[np.uint32]) -> list[tuple[int, int]]:
    """Return the pairs of labels of an image that share an edge or a corner, in order."""
    pairs: set[tuple[int, int]] = set()
    for one, other in (
        (labels[:, :-1], labels[:, 1:]),
        (labels[:-1], labels[1:]),
        (labels[:-1, :-1], labels[1:, 1:]),
        (labels[:-1, 1:], labels[1:, :-1]),
    ):
        meets = (one != other) & (one > 0) & (other > 0)
        both = np.sort(np.stack([one[meets], other[meets]], axis=1), axis=1)
        pairs |= {(int(low), int(high)) for low, high in np.unique(both, axis=0)}
    return sorted(pairs)


def _reported(scored: ScoredVolume, stage: str, progress: ProgressCallback) -> Iterator[tuple[int, Instances]]:
    """Yield the objects of all slices and report each."""
    total = len(scored.slices)
    for count, (z, instances) in enumerate(scored.instances()):
        progress(Progress(stage, count, total))
        yield z, instances
    progress(Progress(stage, total, total))
