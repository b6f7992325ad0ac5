"""The training loop of SAM on a model and volumes so small that a step takes a moment."""

from __future__ import annotations

import copy
import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from spy_volume import SpyVolume

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError, VolumeError
from dendsam_deploy.models.sam import build_sam, initialise
from dendsam_deploy.training import batches
from dendsam_deploy.training import sam as sam_module
from dendsam_deploy.training.batches import BatchRecipe, draw_batch
from dendsam_deploy.training.sam import SamTrainer
from dendsam_deploy.training.sam_options import SamTrainingOptions
from dendsam_deploy.training.samples import LabelledVolume, TileRecipe
from dendsam_deploy.training.source import TrainingSource
from dendsam_deploy.volume.array import ArrayVolume

SHORT = SamTrainingOptions(minutes=None, steps=4, tiles_per_step=1, objects_per_tile=3, judge_slices=1)


def discs(depth: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return bright discs on dark ground, images and labels, (depth, 80, 80)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:80, 0:80]
    labels = np.zeros((depth, 80, 80), np.uint32)
    for z in range(depth):
        for number, (row, column) in enumerate(((20, 20), (20, 58), (58, 20), (58, 58)), start=1):
            radius = rng.uniform(9, 16)
            labels[z][(y - row) ** 2 + (x - column) ** 2 < radius**2] = number
    image = np.where(labels > 0, 200, 60) + rng.normal(0, 8, labels.shape)
    return image.astype(np.uint8), labels


def source_of(depth: int = 4) -> TrainingSource:
    image, labels = (ArrayVolume(array) for array in discs(depth))
    train, held_out = range(depth - 1), range(depth - 1, depth)
    return TrainingSource(
        LabelledVolume(image, labels, train), LabelledVolume(image, labels, held_out), TileRecipe(64, 0.8)
    )


@pytest.fixture(scope="module")
def start():
    """Return an untrained model; tests train copies of it."""
    torch.manual_seed(0)
    sam = build_sam("tiny", 64)
    initialise(sam, torch.Generator().manual_seed(0))
    return sam


def trainer_of(start, options=SHORT, sources=None, *, with_hints=True) -> SamTrainer:
    torch.manual_seed(1)
    return SamTrainer(copy.deepcopy(start), sources or [source_of()], options, with_hints=with_hints)


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_times(history):
    return [(entry.step, entry.held_out_iou) for entry in history]


class Recorder:
    """Keeps the progress notes and copies of the states of a run; may interrupt it."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes, self.states, self.stop_after = [], [], stop_after

    def progress(self, progress) -> None:
        self.notes.append(progress)
        if len(self.notes) == self.stop_after:
            raise KeyboardInterrupt

    def keep(self, state) -> None:
        self.states.append(copy.deepcopy(state))

    def losses(self) -> list[float]:
        return [float(re.search(r"loss ([\d.]+)", entry.note)[1]) for entry in self.notes]


class TestSchedule:
    def test_steps_and_seed_decide_the_result(self, start):
        first, second = (trainer_of(start).run() for _ in range(2))
        other = trainer_of(start, dataclasses.replace(SHORT, seed=1)).run()
        assert equal(first.state, second.state)
        assert without_times(first.history) == without_times(second.history)
        assert first.steps == 4
        assert not equal(first.state, other.state)

    def test_judgements_come_at_fixed_steps(self, start):
        result = trainer_of(start, dataclasses.replace(SHORT, steps=5, judge_steps=2)).run()
        assert [entry.step for entry in result.history] == [0, 2, 4, 5]

    def test_a_tenth_of_the_steps_lies_between_judgements(self, start):
        result = trainer_of(start, dataclasses.replace(SHORT, steps=11)).run()
        assert [entry.step for entry in result.history] == [0, 2, 4, 6, 8, 10, 11]

    def test_minutes_alone_end_a_training(self, start):
        result = trainer_of(start, dataclasses.replace(SHORT, minutes=0.01, steps=None)).run()
        assert result.seconds >= 0.6
        assert result.steps == result.history[-1].step >= 1

    def test_whichever_comes_first_ends_it(self, start):
        assert trainer_of(start, dataclasses.replace(SHORT, minutes=1000.0, steps=2)).run().steps == 2

    def test_judgements_by_the_clock(self, start):
        options = dataclasses.replace(SHORT, minutes=1000.0, steps=3, judge_minutes=0.0)
        assert [entry.step for entry in trainer_of(start, options).run().history] == [0, 1, 2, 3]

    def test_progress_tells_loss_iou_and_time_left(self, start):
        recorder = Recorder()
        trainer_of(start).run(recorder.progress)
        assert [entry.done for entry in recorder.notes] == [0.25, 0.5, 0.75, 1]
        pattern = r"step \d, loss \d+\.\d{3}, IoU \d\.\d{3}, held-out \d\.\d{3}, \d+\.\d min left"
        assert all(re.fullmatch(pattern, entry.note) for entry in recorder.notes)

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"steps": None}, "training needs an end"),
            ({"steps": 0}, "steps of a training is 0, expected more than 0"),
            ({"minutes": 0.0}, "minutes of a training is 0.0"),
            ({"minutes": math.nan}, "minutes of a training is nan"),
            ({"tiles_per_step": 0}, "tiles_per_step"),
            ({"learning_rate": -1e-4}, "learning_rate"),
            ({"judge_steps": 0}, "judge_steps"),
            ({"point_fraction": 1.1}, "point_fraction of a training is 1.1, expected 0 to 1"),
            ({"box_jitter": (0.2, 0.1)}, "two ascending numbers below 0.5"),
            ({"box_jitter": (0.2, 0.7)}, "two ascending numbers below 0.5"),
        ],
    )
    def test_impossible_options_are_refused(self, changes, part):
        with pytest.raises(InvalidArgumentError, match=part):
            dataclasses.replace(SHORT, **changes)

    @pytest.mark.parametrize(
        ("device", "error"),
        [("gpu", InvalidArgumentError), ("cuda:x", InvalidArgumentError), ("cuda:99", MissingCapabilityError)],
    )
    def test_devices_are_never_replaced(self, start, device, error):
        with pytest.raises(error, match=device):
            trainer_of(start, dataclasses.replace(SHORT, device=device))


class TestResume:
    OPTIONS = dataclasses.replace(SHORT, steps=4, judge_steps=2)

    @pytest.mark.parametrize("with_hints", [True, False])
    def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(self, start, with_hints):
        whole = trainer_of(start, self.OPTIONS, with_hints=with_hints).run()
        cut = Recorder(stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            trainer_of(start, self.OPTIONS, with_hints=with_hints).run(cut.progress, checkpoint=cut.keep)
        state = cut.states[-1]
        assert state.step == 2
        torch.manual_seed(77)  # nothing of the new process's randomness may matter
        trainer = SamTrainer(build_sam("tiny", 64), [source_of()], self.OPTIONS, with_hints=with_hints)
        again = trainer.run(resume=state)
        assert equal(again.state, whole.state)
        assert without_times(again.history) == without_times(whole.history)
        assert again.steps == 4
        assert again.seconds > state.elapsed_s

    def test_a_state_from_between_judgements_is_as_good(self, start, monkeypatch):
        """Kept by time, so that a kill before the first judgement does not cost everything."""
        monkeypatch.setattr(sam_module, "KEEP_AFTER_S", 0.0)
        recorder = Recorder()
        whole = trainer_of(start, self.OPTIONS).run(checkpoint=recorder.keep)
        assert recorder.states[0].step == 1
        again = SamTrainer(build_sam("tiny", 64), [source_of()], self.OPTIONS, with_hints=True)
        result = again.run(resume=recorder.states[0])
        assert equal(result.state, whole.state)
        assert without_times(result.history) == without_times(whole.history)

    def test_a_finished_run_only_hands_its_result_out_again(self, start):
        recorder = Recorder()
        whole = trainer_of(start, self.OPTIONS).run(checkpoint=recorder.keep)
        assert recorder.states[-1].step == 4
        again = trainer_of(start, self.OPTIONS).run(resume=recorder.states[-1])
        assert equal(again.state, whole.state)
        assert without_times(again.history) == without_times(whole.history)

    def test_states_hold_tensors_and_plain_values_only(self, start, tmp_path):
        recorder = Recorder()
        trainer_of(start).run(checkpoint=recorder.keep)
        torch.save(list(recorder.states[-1]), tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert equal(loaded[3], recorder.states[-1].model)


class TestChoice:
    def test_the_best_judged_weights_are_returned(self, start):
        """With a learning rate that destroys the model, later weights are worse than earlier ones."""
        recorder = Recorder()
        options = dataclasses.replace(SHORT, judge_steps=1, learning_rate=0.02)
        result = trainer_of(start, options).run(checkpoint=recorder.keep)
        scores = [entry.held_out_iou for entry in result.history]
        assert result.held_out_iou == max(scores)
        assert result.first_held_out_iou == scores[0]
        last_best = max(index for index, score in enumerate(scores) if score == max(scores))
        if last_best > 0:
            average = recorder.states[last_best - 1].average
            assert all(torch.equal(result.state[name], value) for name, value in average.items())
        else:
            assert equal(result.state, start.state_dict())

    def test_returned_weights_score_what_is_claimed(self, start):
        result = trainer_of(start).run()
        judge = trainer_of(start)
        judge.sam.load_state_dict(result.state)
        judge = SamTrainer(judge.sam, [source_of()], SHORT, with_hints=False)
        assert judge.held_out_iou() == result.held_out_iou


class TestData:
    def test_held_out_slices_never_train_and_others_never_judge(self, start):
        """Both blocks have readers of their own here, which remember what was asked of them."""
        image, labels = discs(6)
        learn, judge = ([SpyVolume(image), SpyVolume(labels)] for _ in range(2))
        source = TrainingSource(
            LabelledVolume(*learn, range(1, 3)), LabelledVolume(*judge, range(4, 6)), TileRecipe(64, 1.0)
        )
        trainer_of(start, dataclasses.replace(SHORT, steps=8, judge_slices=2), [source]).run()
        assert [reader.seen for reader in learn] == [{1, 2}, {1, 2}]
        assert [reader.seen for reader in judge] == [{4, 5}, {4, 5}]

    def test_sources_are_drawn_in_proportion_to_their_weights(self):
        """One volume shows small objects and the other large ones, so a batch tells where it comes from."""
        small, large = np.zeros((2, 64, 64), np.uint32), np.zeros((2, 64, 64), np.uint32)
        small[:, 28:36, 28:36], large[:, 12:52, 12:52] = 1, 1
        recipe = TileRecipe(64, 1.0, 0.0, 0.0)
        sources = []
        for labels, weight in ((small, 1.0), (large, 3.0)):
            volume = LabelledVolume(ArrayVolume(labels.astype(np.uint8)), ArrayVolume(labels), range(2))
            sources.append(TrainingSource(volume, volume, recipe, weight))
        drawn = [
            draw_batch(sources, BatchRecipe(), np.random.default_rng(seed), use_points=False).boxes_xyxy[0]
            for seed in range(200)
        ]
        part = np.mean([box[2] - box[0] > 30 for box in drawn])
        assert 0.65 < part < 0.85

    def test_a_batch_names_the_objects_of_its_tiles(self):
        recipe = BatchRecipe(tiles=3, objects_per_tile=2, exact_fraction=1.0)
        batch = draw_batch([source_of()], recipe, np.random.default_rng(0), use_points=False)
        assert len(batch.tiles) == 3
        assert (np.bincount(batch.tile_index) <= 2).all()
        np.testing.assert_array_equal(batch.prompts, batch.boxes_xyxy)
        for number, tile, box in zip(batch.numbers, batch.tile_index, batch.boxes_xyxy, strict=True):
            rows, columns = np.nonzero(batch.tiles[tile].objects == number)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]

    def test_labels_without_objects_end_in_a_message(self, start, monkeypatch):
        monkeypatch.setattr(batches, "MOST_TILES_DRAWN", 20)
        image, labels = discs(2)
        empty = LabelledVolume(ArrayVolume(image), ArrayVolume(np.zeros_like(labels)), range(2))
        full = LabelledVolume(ArrayVolume(image), ArrayVolume(labels), range(2))
        with pytest.raises(VolumeError, match="hardly any of 20 random tiles shows an object"):
            trainer_of(start, SHORT, [TrainingSource(empty, full, TileRecipe(64, 1.0))]).run()
        with pytest.raises(VolumeError, match="no object to judge by"):
            trainer_of(start, SHORT, [TrainingSource(full, empty, TileRecipe(64, 1.0))])


class TestLearning:
    def test_discs_are_learnt(self, start):
        recorder = Recorder()
        options = dataclasses.replace(SHORT, steps=45, judge_steps=45, learning_rate=2e-3, point_fraction=0.0)
        trainer_of(start, options).run(recorder.progress)
        losses = recorder.losses()  # running means, so the fall of the last step's loss is larger
        assert losses[-1] < 0.85 * losses[0]

    @pytest.mark.parametrize(("fraction", "tokens"), [(0.0, {0}), (1.0, {1, 2, 3})])
    def test_boxes_train_the_first_mask_and_points_the_others(self, start, fraction, tokens):
        options = dataclasses.replace(SHORT, steps=3, point_fraction=fraction, judge_steps=3)
        trainer = trainer_of(start, options)
        trainer.run()
        trained, before = (sam.mask_decoder.output_hypernetworks_mlps for sam in (trainer.sam, start))
        changed = {k for k in range(4) if not torch.equal(trained[k].layers[0].weight, before[k].layers[0].weight)}
        # Of three masks only the best learns, which one depends on the object.
        assert changed == tokens if fraction == 0 else changed and changed <= tokens

    @pytest.mark.cuda
    def test_on_a_gpu(self, start):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        result = trainer_of(start, dataclasses.replace(SHORT, device="cuda")).run()
        assert result.steps == 4
        assert all(value.device.type == "cpu" and value.isfinite().all() for value in result.state.values())
