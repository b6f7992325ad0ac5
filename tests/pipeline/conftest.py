"""The stack that runs over a whole volume read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tifffile
from stack_runs import draw_stack

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "stack.tif"
    tifffile.imwrite(
        path,
        draw_stack(),
        imagej=True,
        resolution=(100.0, 100.0),
        metadata={"spacing": 0.04, "unit": "um", "axes": "ZYX"},
    )
    return path
