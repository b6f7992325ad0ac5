"""The original models, executed the way their authors do: what every deployed graph is measured against.

Nothing here is shared with the deployable graphs but the weights. It is slow on purpose: segment_anything and
ultralytics are called as published, one tile at a time.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from segment_anything import SamPredictor
from torch import Tensor, nn
from torch.nn import functional

from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX, LOGIT_STRIDE_PX

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

_BOXES_AT_ONCE = 8  # segment_anything copies the whole embedding for every box


@torch.no_grad()
def encode_tiles(sam: Sam, tiles: Tensor, sizes: Tensor) -> Tensor:
    """Return the embeddings ``(b, 256, S/16, S/16)`` that ``SamPredictor.set_torch_image`` computes for grey tiles.

    Parameters
    ----------
    sam : Sam
        The model.
    tiles : Tensor, shape (b, S, S), uint8
        Grey values.
    sizes : Tensor, shape (b, 2), int64
        Valid height and width of each tile; SAM itself pads what is cut to this size.
    """
    embeddings = []
    for tile, (height, width) in zip(tiles, sizes.tolist(), strict=True):
        image_rgb = tile[:height, :width].expand(1, 3, -1, -1)
        embeddings.append(sam.image_encoder(sam.preprocess(image_rgb)))
    return torch.cat(embeddings)


@torch.no_grad()
def decode_boxes(sam: Sam, embeddings: Tensor, boxes: Tensor, tile_index: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``SamPredictor.predict_torch(boxes=..., multimask_output=False)`` returns for each tile's boxes.

    Parameters
    ----------
    sam : Sam
        The model.
    embeddings : Tensor, shape (b, 256, S/16, S/16), float32
        Of the tiles.
    boxes : Tensor, shape (n, 4), float32
        Corners ``(x0, y0, x1, y1)`` in tile px.
    tile_index : Tensor, shape (n,), int64
        The tile of each box.

    Returns
    -------
    logits : Tensor, shape (n, S/4, S/4), float32
    iou : Tensor, shape (n,), float32
    """
    side = embeddings.shape[-1] * EMBEDDING_STRIDE_PX // LOGIT_STRIDE_PX
    logits = embeddings.new_zeros(boxes.shape[0], side, side)
    iou = embeddings.new_zeros(boxes.shape[0])
    for tile in range(embeddings.shape[0]):
        (of_tile,) = torch.nonzero(tile_index == tile, as_tuple=True)
        for start in range(0, len(of_tile), _BOXES_AT_ONCE):
            members = of_tile[start : start + _BOXES_AT_ONCE]
            sparse, dense = sam.prompt_encoder(points=None, boxes=boxes[members], masks=None)
            masks, scores = sam.mask_decoder(
                image_embeddings=embeddings[tile : tile + 1],
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            logits[members], iou[members] = masks[:, 0], scores[:, 0]
    return logits, iou


@torch.no_grad()
def decode_points(
    sam: Sam, embeddings: Tensor, points: Tensor, labels: Tensor, tile_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what ``SamPredictor.predict_torch(point_coords, point_labels)`` returns without and with multimask output.

    Parameters
    ----------
    sam : Sam
        The model.
    embeddings : Tensor, shape (b, 256, S/16, S/16), float32
        Of the tiles.
    points : Tensor, shape (n, p, 2), float32
        Points ``(x, y)`` in tile px.
    labels : Tensor, shape (n, p), int64
        1 in the object, 0 beside it, -1 padding.
    tile_index : Tensor, shape (n,), int64
        The tile of each prompt.

    Returns
    -------
    logits : Tensor, shape (n, 4, S/4, S/4), float32
    iou : Tensor, shape (n, 4), float32
    """
    predictor = SamPredictor(sam)
    predictor.original_size = predictor.input_size = (sam.image_encoder.img_size,) * 2
    predictor.is_image_set = True
    side = embeddings.shape[-1] * EMBEDDING_STRIDE_PX // LOGIT_STRIDE_PX
    logits, iou = embeddings.new_zeros(points.shape[0], 4, side, side), embeddings.new_zeros(points.shape[0], 4)
    for number, tile in enumerate(tile_index.tolist()):
        predictor.features = embeddings[tile : tile + 1]
        one = slice(number, number + 1)
        for masks, multimask in ((slice(0, 1), False), (slice(1, 4), True)):
            answer = predictor.predict_torch(points[one], labels[one], multimask_output=multimask)
            _, iou[one, masks], logits[one, masks] = answer
    return logits, iou


class OriginalDetector(nn.Module):
    """A YOLO network that decodes its own boxes, neither fused nor rebuilt.

    Parameters
    ----------
    network : DetectionModel
        As ultralytics builds it; copied.
    input_size_px : int
        Side at which the network sees a tile.
    """

    def __init__(self, network: nn.Module, input_size_px: int) -> None:
        super().__init__()
        original: Any = copy.deepcopy(network)
        head = original.model[-1]
        if head.cv2 is not None:
            # The head with several candidates per object, where YOLO26 has two.
            head.end2end = False
        self.network: nn.Module = original
        self.is_end_to_end = bool(head.end2end)
        self.channels = next(original.parameters()).shape[1]
        self.input_size_px = input_size_px

    @torch.no_grad()
    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return all candidates of tiles ``(b, S, S)`` uint8: boxes ``(b, N, 4)`` in tile px and scores ``(b, N)``."""
        scale = self.input_size_px / tiles.shape[-1]
        image = tiles[:, None].expand(-1, self.channels, -1, -1).float() / 255
        if scale != 1:
            size = (self.input_size_px, self.input_size_px)
            image = functional.interpolate(image, size, mode="bilinear", align_corners=False)
        candidates = self.network(image)[0]
        if self.is_end_to_end:
            boxes, scores = candidates[..., :4], candidates[..., 4]
        else:
            centre, size, scores = candidates[:, :2], candidates[:, 2:4], candidates[:, 4:].amax(dim=1)
            boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1).transpose(1, 2)
        return (boxes / scale).clamp(0, tiles.shape[-1]), scores
