"""How many tiles a step encodes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dendsam_deploy.training.device import MOST_TILES_PER_STEP, tiles_that_fit

GIB = 1 << 30


def test_worked_examples():
    # 80 % of 24 GiB less 1.2 GiB leaves 18 GiB: six steps of 3 GiB.
    assert tiles_that_fit(24 * GIB, int(1.2 * GIB), 3 * GIB) == 6
    assert tiles_that_fit(8 * GIB, 2 * GIB, 40 * GIB) == 1  # not even one fits: torch will say so, with its numbers
    assert tiles_that_fit(139 * GIB, 2 * GIB, GIB) == MOST_TILES_PER_STEP


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 36), st.integers(0, 1 << 36))
def test_what_is_chosen_fits_if_anything_does(free, fixed, per_tile):
    tiles = tiles_that_fit(free, fixed, per_tile)
    assert 1 <= tiles <= MOST_TILES_PER_STEP
    if tiles > 1:
        assert fixed + tiles * per_tile <= 0.8 * free + 1
    if tiles < MOST_TILES_PER_STEP:
        assert fixed + (tiles + 1) * per_tile > 0.8 * free - 1
