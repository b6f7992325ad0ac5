"""What talks to TensorRT uses only what versions 10.16 and 11.4 both have: proved by a type checker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIGNATURES = ROOT.parent / "shared" / "tensorrt-api"
VERSIONS = ("10.16", "11.4")

pytestmark = pytest.mark.skipif(
    not SIGNATURES.is_dir(), reason=f"the signatures of TensorRT are not at ../shared/{SIGNATURES.name}"
)

MISTAKES = {
    "config.set_flag(tensorrt.BuilderFlag.FP16)": ('has no attribute "FP16"', {"11.4"}),
    "network.get_layer(0).precision = tensorrt.float32": ('has no attribute "precision"', {"11.4"}),
    "config.set_flag(tensorrt.BuilderFlag.STRONG)": ('has no attribute "STRONG"', set(VERSIONS)),
    "config.set_memory_pool_limit(1, 2)": ('incompatible type "int"; expected "MemoryPoolType"', set(VERSIONS)),
    "config.set_flag(tensorrt.BuilderFlag.STRICT_NANS)": ("nothing", set()),
}
"""Lines of a program, what is said of them, and by which versions."""

PROGRAM = """
from dendsam_deploy.runtimes.gpu_engine_library import tensorrt

def configure(config: tensorrt.IBuilderConfig, network: tensorrt.INetworkDefinition) -> None:
    {}
"""


@pytest.fixture(scope="module", params=VERSIONS)
def checked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A version, and what mypy says against it about the engine and about a program with mistakes."""
    program = tmp_path_factory.mktemp("types") / "program.py"
    program.write_text(PROGRAM.format("\n    ".join(MISTAKES)))
    files = list((ROOT / "dendsam_deploy" / "runtimes").glob("gpu_*.py"))
    assert len(files) >= 6
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, files), str(program)],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(SIGNATURES / request.param)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not result.stderr
    return request.param, result.stdout.splitlines()


def test_the_engine_fits_the_signatures(checked: tuple[str, list[str]]) -> None:
    _, lines = checked
    assert [line for line in lines if "program.py" not in line] == []


def test_the_checker_finds_what_a_version_does_not_have(checked: tuple[str, list[str]]) -> None:
    version, lines = checked
    first = PROGRAM.splitlines().index("    {}") + 1
    for number, (mistake, (complaint, refused_by)) in enumerate(MISTAKES.items(), start=first):
        about = [line for line in lines if f"program.py:{number}:" in line]
        assert bool(about) == (version in refused_by), mistake
        assert all(complaint in line for line in about), mistake
