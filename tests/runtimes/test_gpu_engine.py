"""The engine tensorrt where it is not installed: refused in one line. tests/cuda has the engine itself."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.cli.main import main
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes.session import SessionOptions, open_session

if TYPE_CHECKING:
    from tests.conftest import Exported

without_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)


@without_tensorrt
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_the_package_is_named_with_the_line_that_installs_it(exported: Exported, device: str) -> None:
    with pytest.raises(MissingCapabilityError, match=r"run: pip install 'dendsam-deploy\[tensorrt\]'") as caught:
        open_session(Bundle.open(exported.bundle), SessionOptions("tensorrt", device))
    assert "\n" not in str(caught.value)


@without_tensorrt
def test_the_command_ends_with_exit_code_3(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(exported.bundle), "--engine", "tensorrt"]) == 3
    assert "tensorrt on cuda:0: " in capsys.readouterr().err


def test_the_cpu_is_refused(exported: Exported) -> None:
    with pytest.raises(MissingCapabilityError, match="runs on cuda"):
        open_session(Bundle.open(exported.bundle), SessionOptions("tensorrt", "cpu"))


def test_another_device_is_a_wrong_argument(exported: Exported) -> None:
    with pytest.raises(InvalidArgumentError, match="choose cpu, cuda"):
        open_session(Bundle.open(exported.bundle), SessionOptions("tensorrt", "tpu"))
