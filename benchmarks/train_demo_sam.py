"""Trains the packaged `tiny` SAM from nothing: on phantoms and on sections 0 to 129 of the CC-BY volume em_fibsem_medulla.

    python benchmarks/train_demo_sam.py --medulla FOLDER --minutes 60 -o dendsam_deploy/weights/sam_tiny.pt

Sections 137 to 166 of the volume are never trained on, so that they can serve as a test. The phantoms that judge a
training use seeds of 9000 and above; the demonstration uses others again.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

from dendsam_deploy.models.sam import build_sam, default_image_size, initialise
from dendsam_deploy.models.weights import TrainingRecord, load_sam, save_sam
from dendsam_deploy.progress import Progress
from dendsam_deploy.training.sam import SamTrainer, SamTrainingOptions, TrainingSource
from dendsam_deploy.training.samples import LabelledVolume, TileRecipe
from dendsam_deploy.volume.array import ArrayVolume
from dendsam_deploy.volume.open import open_labels, open_volume
from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom

log = logging.getLogger("train_demo_sam")

TRAIN_SECTIONS = range(0, 130)
HELD_OUT_SECTIONS = range(137, 167)
PHANTOM_ZOOM = 1.0
MEDULLA_ZOOM = 2.0
PHANTOM_SHAPE = (8, 448, 448)


def main() -> None:
    """Train, keep the best checkpoint, say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medulla", type=Path, required=True, help="folder with raw.tif and neurites.tif")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--phantoms", type=int, default=24, help="training phantoms; half of them densely labelled")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    torch.manual_seed(arguments.seed)
    if arguments.start:
        sam = load_sam(arguments.start).sam
    else:
        sam = build_sam("tiny")
        initialise(sam, torch.Generator().manual_seed(arguments.seed))
    size = default_image_size("tiny")
    with (
        open_volume(arguments.medulla / "raw.tif") as raw,
        open_labels(arguments.medulla / "neurites.tif") as labels,
    ):
        medulla = TrainingSource(
            LabelledVolume(raw, labels, TRAIN_SECTIONS),
            LabelledVolume(raw, labels, HELD_OUT_SECTIONS),
            TileRecipe(size, MEDULLA_ZOOM),
            weight=1.0,
        )
        sources = [phantom_source(arguments.phantoms, dense, size) for dense in (False, True)] + [medulla]
        options = SamTrainingOptions(
            minutes=arguments.minutes,
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
            judge_minutes=6,
            judge_slices=3,
        )
        trained = SamTrainer(sam, sources, options, with_hints=True).run(progress=Reporter(), checkpoint=Keeper(arguments.out))
    save(arguments.out, trained.state, trained.held_out_iou, trained.steps)
    log.info("held-out IoU %.3f after %d steps", trained.held_out_iou, trained.steps)


def phantom_source(count: int, dense: bool, size: int) -> TrainingSource:
    """Make half of the phantoms, of one kind, and two more to judge by."""
    first = 1000 if dense else 2000
    train = [make_phantom(PhantomOptions(PHANTOM_SHAPE, seed=first + i, dense=dense)) for i in range(count // 2)]
    held_out = [make_phantom(PhantomOptions(PHANTOM_SHAPE, seed=9000 + 10 * dense + i, dense=dense)) for i in range(2)]
    volumes = []
    for phantoms in (train, held_out):
        raw = ArrayVolume(np.concatenate([phantom.raw for phantom in phantoms]))
        labels = ArrayVolume(np.concatenate([phantom.labels for phantom in phantoms]))
        volumes.append(LabelledVolume(raw, labels, range(raw.info.shape_zyx[0])))
    return TrainingSource(volumes[0], volumes[1], TileRecipe(size, PHANTOM_ZOOM), weight=0.5)


def save(path: Path, state: dict[str, torch.Tensor], iou: float, steps: int) -> None:
    """Write the checkpoint at half precision, which is exact enough to start from and halves the file."""
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    summary = {
        "data": "synthetic phantoms; em_fibsem_medulla (FlyEM, Janelia; CC-BY), sections 0 to 129",
        "held_out_sections": [HELD_OUT_SECTIONS.start, HELD_OUT_SECTIONS.stop],
        "held_out_iou": iou,
        "steps": steps,
    }
    save_sam(path, half, TrainingRecord("tiny", default_image_size("tiny"), None, None, summary))


class Keeper:
    """Saves the best weights so far whenever the trainer has judged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, state: object) -> None:
        """Save the best weights of a training state."""
        best, history, step = state.best, state.history, state.step  # type: ignore[attr-defined]  # a TrainingState
        save(self.path, best, max(row[2] for row in history), step)
        log.info("judged: %s", [round(row[2], 3) for row in history])


class Reporter:
    """Logs every hundredth step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, progress: Progress) -> None:
        """Log a step."""
        self.calls += 1
        if self.calls % 50 == 1:
            log.info(progress.note)


if __name__ == "__main__":
    main()
