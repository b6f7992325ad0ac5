"""Scores of masks, for which objects do not matter: Dice of all foreground, IoU of one mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

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


def mask_iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Compute the intersection over union of two masks, such as an object and the mask that its own box prompted.

    Parameters
    ----------
    first, second : ndarray of bool, one shape, any number of axes
        The masks in a common frame, both whole: what lies outside a crop is not counted.

    Returns
    -------
    float
        1 where both masks are empty.

    Raises
    ------
    InvalidArgumentError
        The masks differ in shape or are not boolean.
    """
    if first.shape != second.shape or first.dtype != bool or second.dtype != bool:
        raise InvalidArgumentError(
            f"masks are {first.dtype}{first.shape} and {second.dtype}{second.shape}, expected bool of one shape"
        )
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0
