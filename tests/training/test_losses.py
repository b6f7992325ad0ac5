"""Losses of SAM's training on examples that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dendsam_deploy.training.averages import MovingAverage
from dendsam_deploy.training.losses import DenseHints, MaskLosses, best_alternative, mask_losses


def test_a_perfect_mask_costs_nothing():
    truth = torch.zeros(1, 8, 8)
    truth[:, 2:6, 2:6] = 1
    losses = mask_losses((truth * 2 - 1) * 40, truth, torch.ones(1))
    assert losses.dice.item() == pytest.approx(0, abs=1e-6)
    assert losses.cross_entropy.item() == pytest.approx(0, abs=1e-6)
    assert losses.iou_error.item() == 0
    assert losses.iou.item() == 1


def test_losses_of_a_half_right_mask():
    """Eight of sixteen cells predicted for certain, a truth of the same eight and eight more."""
    truth, logits = torch.zeros(1, 4, 8), torch.full((1, 4, 8), -60.0)
    truth[:, :2], logits[:, 0] = 1, 60.0
    losses = mask_losses(logits, truth, torch.tensor([0.75]))
    assert losses.iou.item() == 0.5
    assert losses.iou_error.item() == pytest.approx(0.25**2)
    assert losses.dice.item() == pytest.approx(1 - (2 * 8 + 1) / (8 + 16 + 1))
    assert losses.cross_entropy.item() == pytest.approx(8 * 60 / 32)


def test_an_undecided_mask_costs_one_bit_a_cell():
    losses = mask_losses(torch.zeros(2, 4, 4), torch.ones(2, 4, 4), torch.zeros(2))
    assert losses.cross_entropy.tolist() == pytest.approx([math.log(2)] * 2)


def test_the_best_alternative_is_chosen_for_each_object():
    first = MaskLosses(*(torch.tensor(column) for column in ([0.1, 0.9], [1.0, 2.0], [0.2, 0.4], [0.8, 0.1])))
    second = MaskLosses(*(torch.tensor(column) for column in ([0.5, 0.3], [3.0, 4.0], [0.6, 0.0], [0.5, 0.6])))
    best = best_alternative([first, second])
    assert best.dice.tolist() == pytest.approx([0.1, 0.3])
    assert best.cross_entropy.tolist() == [1.0, 4.0]
    assert best.iou_error.tolist() == pytest.approx([0.4, 0.2])
    assert best.iou.tolist() == pytest.approx([0.8, 0.6])


def test_hints_teach_borders_and_centres():
    """A head trained on one embedding predicts its targets; on the background nothing is asked of the offsets."""
    torch.manual_seed(0)
    embeddings, border, offset = torch.randn(1, 16, 4, 4), torch.zeros(1, 16, 16), torch.zeros(1, 2, 16, 16)
    border[:, :, 8], offset[:, 0], inside = 1, 20.0, torch.zeros(1, 16, 16)
    inside[:, :8] = 1
    head = DenseHints(16)
    optimiser = torch.optim.Adam(head.parameters(), 0.02)
    losses = []
    for _ in range(150):
        loss = head(embeddings, border, offset, inside)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    changed = offset.clone()
    changed[:, :, 8:] = -50
    assert head(embeddings, border, changed, inside).item() == head(embeddings, border, offset, inside).item()


def test_an_average_follows_and_forgets_its_beginning():
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 100.0)
    average = MovingAverage(model, decay=0.9)
    torch.nn.init.constant_(model.weight, 1.0)
    for _ in range(100):
        average.update(model)
    assert average.values["weight"].item() == pytest.approx(1.0, abs=0.01)
    with average.swapped_in(model):
        assert model.weight.item() == average.values["weight"].item()
    assert model.weight.item() == 1.0


def test_averages_are_put_back_after_an_error():
    model = torch.nn.Linear(1, 1)
    average = MovingAverage(model)
    torch.nn.init.constant_(model.weight, 7.0)
    with pytest.raises(RuntimeError, match="stop"), average.swapped_in(model):
        raise RuntimeError("stop")
    assert model.weight.item() == 7.0
