"""The original torch modules behind the same seam as every engine: the reference that the others are compared with.

This is the only file of this layer that imports torch and `models`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs
from dendsam_deploy.bundle.manifest import GraphSpec, Role
from dendsam_deploy.errors import CheckpointError
from dendsam_deploy.geometry import cut_regions, region_origins
from dendsam_deploy.models.detector import load_detector
from dendsam_deploy.models.detector_graph import DetectorGraph
from dendsam_deploy.models.detector_scale import detector_input_size
from dendsam_deploy.models.reference import OriginalDetector, decode_boxes, decode_points, encode_tiles
from dendsam_deploy.models.weights import load_sam
from dendsam_deploy.runtimes.runner import CallableRunner

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from segment_anything.modeling import Sam

    from dendsam_deploy.bundle.manifest import Manifest

ENGINE = "torch"
"""Name of this engine, as on the command line."""


class TorchRunner(CallableRunner):
    """A graph's contract fulfilled by the original modules in float32 on the CPU."""

    engine = ENGINE


def sam_runners(checkpoint: Path, manifest: Manifest) -> tuple[TorchRunner, TorchRunner]:
    """Return the encoder and the decoder of the SAM that a bundle was exported from.

    Parameters
    ----------
    checkpoint : Path
        The file that the manifest names as source.
    manifest : Manifest
        The bundle's manifest.

    Raises
    ------
    CheckpointError
        Where it is another file than that.
    """
    size = manifest.preprocessing.tile_size_px
    loaded = load_sam(checkpoint, size)
    _check_source(checkpoint, loaded.sha256, "sam", manifest)
    return encoder_runner(loaded.sam), decoder_runner(loaded.sam)


def encoder_runner(sam: Sam) -> TorchRunner:
    """Return SAM's own preprocessing and image encoder as a runner."""

    def encode(inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        embeddings = encode_tiles(sam, torch.tensor(inputs["tiles"]), torch.tensor(inputs["sizes"]))
        return {"embeddings": embeddings.numpy()}

    return TorchRunner(_spec("encoder", sam.image_encoder.img_size), encode)


def decoder_runner(sam: Sam) -> TorchRunner:
    """Return SAM's own prompt encoder and mask decoder as a runner; regions are cut out of whole masks."""

    def decode(inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        tensors = (torch.tensor(inputs[name]) for name in ("embeddings", "boxes", "tile_index"))
        logits, iou = decode_boxes(sam, *tensors)
        cells = inputs["embeddings"].shape[-1]
        region = int(cast("NDArray[np.int64]", inputs["region"])[0])
        origin = region_origins(cast("NDArray[np.float32]", inputs["boxes"]), region, cells)
        return {"logits": cut_regions(logits.numpy(), origin, region), "origin": origin, "iou": iou.numpy()}

    return TorchRunner(_spec("decoder", sam.image_encoder.img_size), decode)


def points_runner(checkpoint: Path, manifest: Manifest) -> TorchRunner:
    """Return SAM's own predictor for points as a runner.

    Raises
    ------
    CheckpointError
        Where it is another file than the one that the manifest names as source.
    """
    loaded = load_sam(checkpoint, manifest.preprocessing.tile_size_px)
    _check_source(checkpoint, loaded.sha256, "sam", manifest)
    names = ("embeddings", "points", "labels", "tile_index")

    def decode(inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        logits, iou = decode_points(loaded.sam, *(torch.tensor(inputs[name]) for name in names))
        return {"logits": logits.numpy(), "iou": iou.numpy()}

    return TorchRunner(_spec("points", loaded.sam.image_encoder.img_size), decode)


def detector_runner(checkpoint: Path, manifest: Manifest) -> TorchRunner:
    """Return the YOLO network that a bundle's detector was exported from, with ultralytics' own box arithmetic.

    Raises
    ------
    CheckpointError
        Where it is another file than the one that the manifest names as source.
    """
    detector = load_detector(checkpoint)
    _check_source(checkpoint, detector.sha256, "detector", manifest)
    size = manifest.preprocessing.tile_size_px
    input_size = detector_input_size(detector, manifest.preprocessing)
    network = OriginalDetector(detector.network, DetectorGraph(detector, size, input_size).input_size_px)

    def detect(inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        boxes, scores = network(torch.tensor(inputs["tiles"]))
        return {"boxes": boxes.numpy(), "scores": scores.numpy()}

    return TorchRunner(_spec("detector", size), detect)


def _spec(role: Role, tile_size_px: int) -> GraphSpec:
    """Describe a runner that has no ONNX file."""
    return GraphSpec(
        role=role,
        precision="fp32",
        opset=0,
        files=(),
        inputs=graph_inputs(role, tile_size_px),
        outputs=graph_outputs(role, tile_size_px),
    )


def _check_source(checkpoint: Path, sha256: str, role: str, manifest: Manifest) -> None:
    """Raise unless a checkpoint is the one that a bundle was exported from."""
    source = next((source for source in manifest.sources if source.role == role), None)
    if source is None or source.checkpoint.sha256 != sha256:
        wanted = "none" if source is None else f"{source.checkpoint.file}, SHA-256 {source.checkpoint.sha256[:12]}..."
        raise CheckpointError(
            f"{checkpoint}: has the SHA-256 {sha256[:12] or 'of no file'}..., but the bundle {manifest.name!r} was "
            f"exported from {wanted}; give that file"
        )
