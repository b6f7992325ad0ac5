"""Trains the packaged `tiny` SAM from nothing on the data of `demo_sources`.

python benchmarks/train_demo_sam.py --medulla FOLDER --minutes 75 -o dendsam_deploy/weights/sam_tiny.pt
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from demo_sources import (
    DATA,
    DEMO_MODEL_PIXEL_NM,
    DEMO_ZOOM,
    HELD_OUT_SECTIONS,
    medulla_source,
    phantom_source,
)

from dendsam_deploy.models.architectures import default_image_size
from dendsam_deploy.models.sam import build_sam, initialise
from dendsam_deploy.models.weights import TrainingRecord, load_sam, save_sam
from dendsam_deploy.training.sam import SamTrainer
from dendsam_deploy.training.sam_options import SamTrainingOptions

if TYPE_CHECKING:
    from dendsam_deploy.progress import Progress
    from dendsam_deploy.training.course import TrainingState

log = logging.getLogger("train_demo_sam")


def main() -> None:
    """Train, keep the best checkpoint, say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medulla", type=Path, required=True, help="folder with raw.tif and neurites.tif")
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--phantoms", type=int, default=12, help="training phantoms of each kind, sparse and dense")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--image-size", type=int, default=default_image_size("tiny"), help="side of the input, px")
    parser.add_argument("--tiles", type=int, default=1, help="tiles a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    size = arguments.image_size
    torch.manual_seed(arguments.seed)
    if arguments.start:
        sam = load_sam(arguments.start, size).sam
    else:
        sam = build_sam("tiny", size)
        initialise(sam, torch.Generator().manual_seed(arguments.seed))
    with medulla_source(arguments.medulla, size) as medulla:
        sources = [
            phantom_source(2000, arguments.phantoms, size, dense=False),
            phantom_source(1000, arguments.phantoms, size, dense=True),
            medulla,
        ]
        options = SamTrainingOptions(
            minutes=arguments.minutes,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
            tiles_per_step=arguments.tiles,
            judge_minutes=6,
            judge_slices=3,
        )
        keep = Keeper(arguments.out, size)
        trained = SamTrainer(sam, sources, options, with_hints=True).run(Reporter(), checkpoint=keep)
    save(arguments.out, trained.state, size, trained.held_out_iou, trained.steps)
    log.info("held-out IoU %.3f after %d steps", trained.held_out_iou, trained.steps)


def save(path: Path, state: dict[str, torch.Tensor], size: int, iou: float, steps: int) -> None:
    """Write the checkpoint at half precision, which is exact enough to start from and halves the file."""
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    held_out = [HELD_OUT_SECTIONS.start, HELD_OUT_SECTIONS.stop]
    summary = {"data": DATA, "held_out_sections": held_out, "held_out_iou": iou, "steps": steps}
    # Trained at many scales; the record names that of the demonstration, since a fine-tuning records its own anyway.
    save_sam(path, half, TrainingRecord("tiny", size, DEMO_MODEL_PIXEL_NM, DEMO_ZOOM, summary))


class Keeper:
    """Saves the best weights so far whenever the trainer has judged."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    def __call__(self, state: TrainingState) -> None:
        """Save the best weights of a training state."""
        save(self.path, state.best, self.size, max(iou for _, _, iou in state.history), state.step)
        log.info("held-out IoU so far: %s", [round(iou, 3) for _, _, iou in state.history])


class Reporter:
    """Logs every fiftieth step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, progress: Progress) -> None:
        """Log a step."""
        self.calls += 1
        if self.calls % 50 == 1:
            log.info(progress.note)


if __name__ == "__main__":
    main()
