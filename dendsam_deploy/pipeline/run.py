"""A whole volume: read, prepare, detect, encode, decode, paint and record slice by slice; then link and publish."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dendsam_deploy.errors import DendsamError, IncompleteRunError, InvalidArgumentError
from dendsam_deploy.pipeline.clock import StageClock
from dendsam_deploy.pipeline.finish import finish_run
from dendsam_deploy.pipeline.job import Job, SegmentOptions, input_digest, plan_job, result_folder
from dendsam_deploy.pipeline.journal import abandon_run, working_in
from dendsam_deploy.pipeline.paint import paint_masks
from dendsam_deploy.pipeline.prepare import PreparedSlice, prepare_slice
from dendsam_deploy.pipeline.record import (
    SegmentResult,
    completed_result,
    limiting_stage,
    sum_stages,
    write_record,
)
from dendsam_deploy.pipeline.segment import find_masks
from dendsam_deploy.progress import Progress, no_progress
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.open import input_signature, open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from concurrent.futures import Future

    from dendsam_deploy.instances import Detections, Masks
    from dendsam_deploy.progress import ProgressCallback
    from dendsam_deploy.runtimes.session import Session

__all__ = ["SegmentOptions", "SegmentResult", "segment_volume"]

_QUEUED_SLICES = 2
"""Slices that are read ahead of the graphs, and that may wait behind them for the disk: memory does not grow with Z."""


def segment_volume(
    volume_path: Path | str,
    session: Session,
    options: SegmentOptions,
    progress: ProgressCallback = no_progress,
) -> SegmentResult:
    """Segment a volume into 3-D instances.

    The result is a folder: labels, tables, ``run.json``, and the journal with one file per slice. A run that was
    interrupted goes on where it stopped when it is called again with the same arguments; one that is complete is
    returned as it is.

    Parameters
    ----------
    volume_path : Path or str
        The volume.
    session : Session
        An open session.
    options : SegmentOptions
        How.
    progress : callable
        Told about every slice.

    Raises
    ------
    VolumeError
        Where the volume cannot be read.
    InvalidArgumentError
        For options that do not fit the volume, or an output folder that holds something else.
    MissingCapabilityError
        Where neither boxes nor a detector are there, or the machine gives up.
    IncompleteRunError
        When interrupted; what is finished is kept.
    StorageError
        Where the file system refuses.
    """
    started = time.perf_counter()
    path = Path(volume_path)
    with open_volume(path, options.voxel_size_nm) as volume, working_in(result_folder(path, options)):
        job = plan_job(path, volume, session, options)
        finished = [z for z in job.output.slices if job.journal.is_proven(z)]
        todo = sorted(set(job.output.slices) - set(finished))
        job.journal.forget(todo)
        _check_same_input(job, path, finished)
        if not todo and (earlier := completed_result(job)) is not None:
            return earlier
        clock = StageClock()
        try:
            _segment_slices(job, todo, progress)
            links = finish_run(job.journal, job.output, clock, progress)
        except KeyboardInterrupt as error:
            raise IncompleteRunError(
                f"{job.journal.folder}: interrupted with {len(job.journal.entries)} of {len(job.output.slices)} slices "
                "finished; run the same command again to resume"
            ) from error
        except DendsamError:
            abandon_run(job.journal)
            raise
        return _completed(job, links.object_count, clock, started, len(finished))


def _completed(job: Job, objects_3d: int, clock: StageClock, started: float, resumed: int) -> SegmentResult:
    """Write the record of a run whose files are all there."""
    entries = [job.journal.entries[z] for z in job.output.slices]
    stage_seconds = sum_stages([*(entry.seconds for entry in entries), clock.seconds])
    result = SegmentResult(
        out=job.journal.folder,
        slices=len(entries),
        objects_2d=sum(entry.objects for entry in entries),
        objects_3d=objects_3d,
        seconds=round(time.perf_counter() - started, 3),
        stage_seconds=stage_seconds,
        limiting_stage=limiting_stage(stage_seconds),
        engine=job.session.engine,
        device=job.session.device,
        precision=job.session.precision,
        fingerprint=job.journal.header.fingerprint,
        resumed_slices=resumed,
        notices=_notices(job),
    )
    write_record(job, result)
    return result


def _segment_slices(job: Job, todo: list[int], progress: ProgressCallback) -> None:
    """Segment the slices that are still to be done; reading, painting and writing run beside the graphs."""
    total = len(job.output.slices)
    found = sum(entry.objects for entry in job.journal.entries.values())
    unwritten: deque[Future[_Painted]] = deque()
    # Left from the last to the first: whatever ends the run, what the graphs have finished is painted and recorded.
    with (
        ThreadPoolExecutor(1, "slice-writer") as writer,
        ThreadPoolExecutor(1, "slice-painter") as painter,
        ThreadPoolExecutor(1, "slice-reader") as reader,
        closing(_read_ahead(reader, partial(_load, job), todo)) as slices,
    ):
        for count, loaded in enumerate(slices):
            progress(Progress("segment", total - len(todo) + count, total, f"{found} objects"))
            prompted = find_masks(loaded.prepared, job.session, loaded.boxes, job.recipe, loaded.source.clock)
            unwritten.append(painter.submit(_paint, job, loaded.source, *prompted, writer))
            while len(unwritten) > _QUEUED_SLICES:
                found += unwritten.popleft().result().wait()
        while unwritten:
            found += unwritten.popleft().result().wait()
    progress(Progress("segment", total, total, f"{found} objects"))


@dataclass(frozen=True, slots=True)
class _Painted:
    """A slice on its way from the painter to the disk."""

    objects: int
    recorded: Future[None]

    def wait(self) -> int:
        """Return the number of objects once the slice is on the disk."""
        self.recorded.result()
        return self.objects


def _paint(job: Job, source: _Source, detections: Detections, masks: Masks, writer: ThreadPoolExecutor) -> _Painted:
    """Paint the masks of a slice and hand the objects to the writer."""
    with source.clock.measure("paint"):
        _, instances = paint_masks(detections, masks, job.recipe.plan, job.recipe.paint)
    recorded = writer.submit(job.journal.record, source.z, instances, source.input_sha256, source.clock)
    return _Painted(len(instances), recorded)


@dataclass(frozen=True, slots=True)
class _Source:
    """Which slice it is, and the clock that goes along with it."""

    z: int
    input_sha256: str
    clock: StageClock


@dataclass(frozen=True, slots=True)
class _LoadedSlice:
    """A slice on its way from the reader to the graphs; `boxes` is None where the detector is to be asked."""

    source: _Source
    prepared: PreparedSlice
    boxes: Detections | None


def _load(job: Job, z: int) -> _LoadedSlice:
    """Read a slice and bring it to the model's pixels."""
    clock = StageClock()
    with clock.measure("read"):
        image = job.volume.read(z)
        boxes = job.boxes.for_slice(z) if job.boxes else None
    with clock.measure("prepare"):
        image_u8 = to_uint8(image, f"{job.volume.info.source}: slice {z}")
        prepared = prepare_slice(image_u8, job.recipe.plan)
        return _LoadedSlice(_Source(z, input_digest(image), clock), prepared, boxes)


def _read_ahead(
    reader: ThreadPoolExecutor, load: Callable[[int], _LoadedSlice], todo: list[int]
) -> Generator[_LoadedSlice]:
    """Yield loaded slices in order while the reader is at work on the next ones."""
    queue: deque[Future[_LoadedSlice]] = deque()
    try:
        for z in todo:
            queue.append(reader.submit(load, z))
            if len(queue) > _QUEUED_SLICES:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        for unread in queue:
            unread.cancel()


def _check_same_input(job: Job, path: Path, finished: list[int]) -> None:
    """Raise where finished slices were made of another input; they are compared only if its files have changed."""
    if input_signature(path) == job.journal.header.input_signature:
        return
    for z in finished:
        if input_digest(job.volume.read(z)) != job.journal.entries[z].input_sha256:
            raise InvalidArgumentError(
                f"{job.journal.folder}: slice {z} of {path} has changed since it was segmented; "
                "restore the volume, choose another --out, or --restart"
            )


def _notices(job: Job) -> tuple[str, ...]:
    """Say what a careful person should know about a result."""
    notices = []
    if not job.session.is_proven:
        notices.append("the bundle is unproven on this engine, device and precision; run `dendsam-deploy verify` on it")
    if job.output.voxel_size_nm is None:
        notices.append("the voxel size is not recorded: sizes are in pixels; give it with --voxel-size Z,Y,X")
    return tuple(notices)
