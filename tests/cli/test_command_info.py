"""``info``: what a path is."""

from __future__ import annotations

import hashlib
import shutil

import pytest
from command_outcome import run_python


def test_volume(run, discs) -> None:
    document = run("info", discs / "raw.tif", "--json", "-").document
    assert document["kind"] == "volume"
    assert document["shape_zyx"] == [4, 64, 80]
    assert document["voxel_size_nm"] == pytest.approx([40, 15, 15])
    assert "dtype                uint8" in run("info", discs / "raw.tif").out


def test_sam_checkpoint(run, random_sam) -> None:
    document = run("info", random_sam, "--json", "-").document
    assert (document["kind"], document["architecture"], document["image_size_px"]) == ("sam", "tiny", 64)
    assert (document["layout"], document["trained_by"]) == ("own", "dendsam-deploy")
    assert document["bytes"] == random_sam.stat().st_size
    assert document["sha256"] == hashlib.sha256(random_sam.read_bytes()).hexdigest()
    text = run("info", random_sam).out
    assert "training             not recorded" in text
    assert "answers_prompts      yes" in text


@pytest.mark.parametrize("name", ["vit_b_lm", "weights.bin", "weights.tif"])
def test_a_checkpoint_is_told_by_its_content(run, random_sam, tmp_path, name) -> None:
    shutil.copy(random_sam, tmp_path / name)
    assert run("info", tmp_path / name, "--json", "-").document["kind"] == "sam"
    (tmp_path / name).write_bytes(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.")
    assert run("info", tmp_path / name).code == 77


def test_yolo_checkpoint(run, shared_data) -> None:
    path = shared_data / "yolo" / "yolov8n.pt"
    document = run("info", path, "--json", "-").document
    assert (document["kind"], document["architecture"], document["image_size_px"]) == ("detector", "yolov8n", 640)
    assert len(document["classes"]) == 80
    assert document["parameters"] == 3_157_200  # as ultralytics states it
    assert (document["trained_by"], document["head"]) == ("ultralytics 8.0.0.dev0", "Detect")
    assert document["sha256"] == "31e20dde3def09e2cf938c7be6fe23d9150bbbe503982af13345706515f2ef95"


def test_checkpoints_need_no_library_that_made_them(random_sam, shared_data) -> None:
    """Nothing of a file is run, so nothing of torch or ultralytics is needed."""
    program = """
import sys
from dendsam_deploy.cli.main import main
codes = [main(["info", path]) for path in sys.argv[1:]]
print(codes, [name for name in ("torch", "ultralytics", "requests", "pooch") if name in sys.modules])
"""
    outcome = run_python(program, random_sam, shared_data / "yolo" / "yolov8n.pt", "sam_vit_b")
    assert outcome.out.splitlines()[-1] == "[0, 0, 0] []"


def test_known_weights(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DENDSAM_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    document = run("info", "sam_vit_l", "--json", "-").document
    assert (document["kind"], document["architecture"], document["licence"]) == ("weights", "vit_l", "Apache-2.0")
    assert document["digest"] == "sha256:3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    assert (document["file"], document["is_here"]) == (str(tmp_path / "weights" / "sam_vit_l_0b3195.pth"), False)
    assert "is_here              yes" in run("info", "demo_sam").out


def test_bundle(run, bundle) -> None:
    document = run("info", bundle, "--json", "-").document
    assert (document["kind"], document["model_type"], document["tile_size_px"]) == ("bundle", "tiny", 64)
    assert document["parity"] in ("unproven", "passed")  # another test may have verified it
    assert len(document["graphs"]) == 3


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
