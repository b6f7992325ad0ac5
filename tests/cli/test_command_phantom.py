"""``phantom``: a synthetic stack and its exact labels on disk."""

from __future__ import annotations

import numpy as np
import tifffile

from dendsam_deploy.volume.open import open_volume
from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom


def test_folder_holds_the_phantom_of_the_library(run, tmp_path) -> None:
    words = ["--shape", "3,80,96", "--seed", 5, "--missing-slice", 1, "--dense", "--voxel-size", "50,8,8"]
    outcome = run("phantom", tmp_path / "new" / "ph", *words)
    folder = tmp_path / "new" / "ph"
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [str(folder / f"{name}.tif") for name in ("raw", "labels", "labels_2d")]
    expected = make_phantom(PhantomOptions((3, 80, 96), 5, (50.0, 8.0, 8.0), dense=True, missing_slice=1))
    assert np.array_equal(tifffile.imread(folder / "raw.tif"), expected.raw)
    assert np.array_equal(tifffile.imread(folder / "labels.tif"), expected.labels)
    assert np.array_equal(tifffile.imread(folder / "labels_2d.tif"), expected.labels_2d)
    for name in ("raw", "labels", "labels_2d"):
        with open_volume(folder / f"{name}.tif") as volume:
            assert volume.info.voxel_size_nm == (50.0, 8.0, 8.0)
    with open_volume(folder / "raw.tif") as volume:
        assert volume.info.dtype == np.uint8


def test_a_tif_names_the_image(run, tmp_path) -> None:
    document = run("phantom", tmp_path / "ca1.tif", "--shape", "2,64,64", "--json", "-").document
    names = {"raw": "ca1.tif", "labels": "ca1-labels.tif", "labels_2d": "ca1-labels_2d.tif"}
    assert document["files"] == {kind: str(tmp_path / name) for kind, name in names.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())
    assert document["shape_zyx"] == [2, 64, 64]


def test_a_place_that_cannot_be_written(run, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = run("phantom", tmp_path / "file" / "ph", "--shape", "2,64,64")
    assert outcome.code == 74
    assert str(tmp_path / "file" / "ph") in outcome.message


def test_only_a_whole_phantom_is_replaced(run, tmp_path) -> None:
    assert run("phantom", tmp_path / "ph", "--shape", "2,64,64").code == 0
    assert run("phantom", tmp_path / "ph", "--shape", "2,64,64", "--seed", "3").code == 0
    (tmp_path / "ph" / "labels_2d.tif").unlink()
    before = (tmp_path / "ph" / "raw.tif").read_bytes()
    outcome = run("phantom", tmp_path / "ph", "--shape", "2,64,64")
    assert outcome.code == 2
    assert outcome.message == f"{tmp_path / 'ph' / 'raw.tif'}: exists and is no part of a phantom; choose another name"
    assert (tmp_path / "ph" / "raw.tif").read_bytes() == before


def test_what_no_memory_holds_is_refused_at_once(run, tmp_path) -> None:
    outcome = run("phantom", tmp_path / "ph", "--shape", "100000,100000,100000")
    assert outcome.code == 2
    assert "GiB of memory" in outcome.message
    assert not (tmp_path / "ph").exists()
