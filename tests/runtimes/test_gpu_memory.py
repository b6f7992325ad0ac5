"""The binding of CUDA: what can be known without a GPU. tests/cuda has the rest."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest

from dendsam_deploy.errors import DendsamError, MissingCapabilityError

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
gpu_memory = importlib.import_module("dendsam_deploy.runtimes.gpu_memory")


@pytest.mark.parametrize(
    ("module", "cuda", "expected"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun\nGCC: 12\n", 12020, "535.183.01 (CUDA 12.2)"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82  Rel", 13000, "580.82 (CUDA 13.0)"),
        ("GCC version:  gcc version 12.3.0 (Ubuntu)\n", 12080, "CUDA 12.8"),
        ("", 13010, "CUDA 13.1"),
    ],
)
def test_the_version_of_the_driver(module: str, cuda: int, expected: str) -> None:
    assert gpu_memory.driver_version(module, cuda) == expected


class Somewhere:
    """Memory of which only the address is of interest."""

    address = 1000
    nbytes = 10**6
    gpu = 3


def test_rows_of_a_tensor_are_where_numpy_has_them() -> None:
    array = np.empty((10, 3, 5), np.float32)
    tensor = gpu_memory.DeviceTensor(Somewhere(), array.shape, array.dtype)
    assert (tensor.address, tensor.nbytes, tensor.device) == (1000, array.nbytes, "cuda:3")
    for rows in (slice(None), slice(2, 5), slice(-3, None), slice(4, 4), slice(8, 99), slice(5, 2)):
        part, expected = tensor[rows], array[rows]
        assert (part.shape, part.nbytes, part.dtype) == (expected.shape, expected.nbytes, expected.dtype)
        if expected.size:
            start = array.__array_interface__["data"][0]
            assert part.address - 1000 == expected.__array_interface__["data"][0] - start
    assert tensor[2:8][1:3].address == tensor[3:5].address
    with pytest.raises(ValueError, match="not every 2th"):
        tensor[::2]


def has_gpu() -> bool:
    try:
        gpu_memory.open_gpu(0)
    except MissingCapabilityError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
@pytest.mark.parametrize(
    "action",
    [
        lambda: gpu_memory.open_gpu(0),
        lambda: gpu_memory.Block(16),
        lambda: gpu_memory.Block(16, on_host=True),
        lambda: gpu_memory.GrowingBlock().reserve(16),
        gpu_memory.Stream,
        lambda: gpu_memory.select_gpu(0),
    ],
    ids=["gpu", "block", "host block", "growing block", "stream", "select"],
)
def test_without_a_gpu_everything_fails_in_one_line(action) -> None:
    with pytest.raises(DendsamError) as caught:
        action()
    assert type(caught.value) is MissingCapabilityError
    assert "\n" not in str(caught.value)
    assert "NVIDIA GPUs here" in str(caught.value) or "--device cpu" in str(caught.value)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.delitem(sys.modules, "dendsam_deploy.runtimes.gpu_memory")
    with pytest.raises(MissingCapabilityError, match=r"pip install 'dendsam-deploy\[tensorrt\]'"):
        importlib.import_module("dendsam_deploy.runtimes.gpu_memory")
