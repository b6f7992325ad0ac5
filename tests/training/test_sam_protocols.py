"""The training loop with either protocol and with parts of the model: what moves, what stays, what is reproduced."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from test_sam_training import SHORT, Recorder, equal, source_of, without_times

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.models.sam import build_sam, initialise
from dendsam_deploy.training.batches import BatchRecipe, draw_batch
from dendsam_deploy.training.launcher import Alone
from dendsam_deploy.training.sam import SamTrainer
from dendsam_deploy.training.samples import LabelledVolume, TileRecipe
from dendsam_deploy.training.source import TrainingSource
from dendsam_deploy.volume.array import ArrayVolume

PUBLISHED = dataclasses.replace(SHORT, protocol="published", steps=2, rounds=3, learning_rate=1e-3, objects_per_tile=2)


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    sam = build_sam("tiny", 64)
    initialise(sam, torch.Generator().manual_seed(0))
    return sam


def trainer_of(start, options, sources=None):
    torch.manual_seed(1)
    return SamTrainer(copy.deepcopy(start), sources or [source_of()], options, with_hints=True)


def changed(start, state):
    return {name for name, value in start.state_dict().items() if not torch.equal(value, state[name])}


def last_state(trainer) -> dict:
    """Train and return the last averaged weights, whether or not they were the best."""
    trainer.run()
    return trainer.averaged_state()


class TestPublished:
    def test_steps_and_seed_decide_the_result(self, start):
        first, second = (trainer_of(start, PUBLISHED).run() for _ in range(2))
        assert equal(first.state, second.state)
        assert without_times(first.history) == without_times(second.history)

    def test_points_and_boxes_take_turns(self, start):
        trainer = trainer_of(start, PUBLISHED)
        assert [trainer._uses_points(step, np.random.default_rng(0)) for step in range(4)] == [True, False, True, False]

    def test_all_four_masks_learn(self, start):
        state = last_state(trainer_of(start, dataclasses.replace(PUBLISHED, steps=6)))
        heads = {name.split("mlps.")[1][0] for name in changed(start, state) if "hypernetworks_mlps" in name}
        assert "0" in heads
        assert heads & {"1", "2", "3"}

    def test_the_mask_prompt_learns_only_where_there_is_one(self, start):
        for fraction in (0.0, 1.0):
            trainer = trainer_of(start, dataclasses.replace(PUBLISHED, mask_fraction=fraction))
            moved = {name for name in changed(start, last_state(trainer)) if "mask_downscaling" in name}
            assert bool(moved) == bool(fraction)

    def test_the_last_weights_are_judged_and_no_average(self, start):
        """But of a young model, whose first steps are large."""
        for is_young in (False, True):
            trainer = SamTrainer(copy.deepcopy(start), [source_of()], PUBLISHED, with_hints=is_young)
            trainer.run()
            last, kept = dict(trainer.sam.named_parameters()), trainer.average.values
            assert all(torch.equal(value, kept[name]) for name, value in last.items()) == (not is_young)

    def test_hints_teach_young_encoders_beside_the_answers(self, start):
        trainer = trainer_of(start, PUBLISHED)
        assert trainer.hints is not None
        before = {name: value.clone() for name, value in trainer.hints.named_parameters()}
        trainer.take_step(0, 0.0)
        assert not any(torch.equal(value, before[name]) for name, value in trainer.hints.named_parameters())
        assert SamTrainer(copy.deepcopy(start), [source_of()], PUBLISHED, with_hints=False).hints is None

    @pytest.mark.parametrize("train", ["whole", "lora"])
    def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(self, start, train):
        options = dataclasses.replace(PUBLISHED, steps=4, judge_steps=2, train=train)
        whole = trainer_of(start, options).run()
        cut = Recorder(stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            trainer_of(start, options).run(cut.progress, checkpoint=cut.keep)
        torch.manual_seed(77)
        again = SamTrainer(build_sam("tiny", 64), [source_of()], options, with_hints=True).run(resume=cut.states[-1])
        assert equal(again.state, whole.state)
        assert without_times(again.history) == without_times(whole.history)
        assert again.first_scores == whole.first_scores


class TestParts:
    def test_a_frozen_encoder_stays_bit_by_bit(self, start):
        state = last_state(trainer_of(start, dataclasses.replace(PUBLISHED, train="decoder")))
        moved = changed(start, state)
        assert moved
        assert not any(name.startswith("image_encoder.") for name in moved)

    def test_adapters_move_the_layers_that_they_adapt_and_no_others(self, start):
        options = dataclasses.replace(PUBLISHED, train="lora", lora_rank=2, steps=6)
        trainer = trainer_of(start, options)
        state = last_state(trainer)
        assert state.keys() == start.state_dict().keys()
        moved = {name for name in changed(start, state) if name.startswith("image_encoder.")}
        assert moved == {
            f"image_encoder.blocks.{block}.{layer}.weight"
            for block in range(8)
            for layer in ("attn.qkv", "mlp.lin1", "mlp.lin2")
        }
        added = (
            state["image_encoder.blocks.3.mlp.lin1.weight"]
            - start.state_dict()["image_encoder.blocks.3.mlp.lin1.weight"]
        )
        assert int(torch.linalg.matrix_rank(added.double(), rtol=1e-3)) <= 2
        frozen = dict(trainer.sam.named_parameters())["image_encoder.blocks.3.mlp.lin1.weight"]
        assert torch.equal(frozen, start.state_dict()["image_encoder.blocks.3.mlp.lin1.weight"])
        assert frozen.grad is None

    def test_merged_weights_score_what_was_judged(self, start):
        trainer = trainer_of(start, dataclasses.replace(PUBLISHED, train="lora", steps=4))
        result = trainer.run()
        trainer.adopt(result.state)
        assert trainer.held_out_iou() == pytest.approx(result.held_out_iou, abs=2e-3)
        plain = copy.deepcopy(start)
        plain.load_state_dict(result.state)
        judge = SamTrainer(plain, [source_of()], SHORT, with_hints=False)
        assert judge.held_out_iou() == pytest.approx(trainer.held_out_iou(), abs=1e-6)
        means = {kind: found.mean() for kind, found in judge.scores().items()}
        assert means["box"] == judge.held_out_iou()
        assert means.keys() == {"box", "jittered", "point"}


class TestBatches:
    def test_accumulated_batches_give_the_mean_gradient(self, start):
        """Two batches of a step, one after the other, against the mean of both by hand."""
        options = dataclasses.replace(SHORT, accumulate=2, point_fraction=0.0)
        trainer = trainer_of(start, options)
        trainer.optimiser = torch.optim.SGD(trainer._trained, lr=0.0)
        trainer.take_step(0, 0.0)
        together = [p.grad.clone() for p in trainer.sam.image_encoder.parameters()]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainer._trained if p.grad is not None])
        assert norm <= 1.0 + 1e-4, "gradients are clipped at 1"
        parts = []
        for part in range(2):
            single = trainer_of(start, options)
            rng = np.random.default_rng([0, 0, part])
            single._uses_points(part, rng)
            single._learn(draw_batch(single.sources, single._recipe(), rng, use_points=False), rng)
            parts.append([p.grad for p in single._trained])
        by_hand = [None if a is None else a + b for a, b in zip(*parts, strict=True)]
        total = torch.nn.utils.get_total_norm([g for g in by_hand if g is not None])
        for ours, expected in zip(together, by_hand, strict=False):
            torch.testing.assert_close(ours, expected / max(float(total), 1.0), rtol=1e-4, atol=1e-7)

    def test_small_objects_are_left_out(self):
        labels = np.zeros((2, 64, 64), np.uint32)
        labels[:, 10:14, 10:14], labels[:, 30:50, 30:50] = 1, 2
        volume = LabelledVolume(ArrayVolume(labels.astype(np.uint8)), ArrayVolume(labels), range(2), least_px=1)
        source = TrainingSource(volume, volume, TileRecipe(64, 1.0, 0.0, 0.0))
        counts = {}
        for least in (1, 100):
            batch = draw_batch([source], BatchRecipe(min_object_px=least), np.random.default_rng(0), use_points=True)
            counts[least] = len(batch.numbers)
        assert counts == {1: 2, 100: 1}

    def test_volumes_without_held_out_slices_only_teach(self, start):
        teaching = dataclasses.replace(source_of(), held_out=None, weight=9.0)
        trainer = trainer_of(start, SHORT, [teaching, source_of()])
        assert len(trainer.judged_tiles) == 1
        assert trainer.run().steps == 4

    def test_half_precision_trains(self, start):
        """On the CPU, where bf16 is possible; the result differs from that at fp32, but not by much."""
        states = {
            precision: last_state(trainer_of(start, dataclasses.replace(PUBLISHED, precision=precision)))
            for precision in ("fp32", "bf16")
        }
        assert all(value.isfinite().all() for value in states["bf16"].values())
        assert all(value.dtype == states["fp32"][name].dtype for name, value in states["bf16"].items())
        assert not equal(states["fp32"], states["bf16"])

    def test_scaled_gradients_are_those_that_were_not_scaled(self, start):
        """What fp16 needs on a GPU, with everything else at fp32: the scale is taken out before clipping."""
        states = []
        for is_scaled in (False, True):
            trainer = trainer_of(start, SHORT)
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=is_scaled)
            states.append(last_state(trainer))
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-7)


class TestStopping:
    def test_patience_ends_a_training_that_gets_no_better(self, start):
        """A rate that destroys the model: nothing is better than an early judgement."""
        options = dataclasses.replace(SHORT, steps=30, judge_steps=1, learning_rate=0.5, patience=3, rate="plateau")
        recorder = Recorder()
        result = trainer_of(start, options).run(checkpoint=recorder.keep)
        scores = [entry.held_out_iou for entry in result.history]
        assert result.stopped_early
        assert len(scores) - 1 - scores.index(max(scores)) == 3
        assert result.steps < 30
        again = trainer_of(start, options).run(resume=recorder.states[-1])
        assert (again.steps, again.stopped_early) == (result.steps, True)

    def test_a_training_that_ran_to_its_end_was_not_stopped(self, start):
        options = dataclasses.replace(SHORT, steps=3, judge_steps=1, learning_rate=0.5, patience=3, rate="plateau")
        result = trainer_of(start, options).run()
        assert (result.steps, result.best_step, result.stopped_early) == (3, 0, False)

    def test_a_training_that_diverges_says_so(self, start):
        trainer = trainer_of(start, dataclasses.replace(SHORT, steps=6))
        for parameter in trainer.sam.mask_decoder.parameters():
            parameter.data.fill_(math.nan)
        with pytest.raises(InvalidArgumentError, match="diverged: the loss of step 1 is nan; lower the learning rate"):
            trainer.run()

    def test_without_patience_it_goes_on(self, start):
        options = dataclasses.replace(SHORT, steps=6, judge_steps=1, learning_rate=0.5)
        result = trainer_of(start, options).run()
        assert (result.steps, result.stopped_early) == (6, False)

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"protocol": "theirs"}, "protocol of a training is 'theirs'; choose one of boxes, published"),
            ({"train": "encoder"}, "choose one of whole, decoder, lora"),
            ({"rate": "linear"}, "choose one of cosine, plateau"),
            ({"precision": "int8"}, "choose one of fp32, bf16, fp16"),
            ({"patience": 0}, "patience of a training is 0"),
            ({"learning_rate": math.inf}, "learning_rate of a training is inf, expected a finite number"),
            ({"lora_rank": 0}, "lora_rank"),
            ({"devices": 0}, "devices"),
            ({"clip_norm": 0.0}, "clip_norm"),
            ({"mask_fraction": 2.0}, "mask_fraction of a training is 2.0, expected 0 to 1"),
            ({"min_object_px": -1.0}, "the least object is -1.0 px"),
            ({"seed": -1}, "the seed of a training is -1, expected 0 or more"),
        ],
    )
    def test_impossible_choices_are_refused(self, changes, part):
        with pytest.raises(InvalidArgumentError, match=part):
            dataclasses.replace(SHORT, **changes)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("protocol", ["boxes", "published"])
def test_on_a_gpu(start, protocol, precision):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = dataclasses.replace(
        PUBLISHED, protocol=protocol, precision=precision, device="cuda", train="lora", checkpointing=True
    )
    trainer = trainer_of(start, options)
    result = trainer.run()
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in result.state.values())


def test_alone_nothing_is_shared():
    team = Alone()
    assert (team.rank, team.size, team.agree("x"), team.mean((1.0, 2.0))) == (0, 1, "x", (1.0, 2.0))
