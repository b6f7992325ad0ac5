"""What the tests on an NVIDIA GPU share. One line runs them on a workstation: ``pytest -m "cuda or tensorrt" -rs``."""

from __future__ import annotations

import importlib
import shutil
from typing import TYPE_CHECKING

import pytest

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.runtimes.probe import NO_DRIVER, has_nvidia_driver, why_not
from dendsam_deploy.runtimes.session import ENGINES, SessionOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType


def device_of(engine: str) -> str:
    """Return the GPU on which an engine works here; where it does not, skip the test and say why."""
    reason = why_not(ENGINES[engine], "cuda:0", SessionOptions())
    if reason is not None:
        pytest.skip(f"engine {engine}: {reason}")
    return "cuda:0"


@pytest.fixture(scope="session")
def any_gpu() -> None:
    """An NVIDIA GPU; which engines can use it is another question."""
    if not has_nvidia_driver():
        pytest.skip(NO_DRIVER)


@pytest.fixture(scope="session")
def requires_cuda() -> str:
    """A GPU that ONNX Runtime can use."""
    return device_of("onnxruntime")


@pytest.fixture(scope="session")
def requires_torch() -> str:
    """A GPU that torch can use."""
    return device_of("torch")


@pytest.fixture(scope="session")
def requires_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A GPU that TensorRT can use; what is compiled is sealed with a key of its own, not with that of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("LOCALAPPDATA", str(tmp_path_factory.mktemp("local")))
        yield device_of("tensorrt")


@pytest.fixture(scope="session")
def trained_bundle(any_gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged weights, which know what a dendrite is, exported once for all tests; do not write into it."""
    from dendsam_deploy.export.bundle import export_bundle  # noqa: PLC0415 - loads torch, which a skipped test needs not
    from dendsam_deploy.export.options import ExportOptions  # noqa: PLC0415
    from dendsam_deploy.weights import PACKAGED_DETECTOR, PACKAGED_SAM  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("cuda") / "trained"
    options = ExportOptions(PACKAGED_SAM, folder, PACKAGED_DETECTOR, precisions=("fp16", "bf16", "int8"))
    return export_bundle(options)


@pytest.fixture(scope="session")
def bundle(requires_tensorrt: str, trained_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy of the trained bundle; the engines that tests compile stay in it for the others."""
    return Bundle.open(shutil.copytree(trained_bundle, tmp_path_factory.mktemp("tensorrt") / "trained"))


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of that, with its engines, for tests that spoil something."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy"))


@pytest.fixture(scope="session")
def engines(requires_tensorrt: str) -> ModuleType:
    """The module that needs TensorRT."""
    return importlib.import_module("dendsam_deploy.runtimes.gpu_engine")


@pytest.fixture(scope="session")
def phantom(any_gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of six synthetic slices of several tiles each."""
    import tifffile  # noqa: PLC0415

    from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom  # noqa: PLC0415

    path = tmp_path_factory.mktemp("phantom") / "raw.tif"
    tifffile.imwrite(path, make_phantom(PhantomOptions((6, 512, 512), 7)).raw, metadata={"axes": "ZYX"})
    return path
