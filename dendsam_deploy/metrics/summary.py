"""All scores of a contingency table at once, under the names that reports and ``--json`` use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dendsam_deploy.metrics.foreground import foreground_dice
from dendsam_deploy.metrics.matching import MSA_THRESHOLDS, S_INST_THRESHOLDS, segmentation_accuracy
from dendsam_deploy.metrics.object_consistency import object_consistency
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.metrics.panoptic import panoptic_quality
from dendsam_deploy.metrics.partition import adapted_rand, variation_of_information

if TYPE_CHECKING:
    from dendsam_deploy.metrics.contingency import ContingencyTable


@dataclass(frozen=True, slots=True)
class ObjectScores:
    """Scores of objects, in a slice or in a volume. The first three are errors, 0 when perfect; the others are 1 then.

    Where neither side has an object all scores are perfect.

    Parameters
    ----------
    oce, e_gs, e_sg : float
        Object-level consistency error and its two directions, see `object_consistency`.
    pq, sq, dq : float
        Panoptic, segmentation and detection quality at an IoU of .5, see `panoptic_quality`.
    s_inst : float
        Mean of TP / (TP + FP + FN) over IoU thresholds .10, .15, ... .90.
    msa, sa50, sa75 : float
        Mean of the same over .50, .55, ... .95, and its values at .50 and .75.
    dice : float
        Dice coefficient of the foreground.
    """

    oce: float
    e_gs: float
    e_sg: float
    pq: float
    sq: float
    dq: float
    s_inst: float
    msa: float
    sa50: float
    sa75: float
    dice: float


@dataclass(frozen=True, slots=True)
class PartitionScores:
    """Scores of a labelling as a partition of the truth's voxels; see `variation_of_information` and `adapted_rand`."""

    vi_split: float
    vi_merge: float
    arand_error: float
    arand_precision: float
    arand_recall: float


def score_objects(table: ContingencyTable) -> ObjectScores:
    """Compute all object-level scores of a table."""
    overlaps = ObjectOverlaps.from_table(table)
    consistency, panoptic = object_consistency(overlaps), panoptic_quality(overlaps)
    thresholds = sorted({*S_INST_THRESHOLDS, *MSA_THRESHOLDS})
    accuracy = dict(zip(thresholds, segmentation_accuracy(overlaps, thresholds).tolist(), strict=True))
    return ObjectScores(
        oce=consistency.oce,
        e_gs=consistency.e_gs,
        e_sg=consistency.e_sg,
        pq=panoptic.pq,
        sq=panoptic.sq,
        dq=panoptic.dq,
        s_inst=sum(accuracy[threshold] for threshold in S_INST_THRESHOLDS) / len(S_INST_THRESHOLDS),
        msa=sum(accuracy[threshold] for threshold in MSA_THRESHOLDS) / len(MSA_THRESHOLDS),
        sa50=accuracy[0.5],
        sa75=accuracy[0.75],
        dice=foreground_dice(table),
    )


def score_partition(table: ContingencyTable) -> PartitionScores:
    """Compute all partition scores of a table."""
    information, rand = variation_of_information(table), adapted_rand(table)
    return PartitionScores(information.split, information.merge, rand.error, rand.precision, rand.recall)
