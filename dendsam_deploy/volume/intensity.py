"""Grey values of any type brought to the 8 bits that the models were trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import VolumeError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def to_uint8(image: NDArray[np.generic], name: str = "the slice") -> NDArray[np.uint8]:
    """Stretch a slice from its own minimum and maximum to 0 ... 255, truncating; uint8 stays as it is.

    This is micro-sam's arithmetic in its order of operations, so that a fine-tuned model sees at deployment the very
    bytes that it saw in training. A constant slice becomes zeros.

    Parameters
    ----------
    image : ndarray, shape (H, W)
        Grey values, integers or real numbers.
    name : str
        What to call the slice in an error, such as ``stack.tif: slice 12``.

    Returns
    -------
    ndarray, shape (H, W), uint8
        `image` itself where it is uint8.

    Raises
    ------
    VolumeError
        The slice holds NaN, infinity or complex numbers.

    References
    ----------
    https://github.com/computational-cell-analytics/micro-sam, ``micro_sam/util.py``, ``_to_image``
    """
    if image.dtype == np.uint8:
        return image.astype(np.uint8, copy=False)
    if image.dtype.kind == "c":
        raise VolumeError(f"{name} holds complex numbers, expected grey values; save its magnitude or real part")
    with np.errstate(over="ignore", invalid="ignore"):
        stretched = image.astype(np.float32) - image.min()
        peak = stretched.max()
        if not np.isfinite(peak):
            raise VolumeError(
                f"{name} holds NaN, infinite or too large values, expected finite grey values; "
                "replace them, for example by 0"
            )
        if peak > 0:
            stretched /= peak
    scaled: NDArray[np.uint8] = (stretched * 255).astype(np.uint8)
    return scaled
