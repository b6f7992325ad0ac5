"""A slice against ultralytics' detect-then-SAM loop in torch: the same slice, the same boxes, the same weights.

    python benchmarks/against_ultralytics_loop.py
    python benchmarks/against_ultralytics_loop.py --model-type vit_t --boxes 8 --repeats 1 -o trial.json

The loop is that of `ultralytics.data.annotator.auto_annotate`: `YOLO(image)`, then `SAM(image, bboxes=boxes)`. Ours is
what `segment` does with a slice that is in memory: detecting, encoding, decoding and painting. The slice fills one tile
of 1024 px, which is the only size that ultralytics' SAM knows. Both detectors do all their work and are then answered
for with the same boxes, since random weights find nothing. Weights of SAM are random, of the official layout, and the
same on both sides; the detector is ultralytics' YOLOv8n, likewise random. Its masks end at the size of the image, ours
at a label image in which objects have competed for their pixels. ultralytics brings a grey slice up as three channels.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.update(YOLO_AUTOINSTALL="false", YOLO_OFFLINE="true")  # it otherwise installs packages and calls home

import numpy as np
import torch
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
from ultralytics.models import SAM, YOLO

from dendsam_deploy.evaluate.latency_subjects import spread_detections, with_fixed_boxes
from dendsam_deploy.pipeline.prepare import prepare_slice
from dendsam_deploy.pipeline.segment import SliceOptions, make_recipe, segment_prepared

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dendsam_deploy.instances import Detections
    from dendsam_deploy.runtimes.session import Session

LOOP = "ultralytics, torch"
_SIZE_PX = 1024
_FILE_NAMES = {"vit_b": "sam_b.pt", "vit_l": "sam_l.pt", "vit_h": "sam_h.pt", "vit_t": "mobile_sam.pt"}
"""Names by which ultralytics knows the architecture."""


def main() -> None:
    """Compare, report."""
    parser = parser_for(__doc__, "against_ultralytics_loop.json")
    parser.add_argument("--detector", default="yolov8n.yaml", help="description or checkpoint for ultralytics")
    arguments = parser.parse_args()
    if arguments.model_type not in _FILE_NAMES or arguments.image_size not in (None, _SIZE_PX):
        parser.error(f"ultralytics has {', '.join(_FILE_NAMES)} at {_SIZE_PX} px only")
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = prepare_models(arguments, folder, Path(arguments.detector))
        checkpoint = folder / _FILE_NAMES[arguments.model_type]
        torch.save(models.sam.state_dict(), checkpoint)
        tiles = phantom_tiles(_SIZE_PX)
        recipe = make_recipe((_SIZE_PX, _SIZE_PX), models.bundle.manifest, SliceOptions(zoom=1.0))
        detections = spread_detections(recipe.plan, arguments.boxes)
        loop = Loop(YOLO(arguments.detector), SAM(str(checkpoint)), tiles, detections.boxes_xyxy)
        with our_sessions(models, arguments, table) as sessions:
            contestants = [Contestant(LOOP, loop.segment)]
            contestants += [
                Contestant(name, our_slice(session, tiles, detections)) for name, session in sessions.items()
            ]
            table.compete(f"segment a slice with {arguments.boxes} objects", contestants, arguments.repeats, [LOOP])
            table.facts["masks_of_the_loop"] = loop.masks
    write_results(arguments, __doc__, table, models)


class Loop:
    """Detect, then prompt SAM with the boxes of the image."""

    def __init__(
        self,
        detector: Any,  # noqa: ANN401 - untyped in its own package
        sam: Any,  # noqa: ANN401 - likewise
        tiles: list[NDArray[np.uint8]],
        boxes_xyxy: NDArray[np.float32],
    ) -> None:
        self.detector, self.sam = detector, sam
        self.images = [np.repeat(tile[..., None], 3, axis=2) for tile in tiles]
        self.boxes = torch.tensor(boxes_xyxy)
        self.masks = 0

    def segment(self, turn: int) -> None:
        """Do what `auto_annotate` does with one image, short of writing text files."""
        image = self.images[turn % VARIANTS]
        (found,) = self.detector(image, imgsz=_SIZE_PX, verbose=False, save=False, device="cpu")
        (segmented,) = self.sam(found.orig_img, bboxes=self.boxes, verbose=False, save=False, device="cpu")
        self.masks = len(segmented.masks.data)


def our_slice(session: Session, tiles: list[NDArray[np.uint8]], detections: Detections) -> Callable[[int], object]:
    """Return a function that segments a slice."""
    recipe = make_recipe((_SIZE_PX, _SIZE_PX), session.manifest, SliceOptions(zoom=1.0))
    fixed = with_fixed_boxes(session, recipe.plan, detections)
    return lambda turn: segment_prepared(prepare_slice(tiles[turn % VARIANTS], recipe.plan), fixed, None, recipe)


if __name__ == "__main__":
    main()
