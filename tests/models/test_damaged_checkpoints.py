"""Damaged checkpoints, and bytes that are none: one kind of error, whatever the damage."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dendsam_deploy.errors import CheckpointError, UnsafeFileError
from dendsam_deploy.models.checkpoint_kinds import open_sam_file
from dendsam_deploy.models.inert_pickle import BoundedStream, PickleError, read_pickle
from dendsam_deploy.models.tensor_file import open_tensor_file


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """A small file of each format, with tensors, containers, and an object of a package."""
    folder, found = tmp_path_factory.mktemp("whole"), []
    content = {
        "model_state": {"image_encoder.a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3)},
        "optimizer_state": {"state": {0: {"step": 3}}, "groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
        "path": Path("a"),
    }
    for old_format in (False, True):
        torch.save(content, folder / "whole.pt", _use_new_zipfile_serialization=not old_format)
        found.append((folder / "whole.pt").read_bytes())
    return [*found, pickle.dumps(content["optimizer_state"], protocol=4)]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_raise_nothing_else(whole_files, tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(whole_files)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["change", "cut", "repeat", "insert"])):
            case "change":
                content[place] = data.draw(st.integers(0, 255))
            case "cut":
                del content[place:]
            case "repeat":
                content[place:place] = content[: data.draw(st.integers(0, 400))]
            case "insert":
                content[place:place] = data.draw(st.binary(max_size=12))
        if not content:
            break
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError, UnsafeFileError), open_tensor_file(path) as file:
        value = file.pickled.value
        inner = value.get("model_state") if isinstance(value, dict) else None
        for tensor in inner.values() if isinstance(inner, dict) else ():
            if hasattr(tensor, "storage"):
                file.array(tensor)
    with contextlib.suppress(CheckpointError, UnsafeFileError), open_sam_file(path):
        pass


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_pickle_or_an_error(program):
    with contextlib.suppress(PickleError):
        read_pickle(BoundedStream(io.BytesIO(program), len(program)))


def test_a_flipped_bit_in_the_numbers_is_found(tmp_path):
    """Each record of the archive has a checksum."""
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pt")
    content = bytearray((tmp_path / "whole.pt").read_bytes())
    content[content.index(struct.pack("<f", 1.0) * 100) + 41] ^= 1
    (tmp_path / "whole.pt").write_bytes(content)
    with open_tensor_file(tmp_path / "whole.pt") as file, pytest.raises(CheckpointError, match="Bad CRC-32"):
        file.array(file.pickled.value["a"])
