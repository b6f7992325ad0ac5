"""Logits at full resolution: equal to torch's interpolation of the whole grid wherever a mask can be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.geometry import Frame, Tile, Window, tile_grid
from dendsam_deploy.instances import Masks
from dendsam_deploy.pipeline.prepare import TilePlan
from dendsam_deploy.pipeline.upsample import upsample_mask

SIZE = 64
GRID = SIZE // 4


def one_mask(logits: np.ndarray, origin: tuple[int, int] = (0, 0), tile: int = 0) -> Masks:
    return Masks(
        (logits.astype(np.float32),),
        np.array([origin]),
        np.array([tile]),
        np.ones(1, np.float32),
        np.zeros(1, np.int64),
    )


def plan_of(slice_hw: tuple[int, int], model_hw: tuple[int, int], overlap: int = 16) -> TilePlan:
    return TilePlan(Frame(slice_hw, model_hw), tuple(tile_grid(model_hw, SIZE, overlap)), SIZE)


def whole_grid_upsampled(grid: np.ndarray) -> np.ndarray:
    """SAM's own first step: the S/4 grid to S x S."""
    tensor = torch.from_numpy(grid.astype(np.float32))[None, None]
    return torch.nn.functional.interpolate(tensor, (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0].numpy()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), side=st.sampled_from([4, 8, GRID]), threshold=st.sampled_from([0.0, 1.0]))
def test_a_region_equals_torchs_interpolation_of_the_whole_grid(seed: int, side: int, threshold: float):
    rng = np.random.default_rng(seed)
    grid = np.full((GRID, GRID), -8.0)
    origin = rng.integers(0, GRID - side + 1, 2)
    region = tuple(slice(start, start + side) for start in origin)
    grid[region] = rng.normal(size=(side, side)) * 3
    patch = upsample_mask(one_mask(grid[region], tuple(origin)), 0, plan_of((SIZE, SIZE), (SIZE, SIZE)), threshold)
    expected = whole_grid_upsampled(grid)
    np.testing.assert_allclose(patch.logits, expected[patch.window.slices], atol=1e-5)
    outside = expected > threshold + 1e-5
    outside[patch.window.slices] = False
    # The region is silent about the two pixels next to its own border, where it would need its neighbour's logits.
    inner = [slice(4 * o + 2 * (o > 0), 4 * (o + side) - 2 * (o + side < GRID)) for o in origin]
    assert not outside[tuple(inner)].any()


@pytest.mark.parametrize("model_hw", [(64, 64), (128, 96), (40, 64), (51, 37)])
def test_resampled_slices_are_sampled_at_their_own_pixel_centres(model_hw: tuple[int, int]):
    """Every pixel equals the bilinear formula evaluated at its centre, tile by tile."""
    rng = np.random.default_rng(1)
    plan = plan_of((64, 48), model_hw)
    scale_y, scale_x = model_hw[0] / 64, model_hw[1] / 48
    for number, tile in enumerate(plan.tiles):
        grid = rng.normal(size=(GRID, GRID)) + 1
        patch = upsample_mask(one_mask(grid, tile=number), 0, plan, -100.0)
        for (row, column), value in np.ndenumerate(patch.logits):
            y = (patch.window.y0 + row + 0.5) * scale_y - tile.read.y0
            x = (patch.window.x0 + column + 0.5) * scale_x - tile.read.x0
            assert value == pytest.approx(bilinear(grid, y / 4 - 0.5, x / 4 - 0.5), abs=1e-4)
        covered = plan.frame.window_to_slice(tile.read)
        assert abs(patch.window.height - covered.height) <= 1
        assert abs(patch.window.width - covered.width) <= 1


def bilinear(grid: np.ndarray, y: float, x: float) -> float:
    """The value of a grid at a fractional index, clamped at its border."""
    y, x = np.clip(y, 0, grid.shape[0] - 1), np.clip(x, 0, grid.shape[1] - 1)
    y0, x0 = min(int(y), grid.shape[0] - 2), min(int(x), grid.shape[1] - 2)
    fy, fx = y - y0, x - x0
    top = grid[y0, x0] * (1 - fx) + grid[y0, x0 + 1] * fx
    bottom = grid[y0 + 1, x0] * (1 - fx) + grid[y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def test_a_mask_without_foreground_has_an_empty_window():
    patch = upsample_mask(one_mask(np.full((4, 4), -1.0)), 0, plan_of((64, 64), (64, 64)), 0.0)
    assert patch.window == Window(0, 0, 0, 0)
    assert patch.logits.shape == (0, 0)


def test_padding_never_reaches_the_slice():
    """A slice smaller than the tile: logits below and right of it are cut off."""
    plan = TilePlan(Frame((30, 20), (30, 20)), (Tile(Window(0, 0, 30, 20), Window(0, 0, 30, 20)),), SIZE)
    patch = upsample_mask(one_mask(np.full((GRID, GRID), 5.0)), 0, plan, 0.0)
    assert patch.window == Window(0, 0, 30, 20)
    assert (patch.logits == 5).all()


def test_the_window_hugs_the_mask():
    grid = np.full((GRID, GRID), -4.0)
    grid[5, 7] = 4.0
    patch = upsample_mask(one_mask(grid), 0, plan_of((64, 64), (64, 64)), 0.0)
    assert patch.window == Window(18, 26, 8, 8)
