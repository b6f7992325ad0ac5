"""Slices as files: nothing is lost, equal objects give equal bytes, and damaged journals prove nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.errors import IncompleteRunError, InputFileError, InvalidArgumentError
from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Instances, RunLengths
from dendsam_deploy.pipeline.clock import StageClock
from dendsam_deploy.pipeline.journal import begin_run, differences, fingerprint_of, read_journal
from dendsam_deploy.pipeline.pieces import bytes_from_instances, instances_from_bytes, paint_instances

SHAPE = (40, 50)


def instances_of(labels: np.ndarray, seed: int = 0) -> Instances:
    """The objects of a label image, with windows that are larger than need be."""
    rng = np.random.default_rng(seed)
    ids = np.unique(labels[labels > 0]).astype(np.uint32)
    whole = Window(0, 0, *labels.shape)
    count = len(ids)
    return Instances(
        ids,
        rng.uniform(0, 50, (count, 4)).astype(np.float32),
        rng.random(count).astype(np.float32),
        rng.random(count).astype(np.float32),
        np.array([(labels == number).sum() for number in ids], np.int64),
        tuple(RunLengths.from_mask(labels == number, whole) for number in ids),
    )


label_images = st.integers(0, 10**6).map(
    lambda seed: np.random.default_rng(seed).integers(0, 7, SHAPE).astype(np.uint32)
)


@settings(deadline=None, max_examples=25)
@given(label_images)
def test_objects_come_back_from_their_file_as_they_were(labels: np.ndarray):
    before = instances_of(labels)
    data = bytes_from_instances(before)
    after = instances_from_bytes(data)
    assert bytes_from_instances(after) == data
    for name in ("ids", "boxes_xyxy", "scores", "predicted_iou", "areas_px"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    np.testing.assert_array_equal(paint_instances(after, after.ids, SHAPE), labels)


def test_a_slice_without_objects_comes_back_empty():
    nothing = instances_of(np.zeros(SHAPE, np.uint32))
    after = instances_from_bytes(bytes_from_instances(nothing))
    assert len(after) == 0
    assert not paint_instances(after, after.ids, SHAPE).any()


@settings(deadline=None, max_examples=25)
@given(label_images)
def test_painting_takes_new_labels_up_to_the_largest(labels: np.ndarray):
    instances = instances_of(labels)
    table = np.array([0, 2**32 - 1, 5, 2**31, 5, 70_000, 1], np.uint32)
    np.testing.assert_array_equal(paint_instances(instances, table[instances.ids], SHAPE), table[labels])


def recorded(folder: Path, slices: int = 3):
    journal = begin_run(folder, {"a": 1}, "signature")
    for z in range(slices):
        labels = np.zeros(SHAPE, np.uint32)
        labels[z : z + 3, 4:9] = 1
        journal.record(z, instances_of(labels), f"input-{z}", StageClock({"paint": 0.5}))
    return journal


def test_a_journal_reads_back_what_was_recorded(tmp_path: Path):
    journal = recorded(tmp_path / "run")
    again = read_journal(tmp_path / "run")
    assert again == journal
    assert again.entries[2].objects == 1
    assert again.entries[2].seconds.keys() == {"paint", "write"}
    assert all(again.is_proven(z) for z in range(3))
    assert not again.is_proven(3)


def test_an_absent_slice_is_never_an_empty_slice(tmp_path: Path):
    journal = recorded(tmp_path / "run")
    journal.piece_path(1).unlink()
    with pytest.raises(IncompleteRunError, match="slice 1 is missing"):
        journal.load(1)
    with pytest.raises(IncompleteRunError, match="slice 7 is missing"):
        journal.load(7)


def test_damaged_lines_prove_nothing(tmp_path: Path):
    recorded(tmp_path / "run")
    path = tmp_path / "run" / "journal.jsonl"
    header, first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + first + b"\0" * 40 + b"\n" + third)
    assert sorted(read_journal(tmp_path / "run").entries) == [0, 2]
    path.write_bytes(header + first + second + third[:-20])
    journal = begin_run(tmp_path / "run", {"a": 1}, "signature")
    assert sorted(journal.entries) == [0, 1]
    assert path.read_bytes() == header + first + second, "the next line must begin on its own"


@pytest.mark.parametrize("header", [b"", b"\n", b"{}\n", b"[1]\n", b"not json\n"])
def test_a_damaged_first_line_is_refused(tmp_path: Path, header: bytes):
    recorded(tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").write_bytes(header)
    with pytest.raises(InputFileError, match="damaged; begin anew"):
        read_journal(tmp_path / "run")


def test_a_journal_of_another_version_is_refused(tmp_path: Path):
    recorded(tmp_path / "run", 0)
    path = tmp_path / "run" / "journal.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}) + "\n")
    with pytest.raises(InputFileError, match="schema version 99"):
        read_journal(tmp_path / "run")


def test_a_folder_without_journal_is_no_run(tmp_path: Path):
    with pytest.raises(InputFileError, match="no run of this program"):
        read_journal(tmp_path)


def test_the_folder_cannot_be_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidArgumentError, match="choose another --out"):
        begin_run(tmp_path / "file", {}, "")


def test_differences_name_the_nested_setting_and_shorten_digests():
    old = {"a": 1, "b": {"c": [1, 2], "d": "same"}, "e": "0" * 64}
    new = {"a": 1, "b": {"c": [1, 3], "d": "same"}, "e": "1" * 64, "f": None, "g": True}
    assert differences(old, new) == [
        "b.c: [1, 2] -> [1, 3]",
        'e: "0000000000000... -> "1111111111111...',
        "g: null -> true",
    ]
    assert fingerprint_of({"x": 1, "y": 2}) == fingerprint_of({"y": 2, "x": 1})
