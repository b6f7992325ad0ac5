"""The detector's training loop: ultralytics' own, told what to do and watched."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError, StorageError
from dendsam_deploy.models.detector import new_trainer, save_detector
from dendsam_deploy.models.detector_file import DetectorRecord
from dendsam_deploy.progress import Progress
from dendsam_deploy.training.detector_data import EpochSampler, RepeatableTiles
from dendsam_deploy.training.detector_judge import judge_tiles
from dendsam_deploy.training.detector_scores import score_boxes
from dendsam_deploy.training.detector_state import STATE_FILE, restore_state, store_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from dendsam_deploy.models.detector import YoloDetector
    from dendsam_deploy.progress import ProgressCallback
    from dendsam_deploy.training.detector_scores import HeldOutScores, SizeClassScores
    from dendsam_deploy.training.detector_tiles import TileAt
    from dendsam_deploy.training.logbook import Logbook
    from dendsam_deploy.training.options import DetectorSchedule

RATE_FROM_SCRATCH, RATE_FROM_WEIGHTS = 2e-3, 5e-4
"""Peak rates for random weights and for those that were trained before."""

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
    "mixup": 0.0,
    "copy_paste": 0.0,
    "auto_augment": None,
    "erasing": 0.0,
}


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
    batch : int
        Tiles of a step.
    held_out : tuple of TileAt
        Tiles that judge every epoch.
    elapsed_s : float
        Time of the schedule that was spent already, on the tiles and by interrupted runs.
    joins_tiles : bool
        Whether tiles are also turned, scaled a little and joined of four while training.
    state : dict or None
        Where an interrupted run stopped, see `detector_state.read_state`.
    closing_s : float
        Time of the schedule to leave for what comes behind the last epoch.
    """

    folder: Path
    tile_size_px: int
    most_boxes: int
    from_scratch: bool
    schedule: DetectorSchedule
    batch: int
    held_out: tuple[TileAt, ...]
    elapsed_s: float
    joins_tiles: bool = True
    state: dict[str, Any] | None = None
    closing_s: float = 0.0

    @property
    def first_epoch(self) -> int | None:
        """How many epochs an interrupted run has finished; None for a new one."""
        return None if self.state is None else int(self.state["epoch"]) + 1

    @property
    def best(self) -> Path:
        """The checkpoint that did best on the held-out tiles."""
        return self.folder / "best.pt"


@dataclass(frozen=True, slots=True)
class TrainedDetector:
    """How many epochs were trained, how the training ended, and whether an interrupted run was continued."""

    epochs: int
    stopped_early: bool
    resumed: bool


def train_detector(
    detector: YoloDetector,
    plan: LoopPlan,
    logbook: Logbook,
    progress: ProgressCallback,
    note_elapsed: Callable[[float], None],
) -> TrainedDetector:
    """Train until the schedule ends; the best checkpoint lies at ``plan.best`` then.

    Parameters
    ----------
    detector : YoloDetector
        Where to start, with a checked description; its class scores are kept only if it knows the same single class.
    plan : LoopPlan
        Tiles and schedule.
    logbook : Logbook
        Gets a row for each epoch; holds those of an interrupted run.
    progress : callable
        Told about every batch.
    note_elapsed : callable
        Given the seconds spent so far after every epoch.

    Raises
    ------
    CheckpointError, MissingCapabilityError, StorageError, UnsafeFileError, VolumeError
        As the classes say.
    """
    watch = _Watch(plan, logbook, progress, note_elapsed)
    if plan.first_epoch is not None and watch.is_over(plan.first_epoch):  # it was interrupted behind its last epoch
        return TrainedDetector(plan.first_epoch, watch.has_lost_patience(), resumed=True)
    with _translated(plan), all_threads():
        is_random = plan.from_scratch or not detector.sha256
        rate = plan.schedule.learning_rate or (RATE_FROM_SCRATCH if is_random else RATE_FROM_WEIGHTS)
        planned = {} if plan.state is None else {"epochs": int(plan.state["epochs"])}
        trainer = new_trainer(training_settings(plan) | planned | {"lr0": rate})
        weights = None if plan.from_scratch else detector.network
        description = copy.deepcopy(detector.network.yaml)  # it is told the new number of classes
        trainer.model = trainer.get_model(cfg=description, weights=weights, verbose=False)
        # Every epoch is judged by the graph that is deployed; so is the best one, elsewhere.
        trainer.validate = lambda: watch.judge(trainer, detector)
        trainer.final_eval = _nothing
        trainer.add_callback("on_pretrain_routine_end", watch.before_training)
        trainer.add_callback("on_train_batch_end", watch.after_batch)
        trainer.add_callback("on_fit_epoch_end", watch.after_epoch)
        trainer.train()
    return TrainedDetector(int(trainer.epoch) + 1, watch.has_lost_patience(), plan.state is not None)


class _Watch:
    """Follows a trainer through its callbacks: reports, keeps time, notes the course, draws each epoch's tiles."""

    def __init__(
        self,
        plan: LoopPlan,
        logbook: Logbook,
        progress: ProgressCallback,
        note_elapsed: Callable[[float], None],
    ) -> None:
        self._plan, self._logbook, self._progress, self._note_elapsed = plan, logbook, progress, note_elapsed
        self._started = time.monotonic() - plan.elapsed_s
        self._batch = 0
        self._held_out = math.nan
        self._is_best = False
        self._trained_until = self._started

    def is_over(self, epochs: int) -> bool:
        """Tell whether nothing is left to train after so many epochs, but for the time."""
        wanted = self._plan.schedule.epochs
        return epochs > 0 and ((wanted is not None and epochs >= wanted) or self.has_lost_patience())

    def has_lost_patience(self) -> bool:
        """Tell whether the last epochs were no better than one before them."""
        patience = self._plan.schedule.patience
        scores = [row["held_out_map50_95"] for row in self._logbook.rows if row["epoch"] > 0]
        return patience is not None and len(scores) > patience and len(scores) - 1 - int(np.argmax(scores)) >= patience

    def before_training(self, trainer: Any) -> None:  # noqa: ANN401 - ultralytics' trainer is untyped
        """Let an epoch be a part of the tiles that depends on the seed alone, and go on where a run stopped."""
        schedule, loader = self._plan.schedule, trainer.train_loader
        tiles = RepeatableTiles(loader.dataset, trainer.args, schedule.seed)
        sampler = EpochSampler(len(tiles), schedule.epoch_tiles, schedule.seed, lambda: int(trainer.epochs))
        object.__setattr__(loader, "dataset", tiles)  # torch forbids it, because it has drawn nothing from it yet
        # ultralytics wraps the sampler of batches in one that repeats for ever.
        loader.batch_sampler.sampler.sampler = sampler
        if self._plan.state is not None:
            restore_state(trainer, self._plan.state)
            sampler.epoch = trainer.start_epoch

    def judge(self, trainer: Any, start: YoloDetector) -> tuple[dict[str, float], float]:  # noqa: ANN401 - as above
        """Judge the averaged weights on the held-out tiles; return the columns of the logbook and what ranks them."""
        averaged = dataclasses.replace(start, network=_published(trainer), image_size_px=self._plan.tile_size_px)
        judged = judge_tiles(averaged, self._plan.held_out, self._plan.tile_size_px, self._plan.schedule.device)
        overall, classes = score_boxes(judged)
        fitness = 0.0 if math.isnan(overall.map50_95) else overall.map50_95
        self._is_best = trainer.best_fitness is None or trainer.best_fitness < fitness
        if self._is_best:
            trainer.best_fitness = fitness
        return score_row(overall, classes), fitness

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
        """Note the score, the time and the state, and see to it that the training ends when it should."""
        now, self._batch = time.monotonic(), 0
        self._held_out = trainer.metrics["held_out_map50"]
        self._logbook.add(_row(trainer, now - self._started))
        if self._plan.schedule.minutes is not None:
            self._replan(trainer, now)
        if self.is_over(trainer.epoch + 1):
            trainer.stop = True
        if self._is_best:
            save_detector(self._plan.best, _published(trainer), DetectorRecord(self._plan.tile_size_px))
        store_state(self._plan.folder / STATE_FILE, trainer)
        self._note_elapsed(now - self._started)

    def _replan(self, trainer: Any, now: float) -> None:  # noqa: ANN401 - as above
        """Say how many epochs fit into the time; ultralytics forgets those before an interruption."""
        run_s = time.time() - trainer.train_time_start
        # When its time is up, ultralytics judges the last epoch, and then the best one is judged again.
        left_s = (
            60 * (self._plan.schedule.minutes or 0) - (now - self._started - run_s) - 2 * (now - self._trained_until)
        )
        trainer.args.time = max(left_s, 1.0) / 3600
        epoch_s = run_s / (trainer.epoch - trainer.start_epoch + 1)
        trainer.epochs = trainer.args.epochs = trainer.start_epoch + math.ceil(max(left_s, 1.0) / epoch_s)
        trainer.stop = run_s > left_s or trainer.epoch >= trainer.epochs


def _row(trainer: Any, elapsed_s: float) -> dict[str, float]:  # noqa: ANN401 - as above
    """Return what an epoch is remembered by."""
    losses = {name.removesuffix("_loss"): float(value) for name, value in (trainer.tloss or {}).items()}
    return {
        "epoch": float(trainer.epoch + 1),
        "elapsed_s": elapsed_s,
        "loss": sum(losses.values()),
        **{f"loss_{name}": value for name, value in losses.items()},
        **trainer.metrics,
        "learning_rate": float(trainer.optimizer.param_groups[0]["lr"]),
    }


def score_row(overall: HeldOutScores, classes: Sequence[SizeClassScores]) -> dict[str, float]:
    """Return scores as columns of the logbook."""
    return {
        "held_out_map50": overall.map50,
        "held_out_map50_95": overall.map50_95,
        "held_out_precision": overall.precision,
        "held_out_recall": overall.recall,
        **{f"map50_{entry.name}": entry.map50 for entry in classes},
        **{f"recall_{entry.name}": entry.recall for entry in classes},
    }


def _published(trainer: Any) -> Any:  # noqa: ANN401 - as above
    """Return a copy of the averaged network as it is written; the loss is no part of a network."""
    network = copy.deepcopy(trainer.ema.ema).eval()
    network.criterion = None
    return network


def _nothing() -> None:
    """Do nothing."""


def training_settings(plan: LoopPlan) -> dict[str, object]:
    """Return what ultralytics is told."""
    schedule = plan.schedule
    on_cpu = schedule.device == "cpu"
    data = plan.folder / "data.yaml"
    data.write_text(f"path: {plan.folder.resolve()}\ntrain: images/train\nval: images/val\nnames: [object]\n", "utf-8")
    settings: dict[str, object] = {
        "model": "a network given as an object.yaml",
        "data": str(data),
        "imgsz": plan.tile_size_px,
        "epochs": schedule.epochs or _FEW_EPOCHS,
        "patience": 0,
        "batch": plan.batch,
        "nbs": plan.batch,
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
        "close_mosaic": 0,  # `EpochSampler` sees to it, so that it can be repeated
    }
    if schedule.minutes is not None:
        left_s = 60 * schedule.minutes * (1 - _LAST_JUDGEMENT_FRACTION) - plan.elapsed_s - plan.closing_s
        settings["time"] = max(left_s, 1.0) / 3600
    return settings | (
        _AUGMENTATION if plan.joins_tiles else dict.fromkeys(_AUGMENTATION, 0.0) | {"auto_augment": None}
    )


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
    except (ValueError, AssertionError) as error:
        raise InvalidArgumentError(f"ultralytics refuses this training: {str(error).splitlines()[0][:160]}") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise MissingCapabilityError(f"the training broke off: {reason}; a smaller batch needs less memory") from error


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Use every core: importing ultralytics reduces torch to one thread where OMP_NUM_THREADS is not set."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
