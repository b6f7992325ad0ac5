"""A score for which objects do not matter: Dice of all foreground."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dendsam_deploy.metrics.contingency import ContingencyTable


def foreground_dice(table: ContingencyTable) -> float:
    """Compute the Dice coefficient of the foreground, any label above 0; 1 where neither side has any.

    References
    ----------
    L. R. Dice, Ecology 26 (1945) 297-302, doi:10.2307/1932409
    """
    in_truth, in_segmentation = table.truth > 0, table.segment > 0
    both = int(table.voxels[in_truth & in_segmentation].sum())
    sizes = int(table.voxels[in_truth].sum()) + int(table.voxels[in_segmentation].sum())
    return 2 * both / sizes if sizes else 1.0
