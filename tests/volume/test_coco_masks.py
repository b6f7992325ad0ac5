"""COCO: run lengths go column by column, texts are those of pycocotools, and what is decoded is the mask."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_shapes import SLICE_HW, any_mask, encoded, letter_shapes, slice_of

from dendsam_deploy.errors import InputFileError
from dendsam_deploy.volume.coco_masks import (
    compress_counts,
    decode_counts,
    expand_counts,
    rle_counts,
    write_coco,
)


def test_counts_of_a_hand_worked_example() -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0], [1, 1, 0]], bool)
    # By columns: 0 0 1 | 1 1 1 | 1 0 0
    assert rle_counts(encoded(mask), (3, 3)).tolist() == [2, 5, 2]
    assert rle_counts(encoded(np.ones((2, 2), bool)), (2, 2)).tolist() == [0, 4]


@settings(max_examples=60, deadline=None)
@given(any_mask())
def test_decoding_gives_the_mask_again(mask) -> None:
    counts = rle_counts(encoded(mask), SLICE_HW)
    assert counts.sum() == mask.size
    assert (counts[1:] > 0).all()
    np.testing.assert_array_equal(decode_counts(expand_counts(compress_counts(counts)), SLICE_HW), mask)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=12))
def test_texts_keep_any_numbers(counts) -> None:
    assert expand_counts(compress_counts(np.array(counts, np.int64))).tolist() == counts


@settings(max_examples=40, deadline=None)
@given(any_mask())
def test_pycocotools_writes_the_same_text(mask) -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="an oracle of the run-length code")
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert compress_counts(rle_counts(encoded(mask), SLICE_HW)) == expected["counts"].decode()


def test_file_has_what_coco_asks_for(tmp_path) -> None:
    path, shapes = tmp_path / "masks.json", letter_shapes()
    assert write_coco(path, [slice_of(shapes), slice_of([], z=4)], "ca1.tif") == len(shapes)
    document = json.loads(path.read_bytes())
    assert [image["id"] for image in document["images"]] == [3, 4]
    assert document["images"][0] | {"file_name": "ca1.tif#z=3", "height": 23, "width": 31} == document["images"][0]
    assert [row["id"] for row in document["annotations"]] == list(range(1, len(shapes) + 1))
    for row, mask in zip(document["annotations"], shapes, strict=True):
        rows, columns = np.nonzero(mask)
        assert row["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert (row["area"], row["image_id"], row["category_id"], row["iscrowd"]) == (mask.sum(), 3, 1, 0)
        code = row["segmentation"]
        np.testing.assert_array_equal(decode_counts(expand_counts(code["counts"]), tuple(code["size"])), mask)
    assert document["annotations"][0]["object_id"] == 11
    assert document["annotations"][0]["score"] == 0.9


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its own, of numpy 2
def test_pycocotools_reads_the_file(tmp_path) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="the reader that most programs use")
    path, shapes = tmp_path / "masks.json", letter_shapes()
    write_coco(path, [slice_of(shapes)], "ca1.tif")
    read = coco.COCO(str(path))
    for row, mask in zip(read.loadAnns(read.getAnnIds()), shapes, strict=True):
        np.testing.assert_array_equal(read.annToMask(row), mask)


@pytest.mark.parametrize(("text", "complaint"), [("0 1", "' '"), ("P", "cut or damaged")])
def test_damaged_texts_are_refused(text, complaint) -> None:
    with pytest.raises(InputFileError, match=complaint):
        expand_counts(text)


def test_counts_that_do_not_fill_the_slice_are_refused() -> None:
    with pytest.raises(InputFileError, match="add up to 5 px, expected 6"):
        decode_counts(np.array([2, 3]), (2, 3))
