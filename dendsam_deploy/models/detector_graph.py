"""The deployable detector: raw uint8 tiles in, the best box candidates in tile px out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX

if TYPE_CHECKING:
    from dendsam_deploy.models.detector import YoloDetector

MOST_CANDIDATES = 3840
"""Largest k of TensorRT's TopK layer."""


def candidate_count(tile_size_px: int, anchors: int) -> int:
    """Return how many candidates a tile may have: two for each embedding cell, 2048 for 512 px.

    At the zoom of training a typical object is two cells wide, so that a tile full of them holds a quarter as many
    objects as cells. That leaves eight overlapping candidates for each, about as many as YOLO draws; non-maximum
    suppression of the slice merges them.
    """
    return min(2 * (tile_size_px // EMBEDDING_STRIDE_PX) ** 2, anchors, MOST_CANDIDATES)


class DetectorGraph(nn.Module):
    """A YOLO network with everything that surrounds it: scaling, channels, box arithmetic, choice of the best.

    Overlapping candidates are kept, because duplicates must be removed across tiles anyway.

    Parameters
    ----------
    detector : YoloDetector
        Stays as it is; the graph works on a copy with normalisation folded into the convolutions.
    tile_size_px : int
        Side S of the tiles.
    input_size_px : int, optional
        Side at which the network sees a tile, a multiple of its coarsest stride. The default is the size that it was
        trained on, rounded up to such a multiple.
    max_candidates : int, optional
        Candidates per tile. The default is `candidate_count`.
    compute : torch.dtype
        Type of the convolutions. What places a box is float32: half precision has whole pixels at best by 1024 px.
    """

    def __init__(
        self,
        detector: YoloDetector,
        tile_size_px: int,
        input_size_px: int | None = None,
        max_candidates: int | None = None,
        compute: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.compute = compute
        network: Any = copy.deepcopy(detector.network)
        head = network.model[-1]
        strides = [int(stride) for stride in head.stride]
        size = input_size_px or -(-detector.image_size_px // max(strides)) * max(strides)
        if size % max(strides):
            raise InvalidArgumentError(
                f"the detector's input of {size} px is not a multiple of its stride of {max(strides)} px"
            )
        decoder = _HeadDecoder(head, size, strides)
        network.model[-1] = decoder
        self.network: nn.Module = network.fuse(verbose=False).to(compute)
        decoder.keep_exact()
        self.tile_size_px, self.input_size_px = tile_size_px, size
        self.channels = next(network.parameters()).shape[1]
        anchors = decoder.anchors.shape[1]
        self.candidates = min(max_candidates or candidate_count(tile_size_px, anchors), anchors, MOST_CANDIDATES)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Detect.

        Parameters
        ----------
        tiles : Tensor, shape (b, S, S), uint8
            Grey values.

        Returns
        -------
        boxes : Tensor, shape (b, k, 4), float32
            Corners ``(x0, y0, x1, y1)`` in tile px, inside the tile.
        scores : Tensor, shape (b, k), float32
            Descending.
        """
        image = tiles.float()[:, None] / 255  # converted first: TensorRT does nothing else with uint8
        if self.input_size_px != self.tile_size_px:
            size = (self.input_size_px, self.input_size_px)
            image = functional.interpolate(image, size, mode="bilinear", align_corners=False)
        boxes, scores = self.network(image.expand(-1, self.channels, -1, -1).to(self.compute))
        scores, best = scores.topk(self.candidates, dim=1)
        boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        return (boxes * (self.tile_size_px / self.input_size_px)).clamp(0, self.tile_size_px), scores


class _HeadDecoder(nn.Module):
    """A YOLO head with the arithmetic that turns its output into boxes and scores.

    Each anchor is the centre of a cell of one of the grids. The head predicts its distances to the sides of the box in
    cells, as a distribution over whole numbers where it has one (``dfl``). Of two heads (YOLO26) the one that gives
    several candidates per object is used, where the checkpoint still has it: the other one stops at one.
    """

    anchors: Tensor
    strides: Tensor

    def __init__(self, network_head: nn.Module, input_size_px: int, strides: list[int]) -> None:
        super().__init__()
        head: Any = network_head
        self.f, self.i = head.f, head.i  # the network's own wiring: which layers feed this one, and its number
        self.box_layers: nn.ModuleList = head.cv2 if head.cv2 is not None else head.one2one_cv2
        self.score_layers: nn.ModuleList = head.cv3 if head.cv2 is not None else head.one2one_cv3
        self.distances: nn.Module = head.dfl
        grids = [torch.arange(input_size_px // stride) + 0.5 for stride in strides]
        centres = [torch.stack(torch.meshgrid(grid, grid, indexing="xy")).flatten(1) for grid in grids]
        self.register_buffer("anchors", torch.cat(centres, dim=1))
        self.register_buffer(
            "strides", torch.cat([torch.full((len(g) ** 2,), float(s)) for g, s in zip(grids, strides, strict=True)])
        )

    def keep_exact(self) -> None:
        """Bring what places a box back to float32."""
        self.anchors, self.strides = self.anchors.float(), self.strides.float()
        self.distances.float()

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return boxes (b, N, 4) in px of the network's input and scores (b, N) of their best class."""
        raw = torch.cat([layer(x).flatten(2) for layer, x in zip(self.box_layers, features, strict=True)], dim=2)
        logits = torch.cat([layer(x).flatten(2) for layer, x in zip(self.score_layers, features, strict=True)], dim=2)
        left_top, right_bottom = self.distances(raw.float()).chunk(2, dim=1)
        corners = torch.cat([self.anchors - left_top, self.anchors + right_bottom], dim=1) * self.strides
        return corners.transpose(1, 2), logits.float().amax(dim=1).sigmoid()
