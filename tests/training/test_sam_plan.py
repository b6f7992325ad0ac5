"""What is planned before a training: memory, presets, defaults of the protocols, learning rates."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.models.image_encoder import ImageEncoderGraph
from dendsam_deploy.models.sam import build_sam
from dendsam_deploy.training import plan as planning
from dendsam_deploy.training.adapters import choose_parts
from dendsam_deploy.training.checkpointing import encoder_blocks, recompute_blocks
from dendsam_deploy.training.memory import free_bytes, step_memory
from dendsam_deploy.training.plan import PRESETS, plan_training
from dendsam_deploy.training.rates import PLATEAU_FACTOR, PLATEAU_PATIENCE, make_rate
from dendsam_deploy.training.sam_options import PROTOCOLS, SamTrainingOptions

OPTIONS = SamTrainingOptions(minutes=None, steps=4)


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return build_sam("tiny", 64).train()


def planned(sam, **changes):
    return plan_training(sam, dataclasses.replace(OPTIONS, **changes), is_young=False)


class TestMemory:
    def test_what_is_counted_without_memory_is_what_autograd_keeps(self, sam):
        """Counted on the CPU by the hooks of a real run, storage by storage."""
        parameters = {p.untyped_storage().data_ptr() for p in sam.parameters()}
        seen, kept = set(), []

        def pack(value):
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen and storage.data_ptr() not in parameters:
                seen.add(storage.data_ptr())
                kept.append(storage.nbytes())
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            embeddings = ImageEncoderGraph(sam)(torch.zeros(1, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
        counted = step_memory(sam)
        assert embeddings.requires_grad
        assert sum(counted.blocks) + counted.rest == pytest.approx(sum(kept), rel=0.05)

    def test_recomputation_and_frozen_parts_need_less(self, sam):
        memory = step_memory(sam)
        assert len(memory.blocks) == 8
        whole = memory.tile(4, checkpointing=False, half=False)
        assert memory.tile(4, checkpointing=True, half=False) < whole
        assert memory.tile(4, checkpointing=False, half=True) < whole
        frozen = build_sam("tiny", 64)
        choose_parts(frozen, "decoder", 4, torch.Generator())
        assert step_memory(frozen).blocks == (0,) * 8
        assert step_memory(frozen).fixed < memory.fixed / 1.5

    def test_this_machine_has_some(self):
        assert free_bytes(torch.device("cpu")) > 1 << 26


class TestRecomputation:
    def test_gradients_stay_what_they_are(self):
        gradients = []
        for twice in (False, True):
            torch.manual_seed(0)
            sam = build_sam("tiny", 64).train()
            if twice:
                recompute_blocks(sam)
            tiles = torch.arange(64 * 64).reshape(1, 64, 64).to(torch.uint8)
            ImageEncoderGraph(sam)(tiles, torch.tensor([[64, 64]])).square().sum().backward()
            gradients.append([p.grad for p in sam.image_encoder.parameters()])
        assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))

    def test_mobile_sam_has_no_such_blocks(self):
        assert encoder_blocks(build_sam("vit_t", 64)) == []


class TestPlan:
    def test_auto_takes_the_largest_preset_that_fits(self, sam, monkeypatch):
        memory = step_memory(sam)
        objects = 25
        needed = {}
        monkeypatch.setattr(planning, "CPU_OBJECTS_AT_ONCE", objects)  # otherwise a CPU takes few with every preset
        for name, rung in PRESETS.items():
            at_once = min(objects, rung.objects_at_once)
            tile = memory.tile(at_once, checkpointing=rung.checkpointing, half=False)
            needed[name] = (memory.fixed + tile) / 0.8
        names = list(PRESETS)
        assert [needed[name] for name in names] == sorted(needed.values(), reverse=True)
        for larger, name in pairwise(names):
            between = int((needed[larger] + needed[name]) / 2)
            monkeypatch.setattr(planning, "free_bytes", lambda _, free=between: free)
            assert planned(sam, protocol="published").preset == name
        monkeypatch.setattr(planning, "free_bytes", lambda _: 1 << 20)
        plan = planned(sam, protocol="published")
        assert plan.preset == "smallest"
        assert "this may not fit" in plan.lines()[-1]

    @pytest.mark.parametrize("name", PRESETS)
    def test_a_preset_that_is_asked_for_is_taken(self, sam, name):
        plan = planned(sam, preset=name, protocol="published")
        assert plan.preset == name
        assert plan.checkpointing == PRESETS[name].checkpointing
        assert plan.objects_at_once == min(8, PRESETS[name].objects_at_once), "a CPU decodes few together"

    def test_what_is_asked_for_goes_before_the_plan(self, sam):
        plan = planned(sam, preset="smallest", checkpointing=False, tiles_per_step=3, accumulate=2, precision="bf16")
        assert (plan.checkpointing, plan.tiles_per_step, plan.accumulate, plan.precision) == (False, 3, 2, "bf16")

    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_protocols_have_their_defaults(self, sam, name):
        plan, defaults = planned(sam, protocol=name), PROTOCOLS[name]
        fields = ("objects_per_tile", "box_jitter", "exact_fraction", "rate", "clip_norm", "average_decay")
        assert all(getattr(plan, field) == getattr(defaults, field) for field in fields)
        assert name in plan.lines()[0]
        young = plan_training(sam, dataclasses.replace(OPTIONS, protocol=name), is_young=True)
        fields = ("learning_rate", "objects_per_tile", "average_decay")
        assert all(getattr(young, field) == getattr(defaults.young, field) for field in fields)

    def test_the_published_protocol_is_the_published_one(self):
        published = PROTOCOLS["published"]
        assert (published.objects_per_tile, published.box_jitter, published.rate) == (25, (0.025, 0.025), "plateau")
        assert (OPTIONS.rounds, OPTIONS.mask_fraction, OPTIONS.min_object_px) == (8, 0.5, 25)
        assert (PLATEAU_FACTOR, PLATEAU_PATIENCE) == (0.9, 3)

    def test_learning_rates(self, sam):
        def rate(is_young, **changes):
            return plan_training(sam, dataclasses.replace(OPTIONS, **changes), is_young=is_young).learning_rate

        assert rate(False) == 1e-5
        assert rate(False, train="lora") == 1e-4
        assert rate(True) == 4e-4
        assert rate(True, protocol="published") == 2e-4
        assert rate(True, learning_rate=0.5) == 0.5

    def test_fp16_is_refused_on_the_cpu(self, sam):
        with pytest.raises(InvalidArgumentError, match="fp16 needs a GPU; choose fp32 or bf16"):
            planned(sam, precision="fp16")


class TestRates:
    def optimiser(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    def test_the_cosine_warms_up_and_ends_at_two_percent(self):
        optimiser = self.optimiser()
        rate = make_rate("cosine", optimiser, 1.0)
        seen = []
        for step, done in ((0, 0.0), (99, 0.0), (500, 0.5), (1000, 1.0)):
            rate.before_step(step, done)
            seen.append(optimiser.param_groups[0]["lr"])
        assert seen == pytest.approx([0.01, 1.0, 0.51, 0.02])

    def test_a_short_schedule_warms_up_for_a_tenth_of_it(self):
        optimiser = self.optimiser()
        rate = make_rate("cosine", optimiser, 1.0)
        rate.before_step(2, 0.05)
        assert optimiser.param_groups[0]["lr"] == pytest.approx(0.5, rel=0.01)
        rate.before_step(5, 0.1)
        assert optimiser.param_groups[0]["lr"] == pytest.approx(0.02 + 0.49 * (1 + math.cos(0.1 * math.pi)))

    def test_the_plateau_waits_and_goes_on_from_its_state(self):
        """The fourth judgement in a row that is no better lowers the rate."""
        optimiser = self.optimiser()
        rate = make_rate("plateau", optimiser, 1.0)
        rates = []
        for score in (0.5, 0.6, 0.6, 0.55, 0.6):
            rate.judged(score)
            rates.append(optimiser.param_groups[0]["lr"])
        assert rates == [1.0] * 5
        again = self.optimiser()
        other = make_rate("plateau", again, 1.0)
        other.restore(rate.state())
        for one, optimiser_ in ((rate, optimiser), (other, again)):
            one.judged(0.6)
            assert optimiser_.param_groups[0]["lr"] == pytest.approx(0.9)
