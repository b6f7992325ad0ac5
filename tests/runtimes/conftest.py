"""What the tests of the engines share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dendsam_deploy.runtimes.gpu_engine_cache import EngineCache

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    """An empty cache of compiled engines, sealed with a key of its own, not with that of the user."""
    (tmp_path / "bundle").mkdir()
    return EngineCache(tmp_path / "bundle", state=tmp_path / "state")
