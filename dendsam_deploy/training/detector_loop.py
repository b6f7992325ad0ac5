"""The detector's training loop: ultralytics' own, told what to do and watched."""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import RandomSampler

from dendsam_deploy.errors import (
    CheckpointError,
    MissingCapabilityError,
    StorageError,
)
from dendsam_deploy.models.detector import new_trainer, read_checkpoint
from dendsam_deploy.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.models.detector import YoloDetector
    from dendsam_deploy.progress import ProgressCallback
    from dendsam_deploy.training.options import DetectorSchedule

_RATE_FROM_SCRATCH, _RATE_FROM_WEIGHTS = 2e-3, 5e-4
_LARGEST_BATCH = 32  # larger ones leave too few steps
_CPU_BATCH = 8
_FEW_EPOCHS = 300  # ultralytics' schedule until it knows how many epochs fit into the time
_LAST_JUDGEMENT_FRACTION = 0.08  # of the time, until it is known how long a judgement takes

# What the tiles already vary (scale, orientation, intensity) is varied little or not at all; there is no colour.
_AUGMENTATION: dict[str, object] = {
    "hsv_h": 0.0,
    "hsv_s": 0.0,
    "hsv_v": 0.0,
    "scale": 0.1,
    "translate": 0.1,
    "flipud": 0.5,
    "fliplr": 0.5,
    "mosaic": 0.5,
    "close_mosaic": 3,
    "mixup": 0.0,
    "copy_paste": 0.0,
    "auto_augment": None,
    "erasing": 0.0,
}


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """Scores of a detector on the held-out tiles.

    Parameters
    ----------
    precision, recall : float
        At `score_threshold`, counting a box as found from an IoU of .5 on.
    map50, map50_95 : float
        Average precision at an IoU of .5, and its mean over .50:.05:.95.
    score_threshold : float
        Least score at which precision and recall balance best (largest F1).
    """

    precision: float
    recall: float
    map50: float
    map50_95: float
    score_threshold: float


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """One training on tiles that lie on disk.

    Parameters
    ----------
    folder : Path
        Holds ``images/train``, ``images/val``, ``labels/train`` and ``labels/val``; checkpoints are written there.
    tile_size_px : int
        Side of the tiles.
    most_boxes : int
        Boxes on the fullest tile.
    from_scratch : bool
        Whether to forget the weights to start from.
    schedule : DetectorSchedule
        Length and steps.
    elapsed_s : float
        Time of the schedule that was spent already, on the tiles and by interrupted runs.
    """

    folder: Path
    tile_size_px: int
    most_boxes: int
    from_scratch: bool
    schedule: DetectorSchedule
    elapsed_s: float

    @property
    def last(self) -> Path:
        """Where an interrupted run stopped."""
        return self.folder / "run" / "weights" / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint that did best on the held-out tiles."""
        return self.folder / "run" / "weights" / "best.pt"


@dataclass(frozen=True, slots=True)
class TrainedDetector:
    """Scores of the best checkpoint, the number of epochs, and whether an interrupted run was continued."""

    scores: HeldOutScores
    epochs: int
    resumed: bool


def train_detector(
    detector: YoloDetector, plan: LoopPlan, progress: ProgressCallback, note_elapsed: Callable[[float], None]
) -> TrainedDetector:
    """Train until the schedule ends; the best checkpoint lies at ``plan.best`` then.

    Parameters
    ----------
    detector : YoloDetector
        Where to start, with a checked description; its class scores are kept only if it knows the same single class.
    plan : LoopPlan
        Tiles and schedule.
    progress : callable
        Told about every batch.
    note_elapsed : callable
        Given the seconds spent so far after every epoch.

    Raises
    ------
    MissingCapabilityError, StorageError, UnsafeFileError, VolumeError
        As the classes say.
    """
    watch = _Watch(plan, progress, note_elapsed)
    resumes = _can_resume(plan)
    with _translated(plan), _all_threads():
        is_random = plan.from_scratch or not detector.sha256
        rate = plan.schedule.learning_rate or (_RATE_FROM_SCRATCH if is_random else _RATE_FROM_WEIGHTS)
        settings = _settings(plan) | {"lr0": rate}
        trainer = new_trainer(settings | ({"resume": str(plan.last)} if resumes else {}))
        if not resumes:
            weights = None if plan.from_scratch else detector.network
            trainer.model = trainer.get_model(cfg=detector.network.yaml, weights=weights, verbose=False)
        measure_batch = trainer.auto_batch
        trainer.auto_batch = lambda: min(measure_batch(), _LARGEST_BATCH)
        trainer.add_callback("on_pretrain_routine_end", watch.before_training)
        trainer.add_callback("on_train_batch_end", watch.after_batch)
        trainer.add_callback("on_fit_epoch_end", watch.after_epoch)
        trainer.train()
    return TrainedDetector(_scores(trainer), int(trainer.epoch) + 1, resumes)


class _Watch:
    """Follows a trainer through its callbacks: reports, keeps time, draws each epoch's tiles."""

    def __init__(self, plan: LoopPlan, progress: ProgressCallback, note_elapsed: Callable[[float], None]) -> None:
        self._plan, self._progress, self._note_elapsed = plan, progress, note_elapsed
        self._started = time.monotonic() - plan.elapsed_s
        self._batch = 0
        self._held_out = math.nan
        self._trained_until = self._started

    def before_training(self, trainer: Any) -> None:  # noqa: ANN401 - ultralytics' trainer is untyped
        """Let an epoch be a random part of the tiles, so that there are judgements often enough."""
        loader = trainer.train_loader
        generator = torch.Generator().manual_seed(self._plan.schedule.seed)
        # ultralytics wraps the sampler of batches in one that repeats for ever.
        batches = loader.batch_sampler.sampler
        batches.sampler = RandomSampler(
            loader.dataset, num_samples=self._plan.schedule.epoch_tiles, generator=generator
        )

    def after_batch(self, trainer: Any) -> None:  # noqa: ANN401 - as above
        """Report."""
        self._batch += 1
        self._trained_until = time.monotonic()
        schedule, elapsed = self._plan.schedule, time.monotonic() - self._started
        batches = len(trainer.train_loader)
        epochs_done = trainer.epoch + min(1.0, self._batch / batches)
        done = max(
            elapsed / (60 * schedule.minutes) if schedule.minutes else 0.0,
            epochs_done / schedule.epochs if schedule.epochs else 0.0,
        )
        loss = sum(float(value) for value in (trainer.tloss or {}).values())
        left_min = elapsed / 60 * (1 - min(1.0, done)) / max(done, 1e-6)
        judged = "" if math.isnan(self._held_out) else f"held-out mAP50 {self._held_out:.3f}, "
        note = f"epoch {trainer.epoch + 1}, loss {loss:.3f}, {judged}{left_min:.1f} min left"
        self._progress(Progress("train detector", min(1.0, done), 1.0, note))

    def after_epoch(self, trainer: Any) -> None:  # noqa: ANN401 - as above
        """Note the score and the time, and see to it that the training ends when it should."""
        now, self._batch = time.monotonic(), 0
        self._held_out = float(trainer.metrics.get("metrics/mAP50(B)", math.nan))
        schedule = self._plan.schedule
        if schedule.epochs is not None and trainer.epoch + 1 >= schedule.epochs:
            trainer.stop = True
        if schedule.minutes is not None:
            # When its time is up, ultralytics judges the last epoch, and then the best one again.
            spent_before_s = now - self._started - (time.time() - trainer.train_time_start)
            left_s = 60 * schedule.minutes - spent_before_s - 2 * (now - self._trained_until)
            trainer.args.time = max(left_s, 1.0) / 3600
        self._note_elapsed(now - self._started)


def _settings(plan: LoopPlan) -> dict[str, object]:
    """Return what ultralytics is told."""
    schedule = plan.schedule
    on_cpu = schedule.device == "cpu"
    batch = schedule.batch or (_CPU_BATCH if on_cpu else -1)
    data = plan.folder / "data.yaml"
    data.write_text(f"path: {plan.folder.resolve()}\ntrain: images/train\nval: images/val\nnames: [object]\n", "utf-8")
    settings: dict[str, object] = {
        "model": "a network given as an object.yaml",
        "data": str(data),
        "imgsz": plan.tile_size_px,
        "epochs": schedule.epochs or _FEW_EPOCHS,
        "patience": 0,
        "batch": batch,
        "nbs": batch if batch > 0 else _LARGEST_BATCH,
        "device": "cpu" if on_cpu else (schedule.device.partition(":")[2] or "0"),
        "optimizer": "AdamW",
        "warmup_epochs": 1.0,
        "warmup_bias_lr": 0.0,
        "max_det": max(300, 2 * plan.most_boxes),
        "seed": schedule.seed,
        "deterministic": True,
        "project": str(plan.folder.resolve()),
        "name": "run",
        "exist_ok": True,
        "pretrained": False,
        "plots": False,
        "verbose": False,
    }
    if schedule.minutes is not None:
        left_s = 60 * schedule.minutes * (1 - _LAST_JUDGEMENT_FRACTION) - plan.elapsed_s
        settings["time"] = max(left_s, 1.0) / 3600
    return settings | _AUGMENTATION


def _can_resume(plan: LoopPlan) -> bool:
    """Tell whether an interrupted run left a checkpoint that can be continued; a kill may have cut it off."""
    if not plan.last.is_file():
        return False
    try:
        content = read_checkpoint(plan.last)
    except CheckpointError:
        return False
    epoch, planned = int(content.get("epoch", -1)), content.get("train_args", {}).get("epochs", 0)
    return 0 <= epoch < int(planned) - 1


def _scores(trainer: Any) -> HeldOutScores:  # noqa: ANN401 - as above
    """Read the last judgement, that of the best checkpoint."""
    box = trainer.validator.metrics.box
    precision, recall, map50, map50_95 = (float(value) for value in box.mean_results())
    # Without a single detection ultralytics keeps empty lists instead of curves. It reads precision and recall where
    # the smoothed curve peaks.
    curve: Any = box.f1_curve
    threshold = float(box.px[_smoothed(curve.mean(0)).argmax()]) if len(curve) and curve.max() > 0 else 0.25
    return HeldOutScores(precision, recall, map50, map50_95, threshold)


def _smoothed(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the moving average over a tenth of a curve, whose ends go on as they are."""
    width = round(len(curve) * 0.2) // 2 + 1
    return np.convolve(np.pad(curve, width // 2, mode="edge"), np.full(width, 1 / width), mode="valid")


@contextlib.contextmanager
def _translated(plan: LoopPlan) -> Iterator[None]:
    """Turn ultralytics' exceptions into ours, and keep its prints away from stdout, which belongs to results."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except OSError as error:
        raise StorageError(
            f"{plan.folder}: training cannot write ({error.strerror or error}); free space and run again to go on"
        ) from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise MissingCapabilityError(f"the training broke off: {reason}; a smaller batch needs less memory") from error


@contextlib.contextmanager
def _all_threads() -> Iterator[None]:
    """Use every core: importing ultralytics reduces torch to one thread where OMP_NUM_THREADS is not set."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
