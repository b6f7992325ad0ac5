"""``finetune_sam`` from files to a checkpoint: what it records, refuses, and goes on from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tifffile
import torch

from dendsam_deploy.errors import CheckpointError, InvalidArgumentError, StorageError, VolumeError
from dendsam_deploy.models.weights import load_sam
from dendsam_deploy.training.finetune import finetune_sam
from dendsam_deploy.training.sam_options import FinetuneSamOptions, SamTrainingOptions

SCHEDULE = SamTrainingOptions(
    minutes=None, steps=3, judge_steps=2, tiles_per_step=1, objects_per_tile=2, judge_slices=1, learning_rate=1e-3
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with eight slices of 72 x 80 px at 40 x 10 x 10 nm: four discs, and a membrane of label 9."""
    folder = tmp_path_factory.mktemp("data")
    y, x = np.mgrid[0:72, 0:80]
    labels = np.zeros((8, 72, 80), np.uint16)
    for number, (row, column) in enumerate(((18, 20), (18, 58), (50, 20), (50, 58)), start=1):
        labels[:, (y - row) ** 2 + (x - column) ** 2 < 13**2] = number
    labels[:, 68:] = 9
    raw = np.where((labels > 0) & (labels < 9), 200, 60) + np.random.default_rng(0).normal(0, 8, labels.shape)
    for name, stack in (("raw", raw.astype(np.uint8)), ("labels", labels), ("other", labels[:, :, 1:])):
        metadata = {"unit": "um", "spacing": 0.04, "axes": "ZYX"}
        tifffile.imwrite(folder / f"{name}.tif", stack, imagej=True, resolution=(100, 100), metadata=metadata)
    tifffile.imwrite(folder / "plain.tif", raw.astype(np.uint8))
    tifffile.imwrite(folder / "empty.tif", np.zeros_like(labels))
    return folder


@pytest.fixture
def options(tmp_path):
    return FinetuneSamOptions(tmp_path / "sam.pt", from_scratch=True, image_size=64, gap=1, schedule=SCHEDULE)


def finetuned(data, options, progress=None, volume="raw", labels="labels"):
    arguments = () if progress is None else (progress,)
    return finetune_sam(data / f"{volume}.tif", data / f"{labels}.tif", options, *arguments)


def weights(path):
    return load_sam(path).sam.state_dict()


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Interruption:
    """Stops a training at its n-th step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.steps_left = step

    def __call__(self, progress) -> None:
        self.steps_left -= progress.stage == "train"
        if self.steps_left == 0:
            raise KeyboardInterrupt


def interrupted(data, options, step=3):
    with pytest.raises(KeyboardInterrupt):
        finetuned(data, options, Interruption(step))


class TestResult:
    def test_the_checkpoint_knows_how_it_came_about(self, data, options):
        result = finetuned(data, dataclasses.replace(options, zoom=0.8, background_labels=(9,)))
        record = load_sam(options.out).record
        assert (record.model_type, record.image_size, record.zoom) == ("tiny", 64, 0.8)
        assert record.model_pixel_size_nm == pytest.approx(10 / 0.8)
        assert record.summary["train_slices"] == [0, 6]
        assert record.summary["held_out_slices"] == [7, 8]
        assert record.summary["volume"] == "raw.tif"
        assert record.summary["held_out_iou"] == result.held_out_iou == max(row[2] for row in result.history)
        assert result.first_held_out_iou == result.history[0][2]
        assert (result.steps, result.resumed) == (3, False)
        assert result.to_document()["out"] == str(options.out)
        assert sorted(entry.name for entry in options.out.parent.iterdir()) == ["sam.pt", "sam.training"]

    def test_pixels_that_are_not_square_have_no_size_to_go_by(self, data, options):
        """Training scales both axes alike, so deployment must go by the zoom."""
        stretched = dataclasses.replace(options, zoom=1.0, voxel_size_nm=(40.0, 4.0, 8.0))
        assert finetuned(data, stretched, volume="plain").model_pixel_size_nm is None

    def test_a_pixel_size_is_not_invented(self, data, options):
        assert finetuned(data, options, volume="plain").model_pixel_size_nm is None

    def test_a_given_voxel_size_counts(self, data, options):
        result = finetuned(data, dataclasses.replace(options, zoom=1.0, voxel_size_nm=(40.0, 7.0, 7.0)), volume="plain")
        assert result.model_pixel_size_nm == 7.0

    def test_the_zoom_brings_typical_objects_to_45_px(self, data, options):
        assert finetuned(data, dataclasses.replace(options, background_labels=(9,))).zoom == 2.0

    def test_the_same_seed_gives_the_same_weights(self, data, options):
        finetuned(data, options)
        first = weights(options.out)
        finetuned(data, options)
        assert equal(weights(options.out), first)

    def test_training_goes_on_from_a_checkpoint_at_another_size(self, data, options, tmp_path):
        finetuned(data, options)
        start = tmp_path / "first.pt"
        options.out.rename(start)
        result = finetuned(data, dataclasses.replace(options, from_scratch=False, start=start, image_size=96))
        assert load_sam(options.out).record.image_size == 96
        assert result.model_type == "tiny"


class TestResume:
    def test_an_interrupted_training_ends_as_an_uninterrupted_one(self, data, options):
        finetuned(data, options)
        whole = weights(options.out)
        options.out.unlink()
        interrupted(data, options)
        assert not options.out.exists()
        result = finetuned(data, options)
        assert result.resumed
        assert equal(weights(options.out), whole)
        assert sorted(entry.name for entry in options.out.parent.iterdir()) == ["sam.pt", "sam.training"]

    def test_other_settings_are_not_mixed_in(self, data, options):
        interrupted(data, options)
        with pytest.raises(CheckpointError, match="other settings or data; repeat those to go on, or start anew"):
            finetuned(data, dataclasses.replace(options, zoom=1.1))
        with pytest.raises(CheckpointError, match="other settings or data"):
            finetuned(data, options, volume="plain")

    def test_starting_anew_forgets_it(self, data, options):
        interrupted(data, options)
        assert not finetuned(data, dataclasses.replace(options, zoom=1.1, resume=False)).resumed

    @pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04 cut off"])
    def test_a_damaged_state_is_named(self, data, options, content):
        state = options.out.with_name(".sam.pt.resume")
        state.write_bytes(content)
        with pytest.raises(CheckpointError, match="interrupted training is damaged; start anew with --no-resume"):
            finetuned(data, options)

    def test_a_state_of_another_shape_is_named(self, data, options):
        torch.save({"settings": "x", "state": [1, 2]}, options.out.with_name(".sam.pt.resume"))
        with pytest.raises(CheckpointError, match="damaged"):
            finetuned(data, options)


class TestRefusals:
    @pytest.mark.parametrize(
        "case",
        [
            ({}, ("raw", "other"), VolumeError, r"other.tif: its shape \(8, 72, 79\) .* differs from \(8, 72, 80\)"),
            ({}, ("raw", "empty"), VolumeError, "empty.tif: no object of 25 px or more in slices 0:6"),
            ({"background_labels": (1, 2, 3, 4, 9)}, ("raw", "labels"), VolumeError, "no object of 25 px"),
            ({"slices": (3, 4)}, ("raw", "labels"), InvalidArgumentError, "at least 3 slices"),
            ({"slices": (3, 40)}, ("raw", "labels"), InvalidArgumentError, "slices 3:40 do not lie in a volume of 8"),
            ({"holdout_fraction": 0.0}, ("raw", "labels"), InvalidArgumentError, "one of them held out"),
            ({"from_scratch": False, "model_type": "vit_b"}, ("raw", "labels"), InvalidArgumentError, "needs weights"),
            ({"image_size": 50}, ("raw", "labels"), InvalidArgumentError, "image size of 50 px is not possible"),
        ],
    )
    def test_inputs_that_do_not_fit(self, data, options, case):
        changes, (volume, labels), error, part = case
        with pytest.raises(error, match=part) as caught:
            finetuned(data, dataclasses.replace(options, **changes), volume=volume, labels=labels)
        assert "\n" not in str(caught.value)
        assert list(options.out.parent.iterdir()) == []

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"zoom": 0.0}, "the zoom is 0.0"),
            ({"zoom": -1.0}, "the zoom is -1.0"),
            ({"zoom": float("nan")}, "the zoom is nan"),
            ({"model_type": "vit_x"}, "unknown model type 'vit_x'; choose one of vit_b"),
        ],
    )
    def test_impossible_options(self, options, changes, part):
        with pytest.raises(InvalidArgumentError, match=part):
            dataclasses.replace(options, **changes)

    def test_two_beginnings(self, options, tmp_path):
        with pytest.raises(InvalidArgumentError, match="from a checkpoint or from scratch, not both"):
            dataclasses.replace(options, start=tmp_path / "x.pt")

    def test_weights_of_another_type(self, data, options, tmp_path):
        finetuned(data, options)
        with pytest.raises(CheckpointError, match="holds a tiny, but vit_b was asked for"):
            finetuned(data, dataclasses.replace(options, from_scratch=False, start=options.out, model_type="vit_b"))

    def test_a_folder_in_the_place_of_the_result(self, data, options):
        options.out.mkdir()
        with pytest.raises(InvalidArgumentError, match="is a folder; name the file to write"):
            finetuned(data, options)

    def test_a_place_that_cannot_be_made(self, data, options, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="folder: cannot be written"):
            finetuned(data, dataclasses.replace(options, out=tmp_path / "file" / "folder" / "sam.pt"))
