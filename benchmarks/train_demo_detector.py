"""Trains the packaged detector from nothing on the data of `demo_sources`, without the densely labelled phantoms.

python benchmarks/train_demo_detector.py --medulla FOLDER --minutes 60 -o dendsam_deploy/weights/detector.pt
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from demo_sources import DATA, DEMO_DETECTION_SCORE, HELD_OUT_SECTIONS, medulla_source, phantom_source

from dendsam_deploy.models.architectures import default_image_size
from dendsam_deploy.models.detector import DetectorRecord, load_detector, save_detector
from dendsam_deploy.training.detector_judge import judge_tiles
from dendsam_deploy.training.detector_loop import LoopPlan, train_detector
from dendsam_deploy.training.detector_plan import plan_batch
from dendsam_deploy.training.detector_scores import score_boxes
from dendsam_deploy.training.detector_tiles import held_out_tiles, training_tiles, write_tiles
from dendsam_deploy.training.logbook import Logbook, logbook_folder
from dendsam_deploy.training.options import DetectorSchedule

if TYPE_CHECKING:
    from dendsam_deploy.progress import Progress

log = logging.getLogger("train_demo_detector")


def main() -> None:
    """Train, write the best checkpoint, say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medulla", type=Path, required=True, help="folder with raw.tif and neurites.tif")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--phantoms", type=int, default=30)
    parser.add_argument("--tiles", type=int, default=480, help="training tiles of either kind")
    parser.add_argument("--start", type=Path, default=Path("yolo11n.yaml"), help="architecture or checkpoint")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--image-size", type=int, default=default_image_size("tiny"), help="side of a tile, px")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    size = arguments.image_size
    schedule = DetectorSchedule(
        arguments.minutes,
        tiles_per_epoch=320,
        patience=None,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    with tempfile.TemporaryDirectory() as name, medulla_source(arguments.medulla, size) as medulla:
        folder = Path(name)
        sources = [phantom_source(3000, arguments.phantoms, size, dense=False), medulla]
        train = [training_tiles([source], arguments.tiles, arguments.seed + i) for i, source in enumerate(sources)]
        boxes = write_tiles(folder, "train", chain(*train))
        held_out = held_out_tiles(sources, 20)
        write_tiles(folder, "val", held_out)
        log.info("%s", boxes.statistics())
        start = load_detector(arguments.start, arguments.seed)
        from_scratch = arguments.start.suffix == ".yaml"
        most = boxes.statistics().most_per_tile
        plan = LoopPlan(
            folder=folder,
            tile_size_px=size,
            most_boxes=most,
            from_scratch=from_scratch,
            schedule=schedule,
            batch=plan_batch(start, size, most, schedule).tiles,
            held_out=tuple(held_out),
            elapsed_s=0.0,
        )
        with Logbook(logbook_folder(arguments.out), vars(arguments), "epoch") as logbook:
            trained = train_detector(start, plan, logbook, Reporter(), note_elapsed)
        best = load_detector(plan.best)
        scores, _ = score_boxes(judge_tiles(best, held_out, size, "cpu"))
        summary = {
            "data": DATA,
            "held_out_sections": [HELD_OUT_SECTIONS.start, HELD_OUT_SECTIONS.stop],
            "epochs": trained.epochs,
            "precision": scores.precision,
            "recall": scores.recall,
            "map50": scores.map50,
        }
        record = DetectorRecord(size, score_threshold=DEMO_DETECTION_SCORE, summary=summary)
        save_detector(arguments.out, best.network, record)
    log.info("%s", scores)


def note_elapsed(seconds: float) -> None:
    """Log the time after an epoch."""
    log.info("%.0f s", seconds)


class Reporter:
    """Logs every twentieth batch."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, progress: Progress) -> None:
        """Log a batch."""
        self.calls += 1
        if self.calls % 20 == 1:
            log.info(progress.note)


if __name__ == "__main__":
    main()
