"""Encoder and decoder against segment_anything's own predictor, in torch, as it is and compiled.

    python benchmarks/against_predictor.py
    python benchmarks/against_predictor.py --model-type tiny --image-size 128 --repeats 3 --no-compile -o trial.json

Encoding: `SamPredictor.set_image` of an RGB image that needs no resizing, against one call of our encoder graph on the
same grey tile. Decoding of all boxes: `SamPredictor.predict_torch(boxes=..., multimask_output=False)`, which ends with
masks of the size of the image, and, since our decoder ends with logits on regions, also its prompt encoder and mask
decoder alone; against our decoder fed as the pipeline feeds it, in batches of equal region, and that followed by our
interpolation to slice px. "Compiled" is `torch.compile` of the image encoder and of the mask decoder. All in float32
but where a precision is named. How far our logits are from the predictor's is measured on the same boxes.
"""

from __future__ import annotations

import copy
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from segment_anything import SamPredictor
from side_by_side import (
    VARIANTS,
    Contestant,
    Models,
    Table,
    our_sessions,
    parser_for,
    phantom_tiles,
    prepare_models,
    write_results,
)

from dendsam_deploy.evaluate.latency_subjects import spread_boxes
from dendsam_deploy.geometry import cut_regions
from dendsam_deploy.pipeline.decode import BoxDecoder, DecodeOptions, Embeddings, decode_masks
from dendsam_deploy.pipeline.prepare import plan_tiles
from dendsam_deploy.pipeline.upsample import upsample_masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.instances import Masks
    from dendsam_deploy.runtimes.session import Session

EAGER, COMPILED = "segment_anything, torch", "segment_anything, torch.compile"


def main() -> None:
    """Compare, report."""
    parser = parser_for(__doc__, "against_predictor.json")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    arguments = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        models = prepare_models(arguments, Path(folder))
        tiles = phantom_tiles(models.size_px)
        boxes = [spread_boxes((models.size_px,) * 2, arguments.boxes, seed) for seed in range(VARIANTS)]
        predictors = {EAGER: Predictor(models, tiles, boxes)}
        if not arguments.no_compile:
            compile_modules(models, tiles, boxes, predictors, table)
        with our_sessions(models, arguments, table) as sessions, torch.inference_mode():
            encoders = [Contestant(name, predictor.encode) for name, predictor in predictors.items()]
            encoders += [Contestant(name, our_encoder(session, tiles)) for name, session in sessions.items()]
            table.compete("encode a tile", encoders, arguments.repeats, [EAGER, COMPILED])
            features = predictors[EAGER].features()
            ours = {name: OurDecoder(session, features, boxes) for name, session in sessions.items()}
            table.facts["largest_difference_over_std"] = {
                name: predictors[EAGER].difference(decoder, features) for name, decoder in ours.items()
            }
            work = f"decode {arguments.boxes} boxes"
            decoders = [Contestant(name, predictor.predict) for name, predictor in predictors.items()]
            table.compete(
                f"{work} to masks of the slice",
                [*decoders, *(Contestant(name, decoder.masks) for name, decoder in ours.items())],
                arguments.repeats,
                [EAGER, COMPILED],
            )
            decoders = [Contestant(name, predictor.decode) for name, predictor in predictors.items()]
            table.compete(
                f"{work} to logits",
                [*decoders, *(Contestant(name, decoder.logits) for name, decoder in ours.items())],
                arguments.repeats,
                [EAGER, COMPILED],
            )
    write_results(arguments, __doc__, table, models)


class Predictor:
    """segment_anything's predictor on the tiles."""

    def __init__(self, models: Models, tiles: list[NDArray[np.uint8]], boxes: list[NDArray[np.float32]]) -> None:
        self.predictor: Any = SamPredictor(copy.deepcopy(models.sam))
        self.images = [np.repeat(tile[..., None], 3, axis=2) for tile in tiles]
        self.boxes = [torch.tensor(of_image) for of_image in boxes]

    def encode(self, turn: int) -> object:
        """Set an image."""
        return self.predictor.set_image(self.images[turn % VARIANTS])

    def features(self) -> NDArray[np.float32]:
        """Return the embedding of the first image, which from now on is the one that is set."""
        self.encode(0)
        features: NDArray[np.float32] = self.predictor.get_image_embedding().numpy()
        return features

    def predict(self, turn: int) -> object:
        """Predict the masks of all boxes, as a user does."""
        self._have_features()
        boxes = self.predictor.transform.apply_boxes_torch(self.boxes[turn % VARIANTS], self.images[0].shape[:2])
        return self.predictor.predict_torch(None, None, boxes, multimask_output=False)

    def decode(self, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and predicted IoU of all boxes, without bringing them to the size of the image."""
        self._have_features()
        sam = self.predictor.model
        sparse, dense = sam.prompt_encoder(points=None, boxes=self.boxes[turn % VARIANTS], masks=None)
        logits, scores = sam.mask_decoder(
            image_embeddings=self.predictor.features,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return logits, scores

    def difference(self, ours: OurDecoder, features: NDArray[np.float32]) -> float:
        """Return the largest difference of our logits, from the same features, over the standard deviation of these."""
        self.predictor.features = torch.tensor(features)
        reference = self.decode(0)[0][:, 0].numpy()
        found = ours.logits(0)
        worst = 0.0
        for index, logits in enumerate(found.logits):
            region = logits.shape[0] // 4
            expected = cut_regions(reference[index : index + 1], found.origins_yx[index : index + 1], region)[0]
            worst = max(worst, float(np.abs(logits - expected).max()))
        return worst / float(reference.std())

    def _have_features(self) -> None:
        if not self.predictor.is_image_set:
            self.encode(0)


class OurDecoder:
    """Our decoder, fed as the pipeline feeds it."""

    def __init__(self, session: Session, features: NDArray[np.float32], boxes: list[NDArray[np.float32]]) -> None:
        size = session.manifest.preprocessing.tile_size_px
        self.decoder = BoxDecoder(session.decoder, DecodeOptions(session.manifest.decoding))
        self.embeddings = Embeddings(features, np.zeros(1, np.int64))
        self.boxes = boxes
        self.plan = plan_tiles((size, size), session.manifest.preprocessing, None, 1.0)

    def logits(self, turn: int) -> Masks:
        """Return the logits of all boxes on their regions."""
        boxes = self.boxes[turn % VARIANTS]
        first = np.zeros(len(boxes), np.int64)
        return decode_masks(boxes, np.arange(len(boxes)), first, self.embeddings, self.decoder)

    def masks(self, turn: int) -> object:
        """Return the masks of all boxes in slice px."""
        found = upsample_masks(self.logits(turn), self.plan, 0.0)
        return deque((window.logits > 0 for window in found), maxlen=len(self.boxes[0]))


def our_encoder(session: Session, tiles: list[NDArray[np.uint8]]) -> Any:  # noqa: ANN401 - a callable of one number
    """Return a function that encodes a tile."""
    size = tiles[0].shape[0]
    sizes = np.array([[size, size]], np.int64)
    return lambda turn: session.encoder.run({"tiles": tiles[turn % VARIANTS][None], "sizes": sizes})


def compile_modules(
    models: Models,
    tiles: list[NDArray[np.uint8]],
    boxes: list[NDArray[np.float32]],
    predictors: dict[str, Predictor],
    table: Table,
) -> None:
    """Add a predictor whose modules are compiled, if that works here."""
    compiled = Predictor(models, tiles, boxes)
    sam = compiled.predictor.model
    sam.image_encoder = torch.compile(sam.image_encoder)
    sam.mask_decoder = torch.compile(sam.mask_decoder)
    try:
        with torch.inference_mode():
            compiled.encode(0)
            compiled.predict(0)
    except Exception as error:  # the compiler fails in its own ways
        table.missing[COMPILED] = " ".join(str(error).split())[:300]
        return
    predictors[COMPILED] = compiled


if __name__ == "__main__":
    main()
