"""What the tests of TensorRT feed to the graphs of a bundle, and how they compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.bundle.manifest import GraphSpec, Precision, Role

Arrays = dict[str, np.ndarray]


def graph_of(bundle: Bundle, role: Role, precision: Precision = "fp32") -> tuple[Path, GraphSpec]:
    graph = bundle.manifest.graph(role, precision)
    if graph is None:
        pytest.skip(f"the bundle has no {role} at {precision}")
    return bundle.graph_path(role, precision), graph


def tile_inputs(bundle: Bundle, count: int, role: Role = "encoder", seed: int = 0) -> Arrays:
    """Smooth structures of random size, as tissue has them; noise alone shows little."""
    size = bundle.manifest.preprocessing.tile_size_px
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    tiles = (
        np.stack([np.sin(y * random.uniform(9, 90)) * np.cos(x * random.uniform(9, 90)) for _ in range(count)])
        if (count)
        else np.zeros((0, size, size))
    )
    grey = np.clip(120 + 90 * tiles + random.normal(0, 12, tiles.shape), 0, 255).astype(np.uint8)
    sizes = np.full((count, 2), size, np.int64)
    sizes[1::3] -= 37
    return {"tiles": grey} if role == "detector" else {"tiles": grey, "sizes": sizes}


def box_inputs(bundle: Bundle, tiles: int, boxes: int, region: int, seed: int = 0) -> Arrays:
    size = bundle.manifest.preprocessing.tile_size_px
    random = np.random.default_rng(seed)
    corner = random.uniform(0, size - 60, (boxes, 2))
    return {
        "embeddings": random.normal(0, 0.1, (tiles, 256, size // 16, size // 16)).astype(np.float32),
        "boxes": np.concatenate([corner, corner + random.uniform(8, 60, (boxes, 2))], axis=1).astype(np.float32),
        "tile_index": random.integers(0, tiles, boxes),
        "region": np.array([region]),
    }


def assert_close(found: Arrays, expected: Arrays, share_of_spread: float) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert found[name].shape == values.shape, name
        if values.dtype.kind == "f":
            limit = share_of_spread * max(float(values.std()), 1e-3) if values.size else 0.0
            np.testing.assert_allclose(found[name], values, rtol=0, atol=limit, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def copies(outputs: Arrays) -> Arrays:
    return {name: values.copy() for name, values in outputs.items()}
