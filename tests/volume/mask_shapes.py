"""Masks for the writers of other programs' formats: hand-made ones, and any that hypothesis can think of."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import RunLengths
from dendsam_deploy.volume.exported_masks import SliceMasks

SLICE_HW = (23, 31)


@st.composite
def any_mask(draw: st.DrawFn) -> np.ndarray:
    """A slice with at least one pixel of mask: noise of any density, or rectangles with holes."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    mask = rng.random(SLICE_HW) < draw(st.sampled_from([0.02, 0.3, 0.5, 0.9, 1.0]))
    mask[rng.integers(SLICE_HW[0]), rng.integers(SLICE_HW[1])] = True
    return mask


def encoded(mask: np.ndarray) -> RunLengths:
    """A mask of a slice in its tight window."""
    rows, columns = np.nonzero(mask)
    y0, x0, y1, x1 = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    return RunLengths.from_mask(mask[y0:y1, x0:x1], Window(int(y0), int(x0), int(y1 - y0), int(x1 - x0)))


def letter_shapes() -> list[np.ndarray]:
    """One pixel, a bar to the border, a ring, two pieces that share a corner, the whole slice, its last column."""
    shapes = [np.zeros(SLICE_HW, bool) for _ in range(6)]
    shapes[0][5, 7] = True
    shapes[1][20:, 3:9] = True
    shapes[2][4:12, 4:14] = True
    shapes[2][6:9, 6:11] = False
    shapes[3][2:4, 2:4] = shapes[3][4:6, 4:6] = True
    shapes[4][:] = True
    shapes[5][:, -1] = True
    return shapes


def slice_of(masks: list[np.ndarray], z: int = 3) -> SliceMasks:
    """Masks as the objects 11, 12, ... of a slice."""
    count = len(masks)
    return SliceMasks(z, SLICE_HW, tuple(map(encoded, masks)), np.arange(11, 11 + count), np.linspace(0.9, 0.5, count))
