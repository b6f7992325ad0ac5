"""YOLO text: parts of the slice, pixel edges, and `open_boxes` reads the same boxes again."""

from __future__ import annotations

import numpy as np
from mask_shapes import SLICE_HW, letter_shapes, slice_of

from dendsam_deploy.volume.boxes import open_boxes
from dendsam_deploy.volume.yolo_boxes import write_yolo


def test_a_pixel_and_the_whole_slice(tmp_path) -> None:
    pixel, whole = letter_shapes()[0], letter_shapes()[4]
    assert write_yolo(tmp_path, [slice_of([pixel, whole], z=7)]) == 2
    lines = (tmp_path / "z000007.txt").read_text().splitlines()
    x, y, width, height = (float(word) for word in lines[0].split()[1:5])
    np.testing.assert_allclose((x * 31, y * 23, width * 31, height * 23), (7.5, 5.5, 1, 1), atol=1e-5)
    assert lines[1] == "0 0.50000000 0.50000000 1.00000000 1.00000000 0.5000"


def test_files_for_training_a_detector_have_five_columns(tmp_path) -> None:
    write_yolo(tmp_path, [slice_of(letter_shapes())], with_scores=False)
    assert {len(line.split()) for line in (tmp_path / "z000003.txt").read_text().splitlines()} == {5}


def test_boxes_come_back(tmp_path) -> None:
    shapes = letter_shapes()
    slices = [slice_of(shapes, z=0), slice_of([], z=1), slice_of(shapes[:2], z=2)]
    write_yolo(tmp_path, slices)
    assert (tmp_path / "z000001.txt").read_text() == ""
    with open_boxes(tmp_path, (3, *SLICE_HW)) as boxes:
        for found in slices:
            read = boxes.for_slice(found.z)
            np.testing.assert_allclose(read.scores, found.scores, atol=1e-4)
            for box, mask in zip(read.boxes_xyxy, shapes, strict=False):
                rows, columns = np.nonzero(mask)
                expected = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                np.testing.assert_allclose(box, expected, atol=1e-3)
