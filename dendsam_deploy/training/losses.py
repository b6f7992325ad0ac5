"""What SAM is trained to minimise: errors of masks and of their predicted IoU, and hints for young encoders."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class MaskLosses(NamedTuple):
    """Losses of n masks; every field has shape (n,)."""

    dice: Tensor
    cross_entropy: Tensor
    iou_error: Tensor
    iou: Tensor


class IterativeLosses(NamedTuple):
    """Losses of n objects: Dice of the best mask of each, error of the predicted IoU, IoU of that mask; each (n,)."""

    dice: Tensor
    iou_error: Tensor
    iou: Tensor


def mask_losses(logits: Tensor, target: Tensor, predicted_iou: Tensor) -> MaskLosses:
    """Compare mask logits with the truth.

    Parameters
    ----------
    logits : Tensor, shape (n, h, w)
        Mask logits.
    target : Tensor, shape (n, h, w)
        Part of each cell that the object covers, 0 to 1.
    predicted_iou : Tensor, shape (n,)
        The model's estimate of the IoU.

    Returns
    -------
    MaskLosses
        Soft Dice loss ``1 - (2 sum(p t) + 1) / (sum(p^2) + sum(t^2) + 1)``, mean binary cross entropy, squared error of
        the predicted IoU against the IoU of the binary masks, and that IoU.

    References
    ----------
    Milletari et al. 2016, V-Net, arXiv:1606.04797 (Dice). Archit et al. 2025, micro-sam,
    doi:10.1038/s41592-024-02580-4 (Dice + IoU regression).
    """
    truth, flat = target.flatten(1), logits.flatten(1)
    cross_entropy = functional.binary_cross_entropy_with_logits(flat, truth, reduction="none").mean(1)
    iou = _binary_iou(flat, (truth > 0.5).to(flat.dtype))
    return MaskLosses(_dice_loss(flat, truth, 1.0), cross_entropy, (predicted_iou - iou).square(), iou)


def iterative_losses(logits: Tensor, target: Tensor, predicted_iou: Tensor) -> IterativeLosses:
    """Compare the masks that answer one prompt with the truth, by the loss that DendriteSAM was trained with.

    Parameters
    ----------
    logits : Tensor, shape (n, m, h, w)
        Logits of the m masks of each object, 1 or 3.
    target : Tensor, shape (n, h, w)
        1 in the object, else 0.
    predicted_iou : Tensor, shape (n, m)
        The model's estimate of the IoU of each mask.

    Returns
    -------
    IterativeLosses
        Least soft Dice loss ``1 - 2 sum(p t) / (sum(p^2) + sum(t^2))`` of the masks, mean over the masks of the squared
        error of the predicted IoU, and the IoU of the mask with the least Dice loss.

    References
    ----------
    As of `mask_losses`; micro_sam/training/sam_trainer.py at github.com/computational-cell-analytics/micro-sam.
    """
    flat, truth = logits.flatten(2), target.flatten(1)[:, None]
    dice, iou = _dice_loss(flat, truth, 0.0), _binary_iou(flat, truth)
    least, which = dice.min(1)
    return IterativeLosses(least, (predicted_iou - iou).square().mean(1), iou.gather(1, which[:, None])[:, 0])


def _dice_loss(logits: Tensor, truth: Tensor, smoothing: float) -> Tensor:
    """Return the soft Dice loss ``(...)`` of masks ``(..., p)``; products and sums are dot products, made in one go."""
    probability = logits.sigmoid()
    overlap = 2 * torch.linalg.vecdot(probability, truth) + smoothing
    total = torch.linalg.vecdot(probability, probability) + torch.linalg.vecdot(truth, truth) + smoothing
    loss: Tensor = 1 - overlap / total.clamp(min=1e-7)
    return loss


@torch.no_grad()
def _binary_iou(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the IoU ``(...)`` of masks ``(..., p)``, cut at logit 0, with the truth, 0 or 1."""
    inside = (logits > 0).to(truth.dtype)
    overlap = torch.linalg.vecdot(inside, truth)
    iou: Tensor = overlap / (inside.sum(-1) + truth.sum(-1) - overlap).clamp(min=1)
    return iou


def best_alternative(alternatives: list[MaskLosses]) -> MaskLosses:
    """Choose, per object, the mask of several that fits best.

    Parameters
    ----------
    alternatives : list of MaskLosses
        Losses of the same n objects with different masks.

    Returns
    -------
    MaskLosses
        Those of the mask with the least Dice loss; the errors of the predicted IoU are averaged over all masks, since
        each mask predicts its own.
    """
    if len(alternatives) == 1:
        return alternatives[0]
    best = torch.stack([losses.dice for losses in alternatives]).argmin(0, keepdim=True)
    dice, cross_entropy, _, iou = (torch.stack(column).gather(0, best)[0] for column in zip(*alternatives, strict=True))
    error = torch.stack([losses.iou_error for losses in alternatives]).mean(0)
    return MaskLosses(dice, cross_entropy, error, iou)


class DenseHints(nn.Module):
    """A throw-away head that asks the embedding where borders are and where each pixel's object is centred.

    A mask loss reaches the encoder only through a decoder that at first does not know what a box is. These two dense
    targets give every cell of an untrained encoder a gradient from the first step. The head is not part of the model
    and is never exported.

    References
    ----------
    The centre offsets are those of Neven et al. 2019, "Instance Segmentation by Jointly Optimizing Spatial
    Embeddings", arXiv:1906.11109.
    """

    OFFSET_UNIT_PX = 32.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upscale = nn.ConvTranspose2d(channels, 48, kernel_size=4, stride=4)
        self.predict = nn.Conv2d(48, 3, kernel_size=1)

    def forward(self, embeddings: Tensor, border: Tensor, offset: Tensor, inside: Tensor) -> Tensor:
        """Return the loss of embeddings ``(b, C, g, g)``.

        Parameters
        ----------
        embeddings : Tensor, shape (b, C, g, g)
            Encoder output.
        border : Tensor, shape (b, 4g, 4g)
            1 where a cell holds a border between objects, else 0.
        offset : Tensor, shape (b, 2, 4g, 4g)
            Vector to the centre of the cell's object, tile px.
        inside : Tensor, shape (b, 4g, 4g)
            1 where `offset` means something.
        """
        prediction = self.predict(functional.gelu(self.upscale(embeddings)))
        border_loss = functional.binary_cross_entropy_with_logits(prediction[:, 0], border)
        distance = functional.smooth_l1_loss(
            prediction[:, 1:], (offset / self.OFFSET_UNIT_PX).clamp(-3, 3), reduction="none"
        ).sum(1)
        return border_loss + 0.5 * (distance * inside).sum() / inside.sum().clamp(min=1)
