"""The decoder against segment_anything's official single-prompt ONNX decoder: how fast, and how right for boxes.

    python benchmarks/against_official_decoder.py
    python benchmarks/against_official_decoder.py --model-type tiny --image-size 128 --repeats 3 -o trial.json

Speed: `segment_anything.utils.onnx.SamOnnxModel`, exported here as its own script exports it (opset 17, one mask), on
ONNX Runtime, called once for each box because it takes one set of prompts; its masks end at the size of the image.
Ours: all boxes, fed as the pipeline feeds them, to logits on regions and on to masks in slice px.

Correctness: masks of `SamPredictor.predict(box=..., multimask_output=False)`, box by box, are the truth. The official
decoder is given a box as its documentation says, two corner points labelled 2 and 3: its `select_masks` counts them as
points and returns one of the three masks for ambiguous prompts. Then with the padding point that brings the right mask
token back, which the predictor does not have for boxes. Besides the weights that are timed, the packaged trained
`tiny` is judged, because masks of random weights say little.

References: github.com/facebookresearch/segment-anything, scripts/export_onnx_model.py, and issue 714.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from against_predictor import OurDecoder
from segment_anything import SamPredictor
from segment_anything.utils.onnx import SamOnnxModel
from side_by_side import (
    VARIANTS,
    Contestant,
    Table,
    our_sessions,
    parser_for,
    phantom_tiles,
    prepare_models,
    write_results,
)

from dendsam_deploy.evaluate.latency_subjects import spread_boxes
from dendsam_deploy.models.weights import load_sam
from dendsam_deploy.pipeline.upsample import upsample_masks
from dendsam_deploy.weights import PACKAGED_SAM

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from segment_anything.modeling import Sam

OFFICIAL = "official ONNX decoder, box by box"
_OPSET = 17
_CORNERS, _PADDING = (2.0, 3.0), -1.0


def main() -> None:
    """Compare, report."""
    arguments = parser_for(__doc__, "against_official_decoder.json").parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        models = prepare_models(arguments, folder)
        size = models.size_px
        boxes = [spread_boxes((size, size), arguments.boxes, seed) for seed in range(VARIANTS)]
        predictor = predictor_of(models.sam, size)
        features = predictor.get_image_embedding().numpy()
        official = OfficialDecoder.exported(models.sam, folder / "official.onnx", features, arguments.threads)
        with our_sessions(models, arguments, table) as sessions:
            ours = {name: OurDecoder(session, features, boxes) for name, session in sessions.items()}
            first = [Contestant(OFFICIAL, lambda turn: [official.mask(box) for box in boxes[turn % VARIANTS]])]
            for work, kind in (("masks of the slice", "masks"), ("logits on regions", "logits")):
                table.compete(
                    f"decode {arguments.boxes} boxes to {work}",
                    [*first, *(Contestant(name, getattr(decoder, kind)) for name, decoder in ours.items())],
                    arguments.repeats,
                    [OFFICIAL],
                )
            table.facts["agreement"] = agreement(predictor, official, ours, boxes[0])
        trained = trained_agreement(folder, arguments.threads, arguments.boxes)
        table.facts["agreement_of_the_packaged_weights"] = trained
    write_results(arguments, __doc__, table, models)
    for weights, found in (("these", table.facts["agreement"]), ("the packaged", trained)):
        for who, of in found.items():
            print(f"{weights} weights, {who}: IoU with the predictor's {of['mean']:.3f}, least {of['least']:.3f}")


@dataclass(frozen=True, slots=True)
class OfficialDecoder:
    """The exported graph, and the embedding that it decodes."""

    session: onnxruntime.InferenceSession
    features: NDArray[np.float32]
    size_px: int

    @classmethod
    def exported(cls, sam: Sam, path: Path, features: NDArray[np.float32], threads: int) -> OfficialDecoder:
        """Export as the official script does."""
        model = SamOnnxModel(sam, return_single_mask=True)
        grid = [4 * side for side in sam.prompt_encoder.image_embedding_size]
        size = sam.image_encoder.img_size
        inputs = {
            "image_embeddings": torch.tensor(features),
            "point_coords": torch.randint(0, size, (1, 5, 2)).float(),
            "point_labels": torch.randint(0, 4, (1, 5)).float(),
            "mask_input": torch.randn(1, 1, *grid),
            "has_mask_input": torch.tensor([1.0]),
            "orig_im_size": torch.tensor([float(size), float(size)]),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                tuple(inputs.values()),
                path,
                opset_version=_OPSET,
                input_names=list(inputs),
                output_names=["masks", "iou_predictions", "low_res_masks"],
                dynamic_axes={"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}},
                dynamo=False,
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return cls(session, features, size)

    def mask(self, box: NDArray[np.float32], *, padded: bool = False) -> NDArray[np.bool_]:
        """Return the mask of one box, at the size of the image."""
        points, labels = box.reshape(2, 2), list(_CORNERS)
        if padded:
            points, labels = np.concatenate([points, np.zeros((1, 2), np.float32)]), [*labels, _PADDING]
        side = 4 * self.features.shape[-1]
        masks = self.session.run(
            ["masks"],
            {
                "image_embeddings": self.features,
                "point_coords": points[None].astype(np.float32),
                "point_labels": np.array([labels], np.float32),
                "mask_input": np.zeros((1, 1, side, side), np.float32),
                "has_mask_input": np.zeros(1, np.float32),
                "orig_im_size": np.array([self.size_px, self.size_px], np.float32),
            },
        )[0]
        mask: NDArray[np.bool_] = masks[0, 0] > 0
        return mask


def predictor_of(sam: Sam, size_px: int) -> Any:  # noqa: ANN401 - untyped in its own package
    """Return segment_anything's predictor with a slice set."""
    predictor = SamPredictor(sam)
    predictor.set_image(np.repeat(phantom_tiles(size_px)[0][..., None], 3, axis=2))
    return predictor


def agreement(
    predictor: Any,  # noqa: ANN401 - untyped in its own package
    official: OfficialDecoder,
    ours: dict[str, OurDecoder],
    boxes: NDArray[np.float32],
) -> dict[str, dict[str, float]]:
    """Return how well the masks of all boxes agree with the predictor's; ours inside the region that is decoded."""
    truth = [predictor.predict(box=box, multimask_output=False)[0][0] for box in boxes]
    found: dict[str, list[float]] = {
        "official, two corners": [iou(official.mask(box), mask) for box, mask in zip(boxes, truth, strict=True)],
        "official, with a padding point": [
            iou(official.mask(box, padded=True), mask) for box, mask in zip(boxes, truth, strict=True)
        ],
    }
    for name, decoder in ours.items():
        windows = upsample_masks(decoder.logits(0), decoder.plan, 0.0)
        found[name] = []
        for upsampled, mask in zip(windows, truth, strict=True):
            inside = mask[upsampled.window.slices]
            found[name].append(iou(upsampled.logits > 0, inside))
    return {who: {"mean": float(np.mean(of)), "least": min(of), "boxes": len(of)} for who, of in found.items()}


def trained_agreement(folder: Path, threads: int, boxes: int) -> dict[str, dict[str, float]]:
    """Judge the official decoder on the packaged weights, which were trained."""
    sam = load_sam(PACKAGED_SAM).sam
    size = sam.image_encoder.img_size
    predictor = predictor_of(sam, size)
    features = predictor.get_image_embedding().numpy()
    official = OfficialDecoder.exported(sam, folder / "trained.onnx", features, threads)
    return agreement(predictor, official, {}, spread_boxes((size, size), boxes))


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Return the intersection over union of two masks; two empty ones agree."""
    union = int((one | other).sum())
    return 1.0 if union == 0 else int((one & other).sum()) / union


if __name__ == "__main__":
    main()
