"""Training the detector: its tiles, its schedule, what survives an interruption, what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tifffile
import torch

from dendsam_deploy.errors import (
    CheckpointError,
    InvalidArgumentError,
    MissingCapabilityError,
    UnsafeFileError,
    VolumeError,
)
from dendsam_deploy.models.detector import load_detector
from dendsam_deploy.training import detector, detector_plan
from dendsam_deploy.training.detector import DEFAULT_ARCHITECTURE, finetune_detector
from dendsam_deploy.training.detector_tiles import TileAt, held_out_tiles, training_tiles, write_tiles
from dendsam_deploy.training.logbook import read_history
from dendsam_deploy.training.options import DetectorSchedule, DetectorTrainingOptions
from dendsam_deploy.training.resume import ResumeFolder
from dendsam_deploy.training.samples import LabelledVolume, Tile, TileRecipe
from dendsam_deploy.training.source import TrainingSource
from dendsam_deploy.volume.open import open_labels, open_volume
from dendsam_deploy.volume.raster import decode_png
from dendsam_deploy.weights import PACKAGED_DETECTOR

# Raised inside ultralytics and torch: deterministic variants of some operators, and the order of the first two steps.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL_YOLO = """
nc: 1
backbone: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]]]
head: [[-1, 1, Conv, [16, 3, 2]], [[2, 3], 1, Detect, [nc]]]
"""

SHORT = DetectorSchedule(minutes=None, epochs=1, tiles=6, tiles_per_epoch=4, judge_tiles=2, batch=2)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """Eight slices of 90 x 120 px with bright discs, a membrane label 9, and one object in two pieces."""
    folder = tmp_path_factory.mktemp("volume")
    rows, columns = np.mgrid[0:90, 0:120]
    labels = np.zeros((8, 90, 120), np.uint16)
    for number, (y, x, radius) in enumerate([(20, 25, 12), (60, 30, 15), (30, 80, 18), (70, 90, 10)], start=1):
        labels[:, (rows - y) ** 2 + (columns - x) ** 2 < radius**2] = number
    labels[:, 5:15, 100:112] = 4
    labels[:, 85:90] = 9
    noise = np.random.default_rng(0).normal(0, 8, labels.shape)
    raw = np.clip(np.where((labels > 0) & (labels < 9), 190, 70) + noise, 0, 255).astype(np.uint8)
    for name, stack in (("raw.tif", raw), ("labels.tif", labels)):
        # 100 px per micrometre = 10 nm
        metadata = {"unit": "um", "spacing": 0.04, "axes": "ZYX"}
        tifffile.imwrite(folder / name, stack, imagej=True, resolution=(100, 100), metadata=metadata)
    return folder / "raw.tif", folder / "labels.tif"


def options_for(folder):
    return DetectorTrainingOptions(
        folder / "detector.pt",
        start=DEFAULT_ARCHITECTURE,
        tile_size_px=64,
        zoom=1.0,
        background_labels=(9,),
        gap=1,
        schedule=SHORT,
    )


@pytest.fixture
def options(tmp_path):
    return options_for(tmp_path)


@pytest.fixture
def small(options, tmp_path_factory):
    """The same for a network of five layers."""
    start = tmp_path_factory.mktemp("network") / "small.yaml"
    start.write_text(SMALL_YOLO)
    return dataclasses.replace(options, start=start)


def read_yolo(file, side):
    rows = np.array([line.split() for line in file.read_text().splitlines()], float).reshape(-1, 5)
    centre, size = rows[:, 1:3] * side, rows[:, 3:] * side
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1)


def test_a_folder_in_the_place_of_the_result_is_found_before_the_training(volume, options):
    options.out.mkdir()
    with pytest.raises(InvalidArgumentError, match="is a folder; name the file to write"):
        finetune_detector(*volume, options)
    assert [entry.name for entry in options.out.parent.iterdir()] == [options.out.name]


def test_written_tiles_hold_the_image_and_tight_boxes(tmp_path):
    image = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)
    objects = np.zeros((64, 64), np.int32)
    objects[10:20, 30:64] = 1
    objects[40:43, 0:3] = 2
    found = write_tiles(tmp_path, "train", [TileAt(Tile(image, objects, (64, 64)), 10)] * 2)
    statistics = found.statistics()
    np.testing.assert_array_equal(decode_png(tmp_path / "images" / "train" / "000001.png"), image)
    boxes = read_yolo(tmp_path / "labels" / "train" / "000001.txt", 64)
    np.testing.assert_allclose(boxes, [[30, 10, 64, 20]], atol=1e-3)  # the other one is too small
    assert (statistics.tiles, statistics.objects, statistics.most_per_tile) == (2, 2, 1)
    assert statistics.short_side_px == (10, 10, 10)
    assert statistics.long_side_px == (34, 34, 34)
    assert statistics.aspect == pytest.approx((3.4, 3.4, 3.4))
    np.testing.assert_array_equal(found.per_tile[0], [[30, 10, 64, 20]])


def test_tiles_without_objects_are_kept_as_background(tmp_path):
    empty = Tile(np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.int32), (64, 64))
    statistics = write_tiles(tmp_path, "val", [TileAt(empty, 1)]).statistics()
    assert (tmp_path / "labels" / "val" / "000000.txt").read_text() == ""
    assert statistics.short_side_px == (0, 0, 0)


def source_of(readers, train, held_out, recipe, weight=1.0):
    learn = LabelledVolume(*readers, train, (9,))
    judge = LabelledVolume(*readers, held_out, (9,)) if held_out else None
    return TrainingSource(learn, judge, recipe, weight, name="raw.tif")


def test_held_out_tiles_are_those_of_deployment(volume):
    with open_volume(volume[0]) as image, open_labels(volume[1]) as labels:
        source = source_of((image, labels), range(3), range(5, 8), TileRecipe(64, 1.0))
        tiles = held_out_tiles([source], most=100)
        whole = image.read(5)
        assert len(tiles) == 3 * 2 * 3  # slices x rows x columns of tiles that overlap by 21 px or more
        np.testing.assert_array_equal(tiles[0].tile.image, whole[:64, :64])
        np.testing.assert_array_equal(tiles[5].tile.image, whole[-64:, -64:])
        assert (tiles[0].place, tiles[-1].place) == ("raw.tif, slice 5, tile 0", "raw.tif, slice 7, tile 5")
        assert len(held_out_tiles([source], most=5)) == 6
        assert len(held_out_tiles([source, source], most=24)) == 24
        only_teaches = dataclasses.replace(source, held_out=None)
        assert len(held_out_tiles([only_teaches, source], most=5)) == 6
        reduced = source_of((image, labels), range(3), range(5, 8), TileRecipe(64, 0.5))
        small = held_out_tiles([reduced], most=1)[0].tile
        assert small.size_hw == (45, 60)
        assert not small.image[45:].any()
        assert not small.objects[:, 60:].any()


def test_training_tiles_follow_the_seed(volume):
    with open_volume(volume[0]) as image, open_labels(volume[1]) as labels:
        source = source_of((image, labels), range(5), None, TileRecipe(64, 1.0, augment="em"))
        first, again, other = (
            np.stack([entry.tile.image for entry in training_tiles([source], 3, seed)]) for seed in (1, 1, 2)
        )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_volumes_give_tiles_in_proportion_to_their_weights(volume):
    """The least area of an object tells which volume a tile is from."""
    with open_volume(volume[0]) as image, open_labels(volume[1]) as labels:
        one = source_of((image, labels), range(2), None, TileRecipe(64, 1.0), weight=1.0)
        other = source_of((image, labels), range(2), None, TileRecipe(64, 2.0), weight=3.0)
        areas = np.array([entry.least_area_px for entry in training_tiles([one, other], 120, seed=0)])
    assert set(areas) == {12.5, 50.0}
    assert 0.63 < (areas == 50.0).mean() < 0.87


def test_the_least_object_is_the_one_asked_for(volume, small):
    options = dataclasses.replace(small, min_object_px=1e6, augment="none")
    with pytest.raises(VolumeError, match="no object of 1e\\+06 px or more"):
        finetune_detector(*volume, options)
    with pytest.raises(InvalidArgumentError, match="the least object is -1"):
        dataclasses.replace(small, min_object_px=-1.0)


@pytest.fixture(scope="module")
def trained(volume, tmp_path_factory):
    """One training of one epoch: its folder, its result and what it reported."""
    folder, seen = tmp_path_factory.mktemp("trained"), []
    result = finetune_detector(*volume, options_for(folder), seen.append)
    return folder, result, seen


@pytest.mark.slow
def test_a_training_writes_a_detector_that_knows_how_it_was_made(trained):
    folder, result, seen = trained
    assert sorted(path.name for path in folder.iterdir()) == ["detector.pt", "detector.training"]
    assert (result.train_slices, result.held_out_slices) == ((0, 6), (7, 8))
    assert result.volumes[0].train_blocks == ((0, 6),)
    assert result.model_pixel_size_nm == pytest.approx(10)
    assert (result.epochs, result.resumed, result.architecture) == (1, False, "yolo11n")
    plans = [entry.note for entry in seen if entry.stage == "plan"]
    assert plans[0].startswith("batch: 2 tiles a step (preset given)")
    assert [round(entry.done, 2) for entry in seen if entry.stage != "plan"] == [0.5, 1.0]
    assert "loss" in seen[-1].note
    document = json.loads(json.dumps(result.to_document(), allow_nan=False))
    assert document["first_scores"] is None
    assert [entry["name"] for entry in document["per_size"]] == ["small", "medium", "large"]
    assert sum(entry["objects"] for entry in document["per_size"]) > 0
    row = read_history(folder / "detector.training" / "history.csv")[0]
    assert row["epoch"] == 1
    assert row["loss"] == pytest.approx(row["loss_box"] + row["loss_cls"] + row["loss_dfl"], rel=1e-6)
    assert 0 <= row["held_out_map50"] <= 1
    assert row["learning_rate"] > 0
    written = load_detector(folder / "detector.pt")
    assert (written.class_names, written.image_size_px) == (("object",), 64)
    assert written.record is not None
    assert (written.record.zoom, written.record.summary["volume"]) == (1.0, "raw.tif")
    assert str(folder).encode() not in (folder / "detector.pt").read_bytes()


@pytest.mark.slow
def test_the_seed_decides_about_the_weights(volume, small, tmp_path):
    states = []
    for number, seed in enumerate((0, 0, 1)):
        schedule = dataclasses.replace(SHORT, seed=seed)
        wish = dataclasses.replace(small, out=tmp_path / f"{number}.pt", schedule=schedule)
        finetune_detector(*volume, wish)
        states.append(load_detector(wish.out).network.state_dict())
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def interrupted(*arguments):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(volume, small, tmp_path, monkeypatch):
    """Interrupted amid the second epoch and behind the last one; weights and course equal an uninterrupted run's.

    The batch is planned by the memory that is free, and stays when it is more the next time.
    """
    longer = dataclasses.replace(small, schedule=dataclasses.replace(SHORT, epochs=3, batch=None))
    monkeypatch.setattr(detector_plan, "free_bytes", lambda _: 1 << 20)
    whole = dataclasses.replace(longer, out=tmp_path / "whole" / "detector.pt")
    finetune_detector(*volume, whole)

    def interrupt(entry):
        if entry.note.startswith("epoch 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune_detector(*volume, longer, interrupt)
    assert not small.out.exists()
    with pytest.raises(CheckpointError, match="other settings"):
        finetune_detector(*volume, dataclasses.replace(longer, zoom=2.0))
    seen = []
    monkeypatch.setattr(detector_plan, "free_bytes", lambda _: 1 << 40)
    with monkeypatch.context() as patch:
        patch.setattr(detector, "sample_predictions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune_detector(*volume, longer, seen.append)
    assert next(entry for entry in seen if entry.stage != "plan").note.startswith("epoch 2")
    seen.clear()
    result = finetune_detector(*volume, longer, seen.append)
    assert (result.resumed, result.epochs) == (True, 3)
    assert {entry.stage for entry in seen} == {"plan"}
    one, other = (load_detector(path).network.state_dict() for path in (whole.out, small.out))
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [read_history(path.with_name("detector.training") / "history.csv") for path in (whole.out, small.out)]
    assert len(rows[0]) == 3
    for first, second in zip(*rows, strict=True):
        assert first | {"elapsed_s": 0} == second | {"elapsed_s": 0}


@pytest.mark.slow
def test_a_training_ends_when_nothing_improves_any_more(volume, small):
    """A rate of next to nothing moves nothing, so that some epoch soon stays the best."""
    schedule = dataclasses.replace(SHORT, epochs=12, patience=2, learning_rate=1e-12)
    result = finetune_detector(*volume, dataclasses.replace(small, schedule=schedule))
    scores = [
        row["held_out_map50_95"] for row in read_history(small.out.with_name("detector.training") / "history.csv")
    ]
    assert result.stopped_early
    assert result.epochs == len(scores) < 12
    assert scores[-3] >= max(scores[-2:])
    assert result.best_epoch == 1 + scores.index(max(scores)) == result.epochs - 2
    assert any(note.startswith("Stopped early: the last 2 epochs") for note in result.story.notes)


@pytest.mark.slow
def test_starting_weights_that_were_better_are_kept(volume, options):
    """The packaged weights find some of the discs; a rate that destroys them leaves them the best."""
    schedule = dataclasses.replace(SHORT, learning_rate=1.0)
    result = finetune_detector(*volume, dataclasses.replace(options, start=None, schedule=schedule))
    history = read_history(options.out.with_name("detector.training") / "history.csv")
    assert [row["epoch"] for row in history] == [0, 1]
    assert history[0]["held_out_map50_95"] > history[1]["held_out_map50_95"]
    assert (result.best_epoch, result.scores) == (0, result.first_scores)
    assert any("Never improved" in note for note in result.story.notes)
    kept, before = (load_detector(path).network.state_dict() for path in (options.out, PACKAGED_DETECTOR))
    assert all(torch.equal(kept[key], before[key]) for key in kept)


def test_a_hostile_architecture_inside_a_checkpoint_is_refused(volume, options, tmp_path):
    planted = load_detector(DEFAULT_ARCHITECTURE)
    canary = tmp_path / "canary"
    planted.network.yaml["activation"] = f"__import__('pathlib').Path({str(canary)!r}).touch() or nn.SiLU()"
    torch.save({"model": planted.network, "train_args": {"imgsz": 64}}, tmp_path / "hostile.pt")
    with pytest.raises(UnsafeFileError, match="activation"):
        finetune_detector(*volume, dataclasses.replace(options, start=tmp_path / "hostile.pt"))
    assert not canary.exists()


def test_wishes_that_cannot_be_met_are_refused(volume, options):
    cases = [
        (dataclasses.replace(options, slices=(3, 4)), InvalidArgumentError, "at least 3 slices"),
        (dataclasses.replace(options, background_labels=(1, 2, 3, 4, 9)), VolumeError, "no object of 25 px or more"),
        (dataclasses.replace(options, start=volume[0]), CheckpointError, "not a"),
    ]
    for wish, error, message in cases:
        with pytest.raises(error, match=message):
            finetune_detector(*volume, wish)
        assert not list(options.out.parent.iterdir())
    with pytest.raises(InvalidArgumentError, match="multiple of 32"):
        dataclasses.replace(options, tile_size_px=100)
    with pytest.raises(InvalidArgumentError, match="needs an end"):
        DetectorSchedule(minutes=None)
    for nonsense in ({"batch": 0}, {"patience": 0}, {"learning_rate": math.nan}, {"minutes": -1}):
        with pytest.raises(InvalidArgumentError, match="positive"):
            DetectorSchedule(**nonsense)
    with pytest.raises(InvalidArgumentError, match="learning rate is 2, expected at most 1"):
        DetectorSchedule(learning_rate=2.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test asks for in vain")
def test_an_absent_gpu_is_not_replaced(volume, options):
    schedule = dataclasses.replace(SHORT, device="cuda:0")
    with pytest.raises(MissingCapabilityError, match="cuda:0 is not available"):
        finetune_detector(*volume, dataclasses.replace(options, schedule=schedule))


def test_a_resume_folder_belongs_to_its_fingerprint(tmp_path):
    out = tmp_path / "x.pt"
    first = ResumeFolder(out, "one")
    assert first.open(resume=True) == 0
    (first.path / "kept").touch()
    first.note(12.5)
    assert ResumeFolder(out, "one").open(resume=True) == 12.5
    with pytest.raises(CheckpointError, match="other settings"):
        ResumeFolder(out, "two").open(resume=True)
    (first.path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        ResumeFolder(out, "one").open(resume=True)
    assert ResumeFolder(out, "two").open(resume=False) == 0
    assert not (first.path / "kept").exists()
