"""The training protocols beside segment_anything's predictor, and beside a plain rewrite of the published one."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch.nn import functional

from dendsam_deploy.models.box_decoder import BoxDecoderGraph
from dendsam_deploy.models.sam import build_sam, initialise
from dendsam_deploy.training.batches import Batch
from dendsam_deploy.training.lessons import BoxLesson, IterativeLesson
from dendsam_deploy.training.losses import iterative_losses, mask_losses
from dendsam_deploy.training.prompted_decoder import PromptedDecoder
from dendsam_deploy.training.prompts import PromptSet, corrective_points
from dendsam_deploy.training.samples import Tile


@pytest.fixture(scope="module")
def sam():
    """Return a model whose parameters all matter: none is zero, so that none can be forgotten unnoticed."""
    torch.manual_seed(0)
    sam = build_sam("tiny", 64)
    initialise(sam, torch.Generator().manual_seed(0))
    for parameter in sam.parameters():
        if parameter.numel() > 1 and parameter.std() == 0:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return sam


@pytest.fixture(scope="module")
def embeddings(sam):
    """Return the embeddings of two tiles."""
    rng = np.random.default_rng(3)
    images = torch.from_numpy(rng.integers(0, 255, (2, 64, 64), dtype=np.uint8))
    with torch.no_grad():
        grey = (images[:, None].float() - sam.pixel_mean) / sam.pixel_std
        return sam.image_encoder(grey)


def predictor_of(sam, embedding):
    """Return segment_anything's predictor with an embedding set by hand."""
    predictor = SamPredictor(sam)
    predictor.original_size, predictor.input_size, predictor.is_image_set = (64, 64), (64, 64), True
    predictor.features = embedding
    return predictor


KINDS = {
    "box": PromptSet(boxes_xyxy=torch.tensor([[8.0, 9, 40, 33], [20, 2, 60, 50], [1, 1, 9, 12]])),
    "point": PromptSet(torch.tensor([[[8.0, 9]], [[30, 31]], [[60, 2]]]), torch.ones(3, 1, dtype=torch.int64)),
    "points": PromptSet(
        torch.tensor([[[8.0, 9], [50, 40], [7, 7]], [[30, 31], [1, 2], [9, 3]], [[60, 2], [3, 3], [4, 40]]]),
        torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0]]),
    ),
}
KINDS["box and points"] = dataclasses.replace(KINDS["points"], boxes_xyxy=KINDS["box"].boxes_xyxy)


class TestDecoder:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("with_mask", [False, True])
    @pytest.mark.parametrize("multimask", [False, True])
    def test_answers_are_the_predictors(self, sam, embeddings, kind, with_mask, multimask):
        prompts = KINDS[kind]
        if with_mask:
            masks = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(5)) * 4
            prompts = dataclasses.replace(prompts, masks=masks)
        tile_index = torch.tensor([0, 1, 1])
        with torch.no_grad():
            answer = PromptedDecoder(BoxDecoderGraph(sam))(embeddings, tile_index, prompts, multimask=multimask)
        for row, tile in enumerate(tile_index.tolist()):
            _, iou, logits = predictor_of(sam, embeddings[tile : tile + 1]).predict_torch(
                None if prompts.points_xy is None else prompts.points_xy[row : row + 1],
                None if prompts.labels is None else prompts.labels[row : row + 1],
                None if prompts.boxes_xyxy is None else prompts.boxes_xyxy[row : row + 1],
                None if prompts.masks is None else prompts.masks[row : row + 1],
                multimask_output=multimask,
                return_logits=True,
            )
            torch.testing.assert_close(answer.logits[row], logits[0], rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(answer.iou[row], iou[0], rtol=1e-4, atol=2e-5)

    def test_the_likeliest_mask_is_that_of_the_highest_predicted_iou(self, sam, embeddings):
        answer = PromptedDecoder(BoxDecoderGraph(sam))(
            embeddings, torch.tensor([0, 1, 1]), KINDS["point"], multimask=True
        )
        chosen = answer.likeliest(answer.logits)
        for row in range(3):
            assert torch.equal(chosen[row], answer.logits[row, int(answer.iou[row].argmax())])
        assert not chosen.requires_grad

    def test_half_precision_stays_near(self, sam, embeddings):
        index = torch.tensor([0, 1, 1])
        with torch.no_grad():
            whole = PromptedDecoder(BoxDecoderGraph(sam))(embeddings, index, KINDS["box and points"], multimask=False)
            half = PromptedDecoder(BoxDecoderGraph(sam), torch.bfloat16)(
                embeddings, index, KINDS["box and points"], multimask=False
            )
        assert half.logits.dtype == torch.float32
        assert not torch.equal(half.logits, whole.logits)
        error = (half.logits - whole.logits).abs().mean() / whole.logits.abs().mean()
        assert error < 0.05


def batch_of(use_points: bool) -> Batch:
    """Return two tiles with two objects on the first and one on the second."""
    rng = np.random.default_rng(1)
    objects = np.zeros((2, 64, 64), np.int32)
    objects[0, 8:30, 10:28], objects[0, 35:60, 30:55], objects[1, 20:50, 5:40] = 1, 2, 1
    tiles = tuple(Tile(rng.integers(0, 255, (64, 64), dtype=np.uint8), labels, (64, 60)) for labels in objects)
    boxes = np.array([[10, 8, 28, 30], [30, 35, 55, 60], [5, 20, 40, 50]], np.float32)
    prompts = np.array([[15, 12], [40, 50], [20, 30]], np.float32) if use_points else boxes
    return Batch(tiles, np.array([1, 2, 1]), np.array([0, 0, 1]), boxes, prompts, use_points)


def gradients(sam):
    return {name: p.grad.clone() for name, p in sam.named_parameters() if p.grad is not None}


def published_loss(sam, embeddings, batch, rounds, seed):
    """Return the published loss, written down plainly on segment_anything's own modules, one object after the other."""
    rng = np.random.default_rng(seed)
    truth, count = batch.object_masks(), len(batch.numbers)
    sizes = np.tile([[64, 60]], (count, 1))
    points = [torch.zeros(0, 2)] * count
    labels = [torch.zeros(0, dtype=torch.int64)] * count
    if batch.use_points:
        points = [torch.from_numpy(batch.prompts[k : k + 1]) for k in range(count)]
        labels = [torch.ones(1, dtype=torch.int64)] * count
    earlier, total = None, 0.0
    for turn in range(rounds):
        masked = rng.random(2) < (0.5 if turn else 0)
        found, kept = [], []
        for k in range(count):
            tile = int(batch.tile_index[k])
            sparse, dense = sam.prompt_encoder(
                points=(points[k][None], labels[k][None]) if len(points[k]) else None,
                boxes=None if batch.use_points else torch.from_numpy(batch.prompts[k : k + 1]),
                masks=earlier[k][None, None] if masked[tile] else None,
            )
            logits, iou = sam.mask_decoder(
                image_embeddings=embeddings[tile : tile + 1],
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=turn == 0 and batch.use_points,
            )
            full = functional.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)[0]
            target = torch.from_numpy(truth[k]).float()
            probability = full.sigmoid()
            overlap = (probability * target).sum((1, 2))
            dice = 1 - 2 * overlap / ((probability**2).sum((1, 2)) + (target**2).sum())
            inside = full > 0
            true_iou = (inside & (target > 0)).sum((1, 2)) / (inside | (target > 0)).sum((1, 2))
            total = total + (dice.min() + ((iou[0] - true_iou) ** 2).mean()) / (count * rounds)
            best = int(iou[0].argmax())
            kept.append(logits[0, best].detach())
            found.append((full[best] > 0).numpy())
        earlier = torch.stack(kept)
        if turn + 1 < rounds:
            more = corrective_points(truth, np.stack(found), sizes, rng)
            points = [torch.cat([old, torch.from_numpy(new)]) for old, new in zip(points, more.points_xy, strict=True)]
            labels = [torch.cat([old, torch.from_numpy(new)]) for old, new in zip(labels, more.labels, strict=True)]
    return total


class TestIterativeLesson:
    @pytest.mark.parametrize("use_points", [True, False])
    def test_loss_and_gradients_are_the_published_ones(self, sam, embeddings, use_points):
        """Of a plain loop over segment_anything's modules that goes back once, from the mean of all rounds."""
        batch = batch_of(use_points)
        theirs, ours = copy.deepcopy(sam), copy.deepcopy(sam)
        inputs = [embeddings.clone().requires_grad_() for _ in range(2)]
        expected = published_loss(theirs, inputs[0], batch, rounds=4, seed=2)
        expected.backward()
        lesson = IterativeLesson(PromptedDecoder(BoxDecoderGraph(ours)), 4, 0.5, objects_at_once=2)
        total = 0.0
        for part in lesson.parts(inputs[1], batch, np.random.default_rng(2)):
            part.loss.backward()
            total += part.loss.item()
        assert total == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=2e-3, atol=1e-6)
        first, second = gradients(theirs), gradients(ours)
        # What is left out is the bias of keys, which the softmax takes out again: its gradient is rounding.
        named = {name for name, value in first.items() if value.abs().max() > 1e-6}
        assert len(named) > 60
        assert named <= second.keys()
        assert any("mask_downscaling" in name for name in named), "no round was given a mask"
        for name in named:
            torch.testing.assert_close(second[name], first[name], rtol=5e-3, atol=2e-6)

    def test_there_are_as_many_rounds_as_asked_for(self, sam, embeddings):
        lesson = IterativeLesson(PromptedDecoder(BoxDecoderGraph(sam)), 8, 0.0)
        parts = list(lesson.parts(embeddings, batch_of(True), np.random.default_rng(0)))
        assert len(parts) == 8
        assert sum(part.weight for part in parts) == pytest.approx(1)

    def test_how_many_are_in_memory_together_changes_nothing(self, sam, embeddings):
        totals = []
        for at_once in (1, 2, 32):
            lesson = IterativeLesson(PromptedDecoder(BoxDecoderGraph(sam)), 3, 0.5, at_once)
            parts = lesson.parts(embeddings, batch_of(False), np.random.default_rng(4))
            totals.append(sum(part.loss.item() for part in parts))
        assert totals == pytest.approx([totals[0]] * 3, rel=1e-5)


class TestIterativeLosses:
    def test_the_best_of_the_masks_counts_and_all_predict_their_iou(self):
        """Truth: 8 of 32 px. One mask is right, one is its opposite, one is twice as large."""
        truth = torch.zeros(1, 4, 8)
        truth[:, 0] = 1
        twice = truth.clone()
        twice[:, 1] = 1
        logits = torch.stack([1 - truth, truth, twice], 1) * 120 - 60
        losses = iterative_losses(logits, truth, torch.tensor([[0.5, 0.5, 1.0]]))
        assert losses.dice.item() == pytest.approx(0, abs=1e-6)
        assert losses.iou.item() == 1
        assert losses.iou_error.item() == pytest.approx((0.25 + 0.25 + 0.25) / 3)

    def test_dice_of_a_half_right_mask(self):
        truth, logits = torch.zeros(1, 4, 8), torch.full((1, 1, 4, 8), -60.0)
        truth[:, :2], logits[:, :, 0] = 1, 60.0
        assert iterative_losses(logits, truth, torch.zeros(1, 1)).dice.item() == pytest.approx(1 - 16 / 24)


def test_a_box_lesson_is_one_part_on_the_regions_of_the_boxes(sam, embeddings):
    """With regions of the whole grid its loss is that of the whole masks."""
    batch, graph = batch_of(False), BoxDecoderGraph(sam)
    (part,) = BoxLesson(graph).parts(embeddings, batch, np.random.default_rng(0))
    with torch.no_grad():
        prompts = PromptSet(boxes_xyxy=torch.from_numpy(batch.boxes_xyxy))
        answer = PromptedDecoder(graph)(embeddings, torch.from_numpy(batch.tile_index), prompts, multimask=False)
    assert graph.grid == 4
    covered = torch.from_numpy(batch.coverage(np.arange(3), np.zeros((3, 2), np.int64), 16))
    losses = mask_losses(answer.logits[:, 0], covered, answer.iou[:, 0])
    assert part.loss.item() == pytest.approx(
        (losses.dice + 2 * losses.cross_entropy + losses.iou_error).mean().item(), rel=1e-4
    )
