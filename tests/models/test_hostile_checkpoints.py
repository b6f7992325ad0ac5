"""Hostile checkpoints: nothing runs, nothing hangs, nothing needs more memory than the file has bytes."""

from __future__ import annotations

import argparse
import array
import collections
import contextlib
import dataclasses
import datetime
import decimal
import functools
import inspect
import io
import logging
import operator
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import time
import types
import uuid
import zipfile
import zoneinfo
from pathlib import Path

import numpy as np
import pytest
import torch
from sam_layouts import random_sam

from dendsam_deploy.cli.main import main
from dendsam_deploy.errors import CheckpointError, UnsafeFileError
from dendsam_deploy.models.checkpoint_kinds import open_sam_file
from dendsam_deploy.models.inert_pickle import BoundedStream, PickleError, read_pickle
from dendsam_deploy.models.inert_values import Name, Placeholder
from dendsam_deploy.models.pickled_names import dangerous_names
from dendsam_deploy.models.tensor_file import open_tensor_file, pickled_names
from dendsam_deploy.models.weights import load_sam


def read(program):
    return read_pickle(BoundedStream(io.BytesIO(program), len(program)))


class Call:
    """Pickles into a call."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def hostile(canary):
    """Programs that write a file when they are unpickled: by each instruction that calls, or with a hidden name."""
    command = f"touch {canary}"
    text = command.encode()
    argument = b"X" + struct.pack("<I", len(text)) + text
    system = b"cposix\nsystem\n" if os.name == "posix" else b"cnt\nsystem\n"
    return {
        "reduce": pickle.dumps(Call(os.system, command), protocol=2),
        "protocol 0": pickle.dumps(Call(os.system, command), protocol=0),
        "protocol 5": pickle.dumps(Call(os.system, command), protocol=5),
        "eval": pickle.dumps(Call(eval, f"open({str(canary)!r}, 'w')"), protocol=2),
        "inst": b"(S'" + text + b"'\niposix\nsystem\n.",
        "obj": b"(" + system + argument + b"o.",
        "memo": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x8c\x01a0h\x00h\x01\x93" + argument + b"\x85R.",
        "build": b"\x80\x02cpathlib\nPosixPath\n)R}X\x05\x00\x00\x00hello" + system + argument + b"\x85Rsb.",
        "getattr": b"\x80\x02c__builtin__\ngetattr\nc__builtin__\n__import__\nX\x02\x00\x00\x00os\x85R"
        + b"X\x06\x00\x00\x00system\x86R" + argument + b"\x85R.",
        "partial": b"\x80\x02cfunctools\npartial\n" + system + b"\x85R)R.",
        "module of Python 2": b"\x80\x02ccommands\ngetoutput\n" + argument + b"\x85R.",
        "subprocess": pickle.dumps(Call(subprocess.call, ["touch", str(canary)]), protocol=2),
        "hub": b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00a\x85R.",
        "numpy": b"\x80\x02cnumpy.testing._private.utils\nrunstring\nX\x01\x00\x00\x00a}\x86R.",
        "extension": b"\x80\x02\x82\x01)R.",
        "within": b"\x80\x02c__builtin__\ngetattr\nccollections\nOrderedDict\nX\x0e\x00\x00\x00__subclasses__\x86R.",
    }  # fmt: skip


NAMES = list(hostile("x"))


def as_torch_file(program, path):
    """A file of torch whose pickle is this program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("form", ["zip", "bare"])
def test_a_program_is_refused_and_never_runs(kind, form, tmp_path, capfd):
    canary, path = tmp_path / "canary", tmp_path / "hostile.pt"
    program = hostile(canary)[kind]
    as_torch_file(program, path) if form == "zip" else path.write_bytes(program)
    with pytest.raises(UnsafeFileError):
        load_sam(path)
    assert main(["info", str(path)]) == 77
    assert "do not trust where it comes from" in capfd.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["reduce", "protocol 0", "inst", "obj"])
@pytest.mark.parametrize("form", ["zip", "bare", "old"])
@pytest.mark.parametrize("break_off", [b"", b"\xff", b"0000", b"K"], ids=["end", "no instruction", "stack", "argument"])
def test_a_program_that_breaks_off_behind_its_call_is_refused_all_the_same(kind, form, break_off, tmp_path):
    """Elsewhere the call would have been made before the break."""
    program = hostile(tmp_path / "canary")[kind][:-1] + break_off
    path = tmp_path / "hostile.pt"
    if form == "zip":
        as_torch_file(program, path)
    elif form == "bare":
        path.write_bytes(program)
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        first, version = (pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001))
        assert path.read_bytes().startswith(first + version)
        path.write_bytes(first + version + program)
    for read_it in (load_sam, pickled_names):
        with pytest.raises(UnsafeFileError):
            read_it(path)


@pytest.mark.parametrize("kind", ["reduce", "eval", "inst", "obj", "memo", "subprocess"])
def test_the_bait_is_live(kind, tmp_path):
    """What the program refuses would have run elsewhere."""
    program = hostile(tmp_path / "canary")[kind]
    subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"], input=program, check=False
    )
    assert (tmp_path / "canary").exists()


def test_hidden_among_good_weights_in_either_format(tmp_path):
    state = dict(random_sam().state_dict())
    for old_format in (False, True):
        path = tmp_path / f"{old_format}.pt"
        torch.save(
            {"model_state": state, "init": Call(os.system, f"touch {tmp_path / 'canary'}")},
            path,
            _use_new_zipfile_serialization=not old_format,
        )
        with pytest.raises(UnsafeFileError, match=r"posix\.system|nt\.system"):
            load_sam(path)
    assert not (tmp_path / "canary").exists()


def test_objects_of_unknown_packages_are_inert(tmp_path):
    """Their module is not even imported, although it could be: it lies in the folder and would write a file."""
    module = tmp_path / "lab_package.py"
    module.write_text(
        "class Thing:\n    def __setstate__(self, state): open('ran', 'w')\ndef make(*a): open('ran', 'w')\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import lab_package  # noqa: PLC0415 - it was written just now

        thing = lab_package.Thing()
        thing.values = [1, 2]
        torch.save(
            {"model_state": random_sam().state_dict(), "init": [thing, Call(lab_package.make, 1, 2)]},
            tmp_path / "lab.pt",
        )
        del sys.modules["lab_package"]
        assert load_sam(tmp_path / "lab.pt").layout == "training"
        assert "lab_package" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_what_trainings_leave_behind_is_no_reason_to_refuse(tmp_path):
    """Objects of the standard library and NumPy that only hold values, of every kind that pickles to a call."""
    left = [
        *(Path("a"), datetime.datetime(2025, 1, 2), collections.deque([1]), collections.defaultdict(list, a=[1])),
        *(argparse.Namespace(lr=1e-4), types.SimpleNamespace(a=1), random.Random(1), uuid.UUID(int=5)),
        *(np.random.RandomState(1), np.random.default_rng(1), np.arange(4), np.float32(0.5), np.dtype("f4")),
        *(
            functools.partial(max, 1),
            slice(1, 2),
            range(3),
            {1, 2},
            frozenset({3}),
            1 + 2j,
            bytearray(b"a"),
            re.compile("a"),
        ),
        *(torch.device("cpu"), torch.Size([1]), torch.float16, torch.nn.Linear(2, 2), decimal.Decimal("1.5")),
        *(
            ...,
            type(None),
            collections.UserDict(a=1),
            collections.ChainMap({}),
            array.array("i", [1]),
            io.BytesIO(b"a"),
        ),
        *(zoneinfo.ZoneInfo("UTC"), logging.getLogger("a"), ValueError("a"), operator.itemgetter(1), operator.add),
        *(uuid.SafeUUID.safe, inspect.Parameter.empty, dataclasses.MISSING),
        torch.Generator().get_state(),
    ]
    for protocol in (2, 4):
        torch.save(
            {"model_state": random_sam().state_dict(), "init": left}, tmp_path / "left.pt", pickle_protocol=protocol
        )
        assert load_sam(tmp_path / "left.pt").layout == "training"


class TestTheMachine:
    @pytest.mark.parametrize("protocol", range(6))
    def test_plain_values_come_out_as_they_went_in(self, protocol):
        value = {
            "a": [1, -2, 3 << 70, 1.5, True, None, "\u03bc" * 300, b"\x00\xff" * 200],
            3: (1, (2, (3, ())), (1,), (1, 2), (1, 2, 3, 4)),
            (1, "b"): {"x": {"y": []}},
            "s": {1, 2},
        }
        # What older protocols write as calls, of _codecs.encode and builtins.set, is no plain value.
        if protocol < 4:
            del value["s"]
        if protocol < 3:
            value["a"].pop()
        assert read(pickle.dumps(value, protocol=protocol)).value == value

    def test_a_list_in_itself(self):
        value: list[object] = [1]
        value.append(value)
        found = read(pickle.dumps(value)).value
        assert found[1] is found

    def test_calls_become_placeholders(self):
        found = read(pickle.dumps(Call(os.getcwd, "a", 1, state={"k": 2}), protocol=2))
        assert isinstance(found.value, Placeholder)
        assert (found.value.maker, found.value.arguments, found.value.state) == ("posix.getcwd", ("a", 1), {"k": 2})
        assert found.names == found.calls == {"posix.getcwd"}

    def test_names_of_python_2_are_told_by_their_present_ones(self):
        assert read(b"c__builtin__\nfile\n.").value == Name("builtins.file")
        assert read(b"ccommands\ngetstatus\n.").names == {"subprocess.getstatus"}

    def test_names_that_are_looked_up_in_others(self):
        program = b"\x80\x02c__builtin__\ngetattr\nctorch\nhub\nX\x04\x00\x00\x00load\x86R."
        assert "torch.hub.load" in read(program).names

    @pytest.mark.parametrize(
        "program",
        [
            b"", b".", b"N", b"0.", b"(.", b"t.", b"}.N", b"h\x05.", b"R.", b"\x80\x02)R.", b"a.", b"s.", b"\x86.",
            b"X\xff\xff\xff\xffa.", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.", b"\x8b\xff\xff\xff\x7fa.",
            b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fa.", b"I1\x00\n.", b"Fx\n.", b"S'a\n.", b"Vu\xd800\n.",
            b"\x93.", b"\x97.", b"\x98.", b"\xf0.", b"b.", b"K",
        ],
    )  # fmt: skip
    def test_broken_programs(self, program):
        with contextlib.suppress(PickleError):
            read(program)

    def test_a_huge_memo_index_takes_no_memory(self):
        assert read(b"Nr\xff\xff\xff\xff.").value is None


def seconds(function):
    start = time.perf_counter()
    with contextlib.suppress(CheckpointError, UnsafeFileError, PickleError):
        function()
    return time.perf_counter() - start


def same_hash(count):
    """A dict of integers whose hashes are equal in Python."""
    keys = b"".join(b"\x8a\x0a" + (k * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for k in range(1, count))
    return b"}(" + keys + b"u."


BOMBS = {
    "instructions": b"]" + b"0]" * 4_000_000 + b".",
    "nested tuples": b")" + b"\x85" * 300_000 + b".",
    "nested lists": b"]" * 300_000 + b"a" * 299_999 + b".",
    "a nested tuple as a key": b"})" + b"\x85" * 300_000 + b"Ns.",
    "keys of one hash": same_hash(100_000),
    "copies of a long list": b"]("
    + b"N" * 200_000
    + b"eq\x01"
    + b"0ccollections\nOrderedDict\nh\x01\x85R" * 5_000
    + b".",
    "calls of calls": b"ctorch\nx\n" + b")R" * 1_000_000 + b".",
    "objects of objects": b"ctorch\nx\n" + b")\x81" * 1_000_000 + b".",
    "lists of lists of lists": b"]q\x00" + b"2(h\x00h\x00h\x00h\x00lq\x00" * 5_000 + b".",
}


def laughs(levels):
    """A list of lists of lists ... each element of which is the same as the others: small, but endless to write."""
    value: object = "ha"
    for _ in range(levels):
        value = [value] * 10
    return value


class TestWordsOfAFile:
    """What a file says about itself is shown to people: bounded, and nothing that a terminal obeys."""

    @pytest.mark.parametrize("key", ["summary", "model_type", "image_size", "zoom"])
    def test_an_endless_record(self, key, tmp_path):
        record = {"model_type": "tiny", "image_size": 64, "summary": {}} | {key: {"a": laughs(12)}}
        torch.save({"model_state": random_sam().state_dict(), "dendsam": record}, tmp_path / "own.pt")
        with pytest.raises(CheckpointError):
            load_sam(tmp_path / "own.pt")

    @pytest.mark.parametrize("sign", [1, -1])
    def test_endless_numbers(self, sign, tmp_path):
        size = sign * 10**5000
        record = {"model_type": "tiny", "image_size": size}
        torch.save({"model_state": random_sam().state_dict(), "dendsam": record}, tmp_path / "own.pt")
        with pytest.raises(CheckpointError, match="its record is unknown"):
            load_sam(tmp_path / "own.pt")
        torch.save({"model_state": random_sam().state_dict(), "epoch": size, "iteration": 7}, tmp_path / "other.pt")
        with open_sam_file(tmp_path / "other.pt") as (_, found):
            assert found.progress == {"iteration": 7}

    def test_an_attribute_that_is_a_whole_structure(self):
        program = b"c__builtin__\ngetattr\n(cx\ny\n" + pickle.dumps(laughs(30), protocol=2)[2:-1] + b"tR."
        assert seconds(lambda: read(program)) < TestBombs.LIMIT_S

    @pytest.mark.parametrize("name", ["a" * 10_000, "a\x1b[2J"])
    def test_names_that_are_none(self, name, tmp_path):
        with pytest.raises(PickleError, match="a name that is none"):
            read(b"\x80\x04" + pickle.dumps(name, protocol=4)[11:-1] + pickle.dumps("b", protocol=4)[11:-1] + b"\x93.")
        torch.save({name: torch.zeros(1)}, tmp_path / "key.pt")
        with pytest.raises(CheckpointError, match="a name that is none"):
            load_sam(tmp_path / "key.pt")

    def test_a_terminal_is_left_alone(self, tmp_path, capfd):
        record = {"model_type": "tiny", "image_size": 64, "summary": {"data": "\x1b[2J\x07boo"}}
        torch.save({"model_state": random_sam().state_dict(), "dendsam": record}, tmp_path / "own.pt")
        assert main(["info", str(tmp_path / "own.pt")]) == 0
        out = capfd.readouterr().out
        assert "boo" in out
        assert "\x1b" not in out
        assert "\x07" not in out


class TestBombs:
    """Each within seconds, and without a crash, which would end the tests."""

    LIMIT_S = 60  # on a busy machine; alone, the longest takes seven

    @pytest.mark.parametrize("kind", BOMBS)
    def test_programs(self, kind):
        assert seconds(lambda: read(BOMBS[kind])) < self.LIMIT_S

    def test_a_tensor_of_absurd_size_takes_no_memory(self, tmp_path):
        state = dict(random_sam().state_dict())
        state["image_encoder.blocks.0.attn.rel_pos_h"] = torch.zeros(1).expand(10**9, 64)
        torch.save(state, tmp_path / "large.pt")
        with pytest.raises(CheckpointError, match="64,000,000,000 elements"):
            load_sam(tmp_path / "large.pt")

    def test_a_storage_that_announces_more_than_there_is(self, tmp_path):
        torch.save({"a": torch.zeros(4)}, tmp_path / "whole.pt")
        with zipfile.ZipFile(tmp_path / "whole.pt") as source:
            program = source.read("whole/data.pkl").replace(b"K\x04t", b"\x8a\x05\x00\x00\x00\x00\x10t", 1)
        as_torch_file(program, tmp_path / "lying.pt")
        with open_tensor_file(tmp_path / "lying.pt") as file, pytest.raises(CheckpointError):
            file.array(file.pickled.value["a"])

    def test_a_compressed_pickle_is_not_unpacked(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", b"\x00" * 50_000_000)
        with pytest.raises(CheckpointError, match="is compressed, which torch never does"):
            load_sam(tmp_path / "bomb.pt")

    @pytest.mark.parametrize("layout", [(0, (3, 3), (2, 1)), (5, (2,), (1,)), (0, (2,), (100,))])
    def test_tensors_beyond_their_storage(self, layout, tmp_path):
        """Strides and offsets that reach beyond six numbers."""
        offset, shape, stride = layout
        torch.save({"a": torch.zeros(6)}, tmp_path / "whole.pt")
        with open_tensor_file(tmp_path / "whole.pt") as file:
            tensor = file.pickled.value["a"]
            wrong = type(tensor)(tensor.storage, tensor.dtype, offset, shape, stride)
            with pytest.raises(CheckpointError, match="reaches beyond the 6 numbers"):
                file.array(wrong)


def test_what_is_dangerous():
    harmless = {
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "torch_em.data.Dataset",
        "numpy.dtype",
        "__main__.Trainer",
        "numpy.random._pickle.__randomstate_ctor",
        "typing.Any",
        "builtins.max",
        "functools.partial",
        "builtins.ValueError",
    }
    assert dangerous_names(harmless) == []
    harmful = {
        "os.system",
        "nt.system",
        "builtins.eval",
        "torch.hub.load",
        "a.b.__globals__",
        "copyreg.extension_1",
        "pip.main",
        "operator.attrgetter",
        "torch.fx.graph_module.reduce_graph_module",
        "numpy.save",
    }
    assert dangerous_names(harmful | harmless) == sorted(harmful)


def test_names_in_the_older_format(tmp_path):
    torch.save(
        {"a": torch.zeros(1), "b": Call(os.system, "true")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    assert "posix.system" in pickled_names(tmp_path / "old.pt")
