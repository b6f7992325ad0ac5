"""``segment``: from a volume to a folder of results; the tests look at the pixels."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tifffile

RESULT_KEYS = {
    "out", "slices", "objects_2d", "objects_3d", "seconds", "stage_seconds", "limiting_stage", "engine", "device",
    "precision", "fingerprint",
}  # fmt: skip


@pytest.fixture
def segment(run, discs, bundle, tmp_path):
    def call(*words: object):
        given = ["-o", tmp_path / "out", "--boxes", discs / "labels.tif", "--min-area", 0, *words]
        return run("segment", discs / "raw.tif", "-b", bundle, *given)

    return call


def test_the_folder_holds_what_the_contract_names(segment, discs, tmp_path) -> None:
    outcome = segment("--json", tmp_path / "result.json")
    assert outcome.code == 0
    assert outcome.out.startswith(f"{tmp_path / 'out'}: ")
    assert re.search(r"on (openvino|onnxruntime), cpu, fp32 \(", outcome.err)
    document = json.loads((tmp_path / "result.json").read_text())
    assert document.keys() >= RESULT_KEYS
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"labels.tif", "instances.csv", "detections.csv", "report.html", "run.json", "journal.jsonl"} <= names
    labels = tifffile.imread(tmp_path / "out" / "labels.tif")
    assert labels.shape == (4, 64, 80)
    assert len(np.unique(labels[labels > 0])) == document["objects_3d"]


def test_options_reach_the_library(segment, tmp_path) -> None:
    document = segment("--slices", "1:3", "--linker", "iou-greedy", "--voxel-size", "50,15,15", "--json", "-").document
    assert document["slices"] == 2
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["input"]["voxel_size_nm"] == [50.0, 15.0, 15.0]
    assert "iou-greedy" in json.dumps(settings)


def test_other_settings_are_refused_until_restart(segment) -> None:
    assert segment().code == 0
    refused = segment("--linker", "iou-greedy", "-q")
    assert refused.code == 2
    assert '(link.method: "overlap-graph" -> "iou-greedy")' in refused.message
    assert segment("--linker", "iou-greedy", "--restart").code == 0


def test_ome_zarr(segment, tmp_path) -> None:
    assert segment("--format", "ome-zarr").code == 0
    assert (tmp_path / "out" / "labels.ome.zarr").is_dir()


def test_quiet_leaves_only_the_result(segment, tmp_path) -> None:
    outcome = segment("-q")
    assert (outcome.out.count("\n"), outcome.err) == (1, "")


def test_without_detector_or_boxes(run, discs, bundle, tmp_path) -> None:
    outcome = run("segment", discs / "raw.tif", "-b", bundle, "-o", tmp_path / "out", "-q")
    assert outcome.code == 3
    assert "has no detector; give boxes with --boxes" in outcome.message


def test_the_only_bundle_is_found(run, discs, bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DENDSAM_BUNDLE", raising=False)
    words = ["segment", discs / "raw.tif", "-o", "out", "--boxes", discs / "labels.tif", "-q"]
    refused = run(*words)
    assert refused.code == 2
    assert "found no bundle in exports/; name one with -b or in $DENDSAM_BUNDLE" in refused.message
    monkeypatch.setenv("DENDSAM_BUNDLE", str(bundle))
    assert run(*words).code == 0
    monkeypatch.delenv("DENDSAM_BUNDLE")
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "only").symlink_to(bundle)
    assert run(*words, "--restart").code == 0


@pytest.mark.parametrize("words", [("--engine", "tensorrt", "--device", "cpu"), ("--device", "cuda:99")], ids=" ".join)
def test_what_is_not_there_is_refused_and_not_replaced(segment, words) -> None:
    outcome = segment(*words, "-q")
    assert outcome.code == 3
    assert words[1].partition(":")[0] in outcome.message


def test_a_precision_that_the_bundle_lacks_is_refused(segment) -> None:
    outcome = segment("--precision", "int8", "-q")
    assert outcome.code == 3
    assert outcome.message.startswith("the bundle 'random' has no full set of graphs at int8")
