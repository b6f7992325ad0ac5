"""`finetune sam`: from labelled volumes on disk to a checkpoint on disk, resumable."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch

from dendsam_deploy.durable import prepare_place
from dendsam_deploy.errors import CheckpointError, InvalidArgumentError
from dendsam_deploy.models.sam import build_sam, initialise
from dendsam_deploy.models.weights import TrainingRecord, load_sam, save_sam
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.training.boxes import slices_text
from dendsam_deploy.training.course import TrainedSam, TrainingState
from dendsam_deploy.training.judge import Judgement
from dendsam_deploy.training.launcher import Alone, Team, run_in_team
from dendsam_deploy.training.logbook import Logbook, logbook_folder
from dendsam_deploy.training.pseudo import TrueLabels, open_pseudo_sources
from dendsam_deploy.training.resume import ResumeFile, training_fingerprint
from dendsam_deploy.training.sam import SamTrainer
from dendsam_deploy.training.sam_story import FinalScores, history_row, sam_story
from dendsam_deploy.training.source import hulls, open_sources, recorded_scale
from dendsam_deploy.training.volume_list import training_volumes
from dendsam_deploy.weights import PACKAGED_SAM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from dendsam_deploy.models.architectures import ModelType
    from dendsam_deploy.training.plan import TrainingPlan
    from dendsam_deploy.training.sam_options import FinetuneSamOptions, SamTrainingOptions
    from dendsam_deploy.training.source import TrainingSource
    from dendsam_deploy.training.story import TrainingStory
    from dendsam_deploy.training.volume_list import LabelledPaths


@dataclass(frozen=True, slots=True)
class FinetunedSam:
    """Result of a fine-tuning.

    Parameters
    ----------
    out, model_type, zoom, model_pixel_size_nm
        Of the checkpoint.
    train_slices, held_out_slices : (int, int)
        From where to where slices train and judge in the first volume that does both.
    first_held_out_iou, held_out_iou : float
        Mean IoU over held-out objects prompted by their exact boxes, before training and of the written weights.
    first_scores, scores : dict
        The same by kind of prompt: ``box``, ``jittered`` (boxes 5 to 15 % off), ``point``.
    best_step, steps : int
        After which step the written weights were, and how many there were.
    seconds : float
        Time of this run and of those that it went on from.
    resumed, stopped_early : bool
        Whether it went on from an interrupted run, and whether its patience ended it.
    plan : dict
        What was chosen where nothing was asked for, see `plan.TrainingPlan`.
    history : tuple
        Of each judgement step, seconds, held-out IoU, running means of loss and IoU in training, learning rate.
    logbook : str
        Folder with the course of the training.
    story : TrainingStory
        What a report tells; not part of the document.
    """

    out: str
    model_type: ModelType
    zoom: float
    model_pixel_size_nm: float | None
    train_slices: tuple[int, int]
    held_out_slices: tuple[int, int]
    first_held_out_iou: float
    held_out_iou: float
    first_scores: dict[str, float]
    scores: dict[str, float]
    best_step: int
    steps: int
    seconds: float
    resumed: bool
    stopped_early: bool
    plan: dict[str, Any]
    history: tuple[tuple[Any, ...], ...]
    logbook: str
    story: TrainingStory = field(repr=False)

    def to_document(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "story"}


def finetune_sam(
    volume_path: Path | None,
    labels_path: Path | None,
    options: FinetuneSamOptions,
    progress: ProgressCallback = no_progress,
) -> FinetunedSam:
    """Fine-tune a SAM on a labelled volume and write the best checkpoint.

    Parameters
    ----------
    volume_path, labels_path : Path or None
        Image and instance labels of the same shape; None where `options.data` names what to train on.
    options : FinetuneSamOptions
        See there.
    progress : callable
        Told, in the stage ``plan``, what was chosen, one record for each line, and then about every step.

    Raises
    ------
    InvalidArgumentError, VolumeError, CheckpointError, MissingCapabilityError, StorageError
        As the classes say; nothing is written then but the state to resume from.
    IncompleteRunError
        If one of several processes died.
    """
    volumes = training_volumes(volume_path, labels_path, options.data)
    prepare_place(options.out)
    schedule = options.schedule
    if schedule.devices == 1:
        return _train(Alone(), progress, volumes, options)
    if ":" in schedule.device:
        raise InvalidArgumentError(
            f"{schedule.device} names one GPU, but {schedule.devices} devices were asked for; choose cuda or one device"
        )
    result: FinetunedSam = run_in_team(_train, (volumes, options), options.schedule, progress)
    return result


def _train(
    team: Team,
    progress: ProgressCallback,
    volumes: tuple[LabelledPaths, ...],
    options: FinetuneSamOptions,
) -> FinetunedSam:
    """Train in one process of a team; the first one writes."""
    torch.manual_seed(options.schedule.seed)
    sam, image_size, digest = _starting_model(options)
    with ExitStack() as stack:
        least_px = options.schedule.min_object_px
        sources = stack.enter_context(open_sources(volumes, options, image_size, least_px))
        pseudo: tuple[TrainingSource, ...] = ()
        if options.pseudo:
            true = TrueLabels(volumes, sources, options.gap)
            pseudo = stack.enter_context(open_pseudo_sources(options.pseudo, options.pseudo_weight, true))
        saved = ResumeFile(options.out, training_fingerprint(options, volumes, digest))
        state = saved.load(TrainingState) if options.resume else None
        schedule = _schedule_here(options.schedule, team, state)
        trainer = SamTrainer(sam, (*sources, *pseudo), schedule, with_hints=options.model_type == "tiny", team=team)
        taught = [f"{source.name}: slices {slices_text(source.train.slices)}" for source in pseudo]
        for line in (*trainer.plan.lines(), *taught, *([] if state is None else [f"going on from step {state.step}"])):
            progress(Progress("plan", 0, 1, line))
        keep = None
        if team.rank == 0:
            keep = stack.enter_context(_Keeper(saved, options, trainer.plan, state))
        trained = trainer.run(progress, state, keep)
        trainer.adopt(trained.state)
        final = FinalScores(trainer.scores())
        result = _result(trainer, trained, options, final, resumed=state is not None)
        if keep is not None:
            keep.note(trained.history)
            save_sam(options.out, trained.state, _record(result, image_size, _origin(volumes, options)))
            saved.remove()
    return result


class _Keeper:
    """Keeps the state to resume from and the logbook of a training; a context manager."""

    def __init__(
        self, saved: ResumeFile, options: FinetuneSamOptions, plan: TrainingPlan, state: TrainingState | None
    ) -> None:
        self._saved = saved
        config = {"options": dataclasses.asdict(options), "plan": dataclasses.asdict(plan)}
        resume_at = None if state is None else state.step
        self._logbook = Logbook(logbook_folder(options.out), config, "step", resume_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._logbook.__exit__(None, None, None)

    def __call__(self, state: TrainingState) -> None:
        """Keep a state."""
        self._saved.store(state)
        self.note(tuple(Judgement(*row) for row in state.history))

    def note(self, history: Sequence[Judgement]) -> None:
        """Bring the logbook up to date."""
        last = max((row["step"] for row in self._logbook.rows), default=-1)
        for entry in history:
            if entry.step > last:
                self._logbook.add(history_row(entry))


def _schedule_here(schedule: SamTrainingOptions, team: Team, state: TrainingState | None) -> SamTrainingOptions:
    """Return the schedule with this process's device, and the batch that an interrupted run had planned."""
    device = f"cuda:{team.rank}" if schedule.device == "cuda" and team.size > 1 else schedule.device
    return dataclasses.replace(schedule, device=device, **({} if state is None else state.planned))


def _result(
    trainer: SamTrainer, trained: TrainedSam, options: FinetuneSamOptions, final: FinalScores, *, resumed: bool
) -> FinetunedSam:
    """Put together what is handed back."""
    train_slices, held_out_slices = hulls(trainer.sources)
    zoom, model_pixel_size_nm = recorded_scale(trainer.sources)
    return FinetunedSam(
        out=str(options.out),
        model_type=options.model_type,
        zoom=zoom,
        model_pixel_size_nm=model_pixel_size_nm,
        train_slices=train_slices,
        held_out_slices=held_out_slices,
        first_held_out_iou=trained.first_held_out_iou,
        held_out_iou=trained.held_out_iou,
        first_scores=trained.first_scores,
        scores=final.means(),
        best_step=trained.best_step,
        steps=trained.steps,
        seconds=trained.seconds,
        resumed=resumed,
        stopped_early=trained.stopped_early,
        plan=dataclasses.asdict(trainer.plan),
        history=tuple(dataclasses.astuple(entry) for entry in trained.history),
        logbook=str(logbook_folder(options.out)),
        story=sam_story(trainer, trained, options, final),
    )


def _origin(volumes: Sequence[LabelledPaths], options: FinetuneSamOptions) -> dict[str, Any]:
    """Return on what a checkpoint was trained, and how."""
    schedule = options.schedule
    return {
        "volume": ", ".join(entry.volume.name for entry in volumes),
        "labels": ", ".join(entry.labels.name for entry in volumes),
        "pseudo_labels": [folder.name for folder in options.pseudo],
        "seed": schedule.seed,
        "protocol": schedule.protocol,
        "trained": f"lora, rank {schedule.lora_rank}, merged" if schedule.train == "lora" else schedule.train,
    }


def _starting_model(options: FinetuneSamOptions) -> tuple[nn.Module, int, str]:
    """Return the model to train, the side of its input in px, and the digest of the file that it comes from."""
    if options.from_scratch:
        sam = build_sam(options.model_type, options.image_size)
        initialise(sam, torch.Generator().manual_seed(options.schedule.seed))
        return sam, int(sam.image_encoder.img_size), ""
    start = options.start or (PACKAGED_SAM if options.model_type == "tiny" else None)
    if start is None:
        raise InvalidArgumentError(
            f"fine-tuning {options.model_type} needs weights to start from: give a SAM checkpoint with --start, "
            "or ask for random weights with --from-scratch"
        )
    loaded = load_sam(start, options.image_size, options.start_base)
    if loaded.record.model_type != options.model_type:
        raise CheckpointError(
            f"{start}: holds a {loaded.record.model_type}, but {options.model_type} was asked for; "
            "name the type of the file"
        )
    return loaded.sam, loaded.record.image_size, loaded.sha256 + loaded.base_sha256


def _record(result: FinetunedSam, image_size: int, data: dict[str, Any]) -> TrainingRecord:
    """Return what the checkpoint says about its training."""
    summary = data | {
        "train_slices": list(result.train_slices),
        "held_out_slices": list(result.held_out_slices),
        "held_out_iou": result.held_out_iou,
        "scores": result.scores,
        "steps": result.steps,
        "seconds": result.seconds,
    }
    return TrainingRecord(result.model_type, image_size, result.model_pixel_size_nm, result.zoom, summary)
