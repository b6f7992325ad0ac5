"""A file that cannot be used gives one line that names it, whichever command met it; never a traceback."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def write(path: Path, stack: np.ndarray) -> Path:
    tifffile.imwrite(path, stack, photometric="minisblack", metadata={"axes": "ZYX"})
    return path


def cut(folder: Path) -> Path:
    whole = write(folder / "whole.tif", np.arange(4 * 64 * 80, dtype=np.uint16).reshape(4, 64, 80)).read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
    return folder / "cut.tif"


def empty(folder: Path) -> Path:
    (folder / "empty.tif").touch()
    return folder / "empty.tif"


def text(folder: Path) -> Path:
    (folder / "notes.tif").write_text("see the other drive\n")
    return folder / "notes.tif"


def rgb(folder: Path) -> Path:
    tifffile.imwrite(folder / "rgb.tif", np.zeros((4, 64, 80, 3), np.uint8), photometric="rgb")
    return folder / "rgb.tif"


def with_nan(folder: Path) -> Path:
    stack = np.zeros((4, 64, 80), np.float32)
    stack[:, 5, 5] = np.nan
    return write(folder / "nan.tif", stack)


def mixed_sizes(folder: Path) -> Path:
    (folder / "slices").mkdir()
    for z, width in enumerate([80, 80, 81, 80]):
        tifffile.imwrite(folder / "slices" / f"z{z}.tif", np.zeros((64, width), np.uint8))
    return folder / "slices"


def complex_numbers(folder: Path) -> Path:
    return write(folder / "complex.tif", np.zeros((4, 64, 80), np.complex64))


def missing(folder: Path) -> Path:
    return folder / "missing.tif"


BAD_VOLUMES = [missing, empty, cut, text, rgb, with_nan, mixed_sizes, complex_numbers]

VOLUME_COMMANDS = {
    "segment": ["segment", "BAD", "-b", "BUNDLE", "-o", "OUT", "--boxes", "LABELS"],
    "segment --boxes": ["segment", "RAW", "-b", "BUNDLE", "-o", "OUT", "--boxes", "BAD"],
    "evaluate, labels": ["evaluate", "BAD", "LABELS"],
    "evaluate, truth": ["evaluate", "LABELS", "BAD"],
    "compare, volume": ["compare", "BAD", "LABELS", "-b", "BUNDLE"],
    "compare, truth": ["compare", "RAW", "BAD", "-b", "BUNDLE"],
    "finetune sam": ["finetune", "sam", "BAD", "LABELS", "-o", "OUT", "--start", "SAM"],
    "finetune sam, labels": ["finetune", "sam", "RAW", "BAD", "-o", "OUT", "--start", "SAM"],
    "finetune detector": ["finetune", "detector", "BAD", "LABELS", "-o", "OUT", "--start", "YOLO"],
    "finetune detector, labels": ["finetune", "detector", "RAW", "BAD", "-o", "OUT", "--start", "YOLO"],
    "info": ["info", "BAD"],
}


@pytest.fixture
def refused(run, discs, bundle, random_sam, tmp_path) -> Callable[[list[str], Path], str]:
    """Run a command on a bad file, check its exit code and that its only line names the file; return the line."""
    places = {
        "RAW": discs / "raw.tif",
        "LABELS": discs / "labels.tif",
        "BUNDLE": bundle,
        "SAM": random_sam,
        "YOLO": "yolo11n.yaml",
        "OUT": tmp_path / "out",
    }

    def check(words: list[str], bad: Path, codes: tuple[int, ...] = (2, 4)) -> str:
        outcome = run(*(bad if word == "BAD" else places.get(word, word) for word in words), "-q")
        assert outcome.code in codes, outcome.err
        assert outcome.out == ""
        assert str(bad) in outcome.message
        message: str = outcome.message
        return message

    return check


@pytest.mark.parametrize("make", BAD_VOLUMES)
@pytest.mark.parametrize("words", VOLUME_COMMANDS.values(), ids=list(VOLUME_COMMANDS))
def test_bad_volumes(refused, words, make, tmp_path) -> None:
    if make is with_nan and words[0] == "info":
        pytest.skip("info does not read the pixels")
    refused(words, make(tmp_path))


def cut_checkpoint(folder: Path, sam: Path) -> Path:
    (folder / "cut.pt").write_bytes(sam.read_bytes()[:100_000])
    return folder / "cut.pt"


def text_checkpoint(folder: Path, sam: Path) -> Path:
    (folder / "notes.pt").write_text("see the other drive\n")
    return folder / "notes.pt"


def empty_checkpoint(folder: Path, sam: Path) -> Path:
    (folder / "empty.pt").touch()
    return folder / "empty.pt"


def missing_checkpoint(folder: Path, sam: Path) -> Path:
    return folder / "missing.pt"


def volume_as_checkpoint(folder: Path, sam: Path) -> Path:
    return write(folder / "volume.pt", np.zeros((4, 64, 80), np.uint8))


CHECKPOINT_COMMANDS = {
    "export --sam": ["export", "--sam", "BAD", "-o", "OUT"],
    "export --detector": ["export", "--sam", "SAM", "--detector", "BAD", "-o", "OUT"],
    "finetune sam --start": ["finetune", "sam", "RAW", "LABELS", "-o", "OUT", "--start", "BAD"],
    "finetune detector --start": ["finetune", "detector", "RAW", "LABELS", "-o", "OUT", "--start", "BAD"],
    "verify --sam": ["verify", "BUNDLE", "--sam", "BAD"],
    "info": ["info", "BAD"],
}


@pytest.mark.parametrize(
    "make", [missing_checkpoint, empty_checkpoint, text_checkpoint, cut_checkpoint, volume_as_checkpoint]
)
@pytest.mark.parametrize("words", CHECKPOINT_COMMANDS.values(), ids=list(CHECKPOINT_COMMANDS))
def test_bad_checkpoints(refused, words, make, tmp_path, random_sam) -> None:
    refused(words, make(tmp_path, random_sam))


def test_a_detector_is_no_sam_and_a_sam_is_no_detector(refused, shared_data, random_sam) -> None:
    yolo = shared_data / "yolo" / "yolov8n.pt"
    assert "expected SAM; give it as the detector" in refused(["export", "--sam", "BAD", "-o", "OUT"], yolo)
    assert "Ultralytics" in refused(["export", "--sam", "SAM", "--detector", "BAD", "-o", "OUT"], random_sam)


@pytest.mark.parametrize("command", [["verify", "BAD"], ["segment", "RAW", "-b", "BAD", "--boxes", "LABELS"]], ids=str)
@pytest.mark.parametrize("kind", ["missing", "file", "folder", "text", "cut"])
def test_bad_bundles(refused, command, kind, bundle, tmp_path) -> None:
    bad = tmp_path / "bad"
    if kind == "file":
        bad.write_text("no folder")
    elif kind == "folder":
        bad.mkdir()
    elif kind == "text":
        bad.mkdir()
        (bad / "manifest.json").write_text("no JSON")
    elif kind == "cut":
        shutil.copytree(bundle, bad)
        graph = bad / "encoder.onnx"
        graph.write_bytes(graph.read_bytes()[:1000])
    refused(command, bad)


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("words", CHECKPOINT_COMMANDS.values(), ids=list(CHECKPOINT_COMMANDS))
@pytest.mark.parametrize("disguise", ["sam", "yolo"])
def test_a_checkpoint_that_would_run_code_is_refused(refused, words, disguise, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    canary, bad = tmp_path / "canary", tmp_path / "hostile.pt"
    content = {"model": Planted(canary)}
    if disguise == "yolo":
        from ultralytics.nn.modules import Conv  # noqa: PLC0415 - needs the extra train

        content["ema"] = Conv(1, 1)
    torch.save(content, bad)
    refused(words, bad, codes=(4, 77))
    assert not canary.exists()


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_results_never_replace_a_file_of_another_kind(run, discs, tmp_path, option) -> None:
    labels = tmp_path / "labels.tif"
    shutil.copy(discs / "labels.tif", labels)
    before = labels.read_bytes()
    outcome = run("evaluate", labels, labels, option, labels)
    assert outcome.code == 2
    assert f"{labels} exists and is no .{'json' if option == '--json' else 'html'} file" in outcome.message
    assert labels.read_bytes() == before
    for place, complaint in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.json", "is no folder"), ("", "is empty")):
        outcome = run("evaluate", labels, labels, option, place)
        assert outcome.code == 2
        assert complaint in outcome.message


def test_an_empty_path_is_no_folder(run) -> None:
    outcome = run("info", "")
    assert outcome.code == 2
    assert "the path is empty" in outcome.message


def test_the_image_is_no_source_of_boxes(run, discs, bundle, tmp_path) -> None:
    noise = write(tmp_path / "noise.tif", np.random.default_rng(0).integers(1, 255, (2, 96, 96), dtype=np.uint8))
    outcome = run("segment", noise, "-b", bundle, "-o", tmp_path / "out", "--boxes", noise, "-q")
    assert outcome.code == 4
    assert f"{noise}: slice 0 has" in outcome.message
    assert "this may be the image itself" in outcome.message


def test_a_run_in_place_of_the_truth(run, discs, bundle, tmp_path) -> None:
    words = ["segment", discs / "raw.tif", "-b", bundle, "-o", tmp_path / "out", "--boxes", discs / "labels.tif"]
    assert run(*words).code == 0
    outcome = run("evaluate", discs / "labels.tif", tmp_path / "out")
    assert outcome.code == 2
    assert "are the two swapped?" in outcome.message


@pytest.mark.parametrize(("name", "value"), [("detection_score", 5), ("nms_iou", -1), ("min_area_px", -3)])
def test_thresholds_with_which_nothing_can_be_found(run, bundle, tmp_path, name, value) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["thresholds"][name] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    outcome = run("info", copy)
    assert outcome.code == 4
    assert f"{name} " in outcome.message
