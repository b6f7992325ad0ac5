"""An engine that nobody can execute, and who it is for: what the tests of the cache keep in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from dendsam_deploy.runtimes.gpu_engine_cache import BuiltEngine, EngineCache, EngineIdentity

if TYPE_CHECKING:
    from pathlib import Path

IDENTITY = EngineIdentity(
    role="encoder",
    precision="fp16",
    graph_sha256=("ab" * 32, "cd" * 32),
    gpu="NVIDIA RTX 6000 Ada",
    compute_capability="8.9",
    driver="580.82 (CUDA 13.0)",
    compiler="tensorrt 11.4.0.106",
    profiles="[]",
    host="Linux x86_64",
    settings="none",
)
BUILT = BuiltEngine(b"native code", attention_layers=12, fused_attention_layers=11)
needs_posix = pytest.mark.skipif(os.name == "nt", reason="owners and modes of files are those of POSIX systems")


def must_not_build() -> BuiltEngine:
    raise AssertionError("compiled again")


def fill(cache: EngineCache) -> Path:
    cache.obtain(IDENTITY, lambda: BUILT)
    return cache.folder(IDENTITY)
