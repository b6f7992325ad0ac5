"""The published training protocol against training on boxes, with equal CPU time on the same slices.

    python benchmarks/training_protocols.py raw.tif neurites.tif --minutes 20 -o medulla.json
    python benchmarks/training_protocols.py raw.tif neurites.tif --minutes 10 --background-label 249 --protocol boxes

How it is measured. Every protocol trains a model of its own from the same weights, on the same slices, with the options
that `finetune sam` has by default. They take turns in one process: whoever has had the least CPU time goes on for
`--turn` seconds of it. What counts is CPU time of the process during optimiser steps alone (`time.process_time`, all
threads), so a busy machine does not decide; judging counts for nobody, and the learning rate falls with the part of
the time that is used up. At every tenth of the time each model is judged on the held-out block of the training slices,
by exact boxes, and the best of its weights are kept, as `finetune sam` does.

The slices of `--test`, behind a gap, have no part in that. One tile of each is judged at the end: mean IoU of all
objects prompted by their exact boxes, by boxes whose edges are 5 to 15 % off (the same for everybody), and by one point
where the object is thickest, for the starting weights and for what each protocol kept. Differences are those of the
same objects, with an interval that holds the mean in 95 of 100 cases, by resampling slices, not objects, because the
objects of a slice are alike. Neither says how much another seed would differ: repeat with `--seed`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from dendsam_deploy.durable import write_text
from dendsam_deploy.host import cpu_cores, examine_host
from dendsam_deploy.models.architectures import MODEL_TYPES
from dendsam_deploy.models.box_decoder import BoxDecoderGraph
from dendsam_deploy.models.image_encoder import ImageEncoderGraph
from dendsam_deploy.models.sam import build_sam, initialise
from dendsam_deploy.models.weights import load_sam
from dendsam_deploy.training import judge
from dendsam_deploy.training.options import DataOptions
from dendsam_deploy.training.sam import SamTrainer
from dendsam_deploy.training.sam_options import ProtocolName, SamTrainingOptions
from dendsam_deploy.training.samples import LabelledVolume
from dendsam_deploy.training.source import open_sources
from dendsam_deploy.training.volume_list import LabelledPaths
from dendsam_deploy.volume.open import open_labels, open_volume
from dendsam_deploy.weights import PACKAGED_SAM

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from segment_anything.modeling import Sam
    from torch import Tensor

    from dendsam_deploy.training.source import TrainingSource

JUDGEMENTS = 10
GAP = 2
RESAMPLES = 2000

TestTiles = list[judge.JudgedTile]
Scores = dict[str, list["NDArray[np.float64]"]]
"""By kind of prompt, the IoU of the objects of each test tile."""


@dataclass(slots=True)
class Contestant:
    """A protocol in training: its CPU time, its course and its best weights."""

    name: str
    trainer: SamTrainer
    best: dict[str, Tensor]
    cpu_s: float = 0.0
    steps: int = 0
    course: list[dict[str, float]] = field(default_factory=list)

    def train(self, seconds: float, budget_s: float) -> None:
        """Train for some CPU time, at least a step."""
        stop = min(self.cpu_s + seconds, budget_s)
        while self.cpu_s < stop:
            started = time.process_time()
            self.trainer.take_step(self.steps, self.cpu_s / budget_s)
            self.cpu_s += time.process_time() - started
            self.steps += 1

    def judge(self) -> None:
        """Judge the held-out slices, and keep the weights if they are the best."""
        iou = self.trainer.held_out_iou()
        if not self.course or iou >= max(entry["held_out_iou"] for entry in self.course):
            self.best = self.trainer.averaged_state()
        if self.steps:
            self.trainer.rate.judged(iou)
        self.course.append({"cpu_s": self.cpu_s, "steps": self.steps, "held_out_iou": iou})
        print(f"{self.name}: {self.cpu_s:.0f} s, {self.steps} steps, held-out IoU {iou:.3f}", file=sys.stderr)


def main() -> None:
    """Train in turns, judge, write."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    budget_s = 60 * arguments.minutes
    with ExitStack() as stack:
        contestants = [_enter(name, arguments, stack) for name in arguments.protocol]
        test = _test_tiles(arguments, contestants[0].trainer.sources[0])
        start, _ = _model(arguments)
        scores: dict[str, Scores] = {"start": _scores(start, test)}
        for contestant in contestants:
            contestant.judge()
        while behind := [entry for entry in contestants if entry.cpu_s < budget_s]:
            contestant = min(behind, key=lambda entry: entry.cpu_s)
            before = int(JUDGEMENTS * contestant.cpu_s / budget_s)
            contestant.train(arguments.turn, budget_s)
            if int(JUDGEMENTS * contestant.cpu_s / budget_s) > before:
                contestant.judge()
        for contestant in contestants:
            contestant.trainer.adopt(contestant.best)
            scores[contestant.name] = _scores(contestant.trainer.sam, test)
    document = _document(arguments, contestants, scores, test)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out, json.dumps(document, indent=2) + "\n")
    print(json.dumps({key: document[key] for key in ("test", "differences")}, indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU time of each protocol")
    protocols = get_args(ProtocolName)
    parser.add_argument("--protocol", action="append", choices=protocols, help="repeatable  [default: all]")
    parser.add_argument("--slices", type=_range, help="A:B to train and judge on  [default: before --test]")
    parser.add_argument("--test", type=_range, help="A:B that only test  [default: the last 18 %%]")
    parser.add_argument("--background-label", type=int, action="append", default=[])
    parser.add_argument("--model", default="tiny", choices=MODEL_TYPES)
    parser.add_argument("--start", type=Path, help="checkpoint  [default: the packaged weights]")
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--zoom", type=float)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--turn", type=float, default=20.0, help="s of CPU time")
    parser.add_argument("--threads", type=int, default=cpu_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    arguments.protocol = arguments.protocol or list(protocols)
    with open_volume(arguments.volume) as volume:
        depth = volume.info.shape_zyx[0]
    first = depth - max(round(0.18 * depth), 1)
    arguments.test = arguments.test or (first, depth)
    arguments.slices = arguments.slices or (0, arguments.test[0] - GAP)
    if arguments.slices[1] + GAP > arguments.test[0]:
        parser.error(f"the slices to train on end less than {GAP} before those of the test")
    return arguments


def _enter(name: ProtocolName, arguments: argparse.Namespace, stack: ExitStack) -> Contestant:
    """Make a protocol ready; each opens the volume for itself."""
    sam, size = _model(arguments)
    options = DataOptions(
        slices=arguments.slices, zoom=arguments.zoom, background_labels=tuple(arguments.background_label)
    )
    paths = LabelledPaths(arguments.volume, arguments.labels)
    sources = stack.enter_context(open_sources([paths], options, size))
    schedule = SamTrainingOptions(
        minutes=arguments.minutes, protocol=name, learning_rate=arguments.learning_rate, seed=arguments.seed
    )
    torch.manual_seed(arguments.seed)
    trainer = SamTrainer(sam, sources, schedule, with_hints=arguments.model == "tiny")
    return Contestant(name, trainer, trainer.averaged_state())


def _model(arguments: argparse.Namespace) -> tuple[Sam, int]:
    """Return the starting weights and the side of the input, px."""
    if arguments.from_scratch:
        sam = build_sam(arguments.model, arguments.image_size)
        initialise(sam, torch.Generator().manual_seed(arguments.seed))
    else:
        sam = load_sam(arguments.start or PACKAGED_SAM, arguments.image_size).sam
    return sam, int(sam.image_encoder.img_size)


def _test_tiles(arguments: argparse.Namespace, source: TrainingSource) -> TestTiles:
    """Return one tile with objects of each test slice, at the scale of the training."""
    with open_volume(arguments.volume) as image, open_labels(arguments.labels) as labels:
        slices = range(*arguments.test)
        volume = LabelledVolume(image, labels, slices, tuple(arguments.background_label))
        return judge.judged_tiles(volume, source.recipe, len(slices))


def _scores(sam: Sam, test: TestTiles) -> Scores:
    """Return the IoU of all test objects, tile by tile, with every kind of prompt."""
    encoder, decoder = ImageEncoderGraph(sam), BoxDecoderGraph(sam)
    scores = judge.prompted_iou(encoder, decoder, test)
    ends = np.cumsum([len(entry.objects.numbers) for entry in test])[:-1]
    return {kind: list(np.split(found, ends)) for kind, found in scores.items()}


def _document(
    arguments: argparse.Namespace, contestants: list[Contestant], scores: dict[str, Scores], test: TestTiles
) -> dict[str, Any]:
    """Put everything together, without a name or a path of the machine."""
    differences = [
        {"prompt": kind, "of": second, "over": first} | _difference(scores[first][kind], scores[second][kind])
        for kind in judge.PROMPT_KINDS
        for first, second in _pairs(list(scores))
    ]
    return {
        "method": " ".join((__doc__ or "").split()),
        "command": [Path(word).name for word in sys.argv],
        "host": examine_host().to_document(),
        "settings": {
            "volume": arguments.volume.name,
            "train_slices": list(arguments.slices),
            "test_slices": list(arguments.test),
            "minutes_of_cpu": arguments.minutes,
            "model": arguments.model,
            "image_size_px": contestants[0].trainer.sources[0].recipe.tile_size_px,
            "zoom": contestants[0].trainer.sources[0].recipe.zoom,
            "threads": arguments.threads,
            "seed": arguments.seed,
            "torch": torch.__version__,
        },
        "protocols": {
            entry.name: {
                "plan": dataclasses.asdict(entry.trainer.plan),
                "cpu_s": entry.cpu_s,
                "steps": entry.steps,
                "course": entry.course,
            }
            for entry in contestants
        },
        "test": {
            name: {kind: float(np.concatenate(found).mean()) for kind, found in by_kind.items()}
            | {"objects": sum(len(entry.objects.numbers) for entry in test)}
            for name, by_kind in scores.items()
        },
        "differences": differences,
    }


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    return [(first, second) for index, first in enumerate(names) for second in names[index + 1 :]]


def _difference(first: list[NDArray[np.float64]], second: list[NDArray[np.float64]]) -> dict[str, float]:
    """Return the mean gain of the second over the first, object by object, and its interval by resampling slices."""
    gains = [after - before for before, after in zip(first, second, strict=True)]
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(gains), (RESAMPLES, len(gains)))
    means = [np.concatenate([gains[k] for k in draw]).mean() for draw in draws]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"gain": float(np.concatenate(gains).mean()), "low": float(low), "high": float(high)}


def _range(text: str) -> tuple[int, int]:
    first, end = text.split(":")
    return int(first), int(end)


if __name__ == "__main__":
    main()
