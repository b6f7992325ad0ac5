"""``finetune detector``: from one volume and from a list of several to a checkpoint, its course and its page."""

from __future__ import annotations

import csv
import json

import pytest
import tifffile

pytest.importorskip("torch", reason="needs the extra train")

# Raised inside ultralytics and torch: deterministic variants of some operators, and the order of the first two steps.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL_YOLO = """
nc: 1
backbone: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]]]
head: [[-1, 1, Conv, [16, 3, 2]], [[2, 3], 1, Detect, [nc]]]
"""


@pytest.fixture
def finetune(run, tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL_YOLO)
    short = ["--image-size", 64, "--epochs", 1, "--tiles", 4, "--tiles-per-epoch", 4, "--batch", 2, "--gap", 0]

    def call(*words: object):
        given = ["--start", tmp_path / "small.yaml", *short, "-o", tmp_path / "yolo.pt", *words]
        return run("finetune", "detector", *given)

    return call


@pytest.mark.slow
def test_two_volumes_from_a_list(finetune, discs, tmp_path) -> None:
    (tmp_path / "data.csv").write_text(
        "volume,labels,held_out,weight,voxel_size\n"
        f"{discs}/raw.tif,{discs}/labels.tif,1:2,3,\n"
        f'turned/raw.tif,turned/labels.tif,none,1,"40,30,30"\n'
    )
    (tmp_path / "turned").mkdir()
    for name in ("raw.tif", "labels.tif"):
        tifffile.imwrite(tmp_path / "turned" / name, tifffile.imread(discs / name)[:, ::-1], imagej=True)
    outcome = finetune("--data", tmp_path / "data.csv", "--zoom", 1, "--json", "-")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert document["volumes"][0]["train_blocks"] == [[0, 1], [2, 4]]
    assert document["volumes"][0]["held_out_blocks"] == [[1, 2]]
    assert document["volumes"][1]["held_out_blocks"] == []
    assert document["model_pixel_size_nm"] is None  # 15 and 30 nm at one zoom
    assert {check["name"] for check in document["limits"]} >= {"objects_per_tile", "smallest_side_px", "aspect_ratio"}
    assert "batch: 2 tiles a step (preset given)" in outcome.err
    folder = tmp_path / "yolo.training"
    assert document["report"] == str(folder / "report.html")
    page = (folder / "report.html").read_text()
    assert "Training of yolo.pt" in page
    assert "turned/raw.tif" in page
    with (folder / "history.csv").open(newline="") as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["1"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["options"]["schedule"]["minutes"], config["batch"]) == (None, 2)


@pytest.mark.parametrize(
    "case",
    [
        (None, [], 2, "give a VOLUME and its LABELS, or a file that lists several with --data"),
        (None, ["raw"], 2, "a volume and its labels go together"),
        ("none.tif labels.tif\n", [], 4, "data.txt: line 1: "),
        ("raw.tif labels.tif\nraw.tif labels.tif slices=x\n", [], 4, "data.txt: line 2: slices is 'x'"),
        ("raw.tif labels.tif slices=0:3\nraw.tif labels.tif slices=1:4\n", [], 2, "is named twice"),
        ("raw.tif labels.tif held-out=none\n", [], 2, "every volume only teaches"),
        (None, ["raw", "labels", "--held-out", "0:4"], 2, "leaves none to train on"),
        (None, ["raw", "labels", "--gap", "3"], 2, "training needs at least 5 slices"),
        (None, ["raw", "labels", "--augment", "much"], 2, "'none', 'light', 'em'"),
    ],
)
def test_data_that_cannot_be_used(finetune, discs, tmp_path, case) -> None:
    text, words, code, part = case
    words = [discs / f"{word}.tif" if word in ("raw", "labels") else word for word in words]
    if text is not None:
        for name in ("raw.tif", "labels.tif"):
            (tmp_path / name).write_bytes((discs / name).read_bytes())
        (tmp_path / "data.txt").write_text(text)
        words = [*words, "--data", tmp_path / "data.txt"]
    outcome = finetune(*words)
    assert (outcome.code, part in outcome.message) == (code, True), outcome.err
    assert not (tmp_path / "yolo.pt").exists()
    assert not (tmp_path / "yolo.training").exists()
