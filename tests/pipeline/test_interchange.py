"""The objects of a run in formats of other programs: what they say is what the labels show."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import roifile
import tifffile
from stack_runs import DEPTH, read_rows
from synthetic_session import make_session

from dendsam_deploy.errors import IncompleteRunError, InputFileError, InvalidArgumentError
from dendsam_deploy.evaluate.pseudo_labels import pseudo_label_volume
from dendsam_deploy.evaluate.pseudo_options import PseudoLabelOptions
from dendsam_deploy.pipeline.interchange import check_formats, write_run_formats
from dendsam_deploy.pipeline.run import SegmentOptions, segment_volume
from dendsam_deploy.volume.boxes import open_boxes
from dendsam_deploy.volume.coco_masks import decode_counts, expand_counts
from dendsam_deploy.volume.label_objects import boxes_from_labels
from dendsam_deploy.volume.outlines import signed_area_px

SHAPE_ZYX = (DEPTH, 96, 110)


@pytest.fixture
def result(volume):
    return segment_volume(volume, make_session(), SegmentOptions())


def volume_of(coco: dict) -> np.ndarray:
    """Paint the annotations of a COCO file into a volume."""
    painted = np.zeros(SHAPE_ZYX, np.uint32)
    for row in coco["annotations"]:
        code = row["segmentation"]
        painted[row["image_id"]][decode_counts(expand_counts(code["counts"]), tuple(code["size"]))] = row["object_id"]
    return painted


def test_coco_paints_the_labels_again(result) -> None:
    paths = write_run_formats(result.out, ("coco",))
    coco = json.loads(paths["coco"].read_bytes())
    np.testing.assert_array_equal(volume_of(coco), tifffile.imread(result.out / "labels.tif"))
    rows = read_rows(result.out / "detections.csv")
    assert [row["object_id"] for row in coco["annotations"]] == [int(row["id"]) for row in rows]
    for annotation, row in zip(coco["annotations"], rows, strict=True):
        assert annotation["score"] == pytest.approx(float(row["score"]) * float(row["predicted_iou"]), abs=1e-3)
    assert [image["id"] for image in coco["images"]] == list(range(DEPTH))


def test_yolo_boxes_are_those_of_the_labels(result) -> None:
    paths = write_run_formats(result.out, ("yolo",))
    labels = tifffile.imread(result.out / "labels.tif").astype(np.uint32)
    with open_boxes(paths["yolo"], SHAPE_ZYX) as boxes:
        for z in range(DEPTH):
            found = sorted(boxes.for_slice(z).boxes_xyxy.round(2).tolist())
            assert found == sorted(boxes_from_labels(labels[z]).boxes_xyxy.tolist())


def test_rois_have_the_areas_of_the_labels(result) -> None:
    paths = write_run_formats(result.out, ("roi",))
    areas = Counter()
    for roi in roifile.roiread(paths["roi"]):
        _, number = roi.name.split("-")[:2]
        areas[(roi.position - 1, int(number))] += sum(signed_area_px(part) for part in roi.coordinates(multi=True))
    labels = tifffile.imread(result.out / "labels.tif")
    expected = {
        (z, int(number)): int((labels[z] == number).sum())
        for z in range(DEPTH)
        for number in np.unique(labels[z])
        if number
    }
    assert areas == expected


def test_kept_masks_alone_are_written(volume, tmp_path) -> None:
    options = PseudoLabelOptions(
        tmp_path / "out",
        also=("coco", "roi", "yolo"),
        least_agreement=0.0,
        least_stability=0.0,
        kept_slices=(0, 2),
        least_score=0.0,
    )
    made = pseudo_label_volume(volume, make_session(), options)
    assert 0 < made.kept < made.masks
    coco = json.loads((made.out / "masks.coco.json").read_bytes())
    np.testing.assert_array_equal(volume_of(coco), tifffile.imread(made.labels))
    assert len(coco["annotations"]) == len(roifile.roiread(made.out / "rois.zip")) == made.kept
    lines = [line for path in (made.out / "boxes.yolo").iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == made.kept


def test_a_run_that_is_done_anew_takes_them_away(volume, result) -> None:
    write_run_formats(result.out, ("coco", "yolo", "roi"))
    segment_volume(volume, make_session(), SegmentOptions(restart=True, slices=(0, 2)))
    assert not {"masks.coco.json", "boxes.yolo", "rois.zip"} & {path.name for path in result.out.iterdir()}


def test_part_of_a_volume_keeps_its_slice_numbers(volume, tmp_path) -> None:
    part = segment_volume(volume, make_session(), SegmentOptions(tmp_path / "part", slices=(2, 4)))
    paths = write_run_formats(part.out, ("coco", "yolo"))
    assert [image["z"] for image in json.loads(paths["coco"].read_bytes())["images"]] == [2, 3]
    assert sorted(path.name for path in paths["yolo"].iterdir()) == ["z000002.txt", "z000003.txt"]


def test_missing_and_damaged_pieces_are_told(result) -> None:
    table = result.out / "detections.csv"
    text = table.read_text()
    table.write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(InputFileError, match="does not list the objects of slice"):
        write_run_formats(result.out, ("coco",))
    table.write_text("z,id\n1,x\n")
    with pytest.raises(InputFileError, match="cannot be read"):
        write_run_formats(result.out, ("coco",))
    table.write_text(text)
    (result.out / "slices" / "000001.npz").unlink()
    with pytest.raises(IncompleteRunError, match="slice 1"):
        write_run_formats(result.out, ("roi",))
    assert not (result.out / "rois.zip").exists()


def test_names_of_formats() -> None:
    assert check_formats(["roi", "coco", "roi"]) == ("coco", "roi")
    with pytest.raises(InvalidArgumentError, match="no format 'swc'; choose among coco, yolo, roi"):
        check_formats(["swc"])
