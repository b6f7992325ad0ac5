"""Memory, streams and recorded work on a GPU, without any engine. ``-m cuda``."""

from __future__ import annotations

import gc
import importlib

import numpy as np
import pytest

from dendsam_deploy.errors import MissingCapabilityError

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def gpu():
    """The binding, with GPU 0 chosen."""
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    module = importlib.import_module("dendsam_deploy.runtimes.gpu_memory")
    try:
        module.open_gpu(0)
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    return module


def test_the_gpu_is_described(gpu) -> None:
    found = gpu.open_gpu(0)
    assert found.name
    assert "\0" not in found.name
    major, minor = found.compute_capability.split(".")
    assert int(major) >= 5
    assert int(minor) >= 0
    assert found.memory_bytes > 2**30
    assert "CUDA" in found.driver
    with pytest.raises(MissingCapabilityError, match="device cuda:64"):
        gpu.open_gpu(64)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_what_goes_up_comes_down(gpu, dtype) -> None:
    array = np.random.default_rng(0).integers(0, 200, (7, 33, 5)).astype(dtype)
    stream, block = gpu.Stream(), gpu.Block(array.nbytes)
    stream.upload(block.address, array)
    pinned = gpu.Block(array.nbytes, on_host=True).array(array.shape, dtype)
    stream.download(pinned, block.address)
    stream.wait(10)
    np.testing.assert_array_equal(pinned, array)
    tensor = gpu.DeviceTensor(block, array.shape, array.dtype)
    np.testing.assert_array_equal(tensor.numpy(), array)
    np.testing.assert_array_equal(tensor[2:5].numpy(), array[2:5])
    np.testing.assert_array_equal(tensor[4:4].numpy(), array[4:4])
    stream.move(tensor[5:7].address, tensor[0:2].address, tensor[0:2].nbytes)
    stream.clear(tensor[3:4].address, tensor[3:4].nbytes)
    stream.wait(10)
    np.testing.assert_array_equal(tensor[5:7].numpy(), array[:2])
    assert not tensor[3:4].numpy().any()


def test_blocks_grow_and_say_when_they_move(gpu) -> None:
    room = gpu.GrowingBlock()
    first, has_moved = room.reserve(1000)
    assert has_moved
    same, has_moved = room.reserve(10)
    assert (same, has_moved) == (first, False)
    larger, has_moved = room.reserve(1001)
    assert has_moved
    assert larger.nbytes >= 2000


def test_memory_is_given_back(gpu) -> None:
    """Otherwise a hundred blocks of a hundredth of the memory would not fit one after the other, twice."""
    share = gpu.open_gpu(0).memory_bytes // 20
    for _ in range(60):
        gpu.Block(share)
        gc.collect()


def test_too_much_memory_is_refused_in_one_line_and_spoils_nothing(gpu) -> None:
    with pytest.raises(MissingCapabilityError, match=r"out of memory.*free memory of the GPU") as caught:
        gpu.Block(1 << 50)
    assert "\n" not in str(caught.value)
    assert gpu.Block(1 << 20).address


def test_recorded_work_is_done_when_it_is_replayed(gpu) -> None:
    stream, source, target = gpu.Stream(), gpu.Block(64), gpu.Block(64)
    gpu.select_gpu(0)
    stream.clear(target.address, 64)
    stream.wait(10)
    work = stream.record(lambda: stream.move(target.address, source.address, 64))
    assert work is not None
    for value in (3, 9):
        stream.upload(source.address, np.full(64, value, np.uint8))
        stream.wait(10)
        before = gpu.DeviceTensor(target, (64,), np.uint8).numpy()
        assert (before != value).all()
        work.replay()
        stream.wait(10)
        assert (gpu.DeviceTensor(target, (64,), np.uint8).numpy() == value).all()


def test_work_that_cannot_be_recorded_is_refused_and_the_stream_goes_on(gpu) -> None:
    stream, block = gpu.Stream(), gpu.Block(64)

    def refusing() -> None:
        raise MissingCapabilityError("cannot be recorded")

    def waiting() -> None:
        stream.clear(block.address, 64)
        stream.wait(1)

    assert stream.record(refusing) is None
    assert stream.record(waiting) is None
    stream.clear(block.address, 64)
    stream.wait(10)
    assert stream.record(lambda: stream.clear(block.address, 64)) is not None
