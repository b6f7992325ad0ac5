"""``info``: what a path is."""

from __future__ import annotations

import hashlib

import pytest


def test_volume(run, discs) -> None:
    document = run("info", discs / "raw.tif", "--json", "-").document
    assert document["kind"] == "volume"
    assert document["shape_zyx"] == [4, 64, 80]
    assert document["voxel_size_nm"] == pytest.approx([40, 15, 15])
    assert "dtype                uint8" in run("info", discs / "raw.tif").out


def test_sam_checkpoint(run, random_sam) -> None:
    document = run("info", random_sam, "--json", "-").document
    assert (document["kind"], document["architecture"], document["image_size_px"]) == ("sam", "tiny", 64)
    assert document["sha256"] == hashlib.sha256(random_sam.read_bytes()).hexdigest()
    assert "training             not recorded" in run("info", random_sam).out


def test_yolo_checkpoint(run, shared_data) -> None:
    document = run("info", shared_data / "yolo" / "yolov8n.pt", "--json", "-").document
    assert (document["kind"], document["architecture"], document["image_size_px"]) == ("detector", "yolov8n", 640)
    assert len(document["classes"]) == 80


def test_bundle(run, bundle) -> None:
    document = run("info", bundle, "--json", "-").document
    assert (document["kind"], document["model_type"], document["tile_size_px"]) == ("bundle", "tiny", 64)
    assert document["parity"] in ("unproven", "passed")  # another test may have verified it
    assert len(document["graphs"]) == 2


def test_run(run, discs, bundle, tmp_path) -> None:
    out = tmp_path / "out"
    run("segment", discs / "raw.tif", "-b", bundle, "-o", out, "--boxes", discs / "labels.tif", "--slices", "1:3")
    document = run("info", out, "--json", "-").document
    assert (document["kind"], document["finished_slices"]) == ("run", 2)
    assert document["labels"] == str(out / "labels.tif")


def test_a_cut_download_is_named(run, shared_data) -> None:
    path = shared_data / "sam" / "mobile_sam_truncated.pt"
    outcome = run("info", path)
    assert outcome.code == 4
    assert outcome.message.startswith(f"{path}: the checkpoint is cut off or damaged (1,835,008 bytes)")


def test_onnx_file(run, shared_data, tmp_path) -> None:
    outcome = run("info", shared_data / "yolo" / "yolov8n_int8.onnx", "--json", "-")
    facts = outcome.document
    assert facts["kind"] == "graph"
    assert [value["name"] for value in facts["inputs"]] == ["images"]
    (tmp_path / "text.onnx").write_text("no graph")
    outcome = run("info", tmp_path / "text.onnx")
    assert outcome.code == 4
    assert outcome.message.startswith(f"{tmp_path / 'text.onnx'}: cannot be read as an ONNX graph")
