"""Masks of a volume with everything that tells how good they are: the material of pseudo-labels.

It is a run like that of `segment`: one proven file for each finished slice, resumed where it stopped. A slice's file
holds its painted objects and their stability; what depends on other slices or on thresholds is worked out of the files.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import DendsamError, IncompleteRunError, InvalidArgumentError
from dendsam_deploy.instances import Instances
from dendsam_deploy.pipeline.clock import StageClock
from dendsam_deploy.pipeline.decode import BoxDecoder, boxes_in_tiles, decode_masks, encode_tiles
from dendsam_deploy.pipeline.detect import clip_to_slice, detect_objects
from dendsam_deploy.pipeline.infer import on_device
from dendsam_deploy.pipeline.job import input_digest, plan_job
from dendsam_deploy.pipeline.journal import abandon_run, working_in
from dendsam_deploy.pipeline.paint import paint_masks
from dendsam_deploy.pipeline.pieces import bytes_from_instances, instances_from_bytes
from dendsam_deploy.pipeline.prepare import PreparedSlice, prepare_slice
from dendsam_deploy.pipeline.segment import require_detector
from dendsam_deploy.pipeline.stability import EncodedSlice, Examination, JitterOptions, mask_stability
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.volume.intensity import to_uint8

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.instances import Detections
    from dendsam_deploy.pipeline.job import Job, SegmentOptions
    from dendsam_deploy.pipeline.journal import Journal
    from dendsam_deploy.runtimes.session import Session
    from dendsam_deploy.volume.volume import VolumeReader


@dataclass(frozen=True, slots=True)
class ScoredSlice:
    """The painted objects of a slice and how much each depends on its box.

    Parameters
    ----------
    instances : Instances
        The objects, with detection score and predicted IoU.
    stability : ndarray, shape (N,), float32
        See `stability.mask_stability`.
    """

    instances: Instances
    stability: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """Encode as an npz file; equal slices give equal bytes."""
        buffer = io.BytesIO()
        objects = np.frombuffer(bytes_from_instances(self.instances), np.uint8)
        np.savez(buffer, instances=objects, stability=self.stability)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> ScoredSlice:
        """Decode what `to_bytes` made; the caller has checked the digest."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(instances_from_bytes(arrays["instances"].tobytes()), arrays["stability"])


@dataclass(frozen=True, slots=True)
class ScoredVolume:
    """A finished run over the slices of a volume; made by `score_masks`.

    Parameters
    ----------
    journal : Journal
        Its files and settings.
    slices : range
        Slices of the input volume.
    """

    journal: Journal
    slices: range

    def load(self, z: int) -> ScoredSlice:
        """Return the objects of a slice.

        Raises
        ------
        IncompleteRunError
            Where its file is missing or altered.
        """
        return ScoredSlice.from_bytes(self.journal.read_piece(z))

    def instances(self) -> Iterator[tuple[int, Instances]]:
        """Yield the objects of all slices, ascending in z."""
        for z in self.slices:
            yield z, self.load(z).instances


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """How masks are found and examined.

    Parameters
    ----------
    segment : SegmentOptions
        Slices, boxes and thresholds as `segment` takes them; `out` is the folder of the run.
    jitter : JitterOptions
        How wrong boxes are drawn to measure the stability of a mask.
    """

    segment: SegmentOptions
    jitter: JitterOptions = field(default_factory=JitterOptions)


def score_slice(
    prepared: PreparedSlice,
    given: Detections | None,
    examination: Examination,
    z: int,
    clock: StageClock | None = None,
) -> ScoredSlice:
    """Find the objects of a slice and measure the stability of their masks, on one and the same embedding.

    Parameters
    ----------
    prepared : PreparedSlice
        The slice.
    given : Detections or None
        Boxes, slice px; None asks the session's detector.
    examination : Examination
        What examines, and how.
    z : int
        Number of the slice.
    clock : StageClock, optional
        Told how long each stage took.

    Raises
    ------
    MissingCapabilityError
        Where neither boxes nor a detector are there.
    ParityError
        Where a graph returns NaN or infinity.
    """
    clock, session, recipe = clock or StageClock(), examination.session, examination.recipe
    with clock.measure("detect"):
        if given is None:
            detector = require_detector(session)
            prepared = on_device(prepared, detector, session.encoder)
            detections = detect_objects(prepared, detector, recipe.detect)
        else:
            detections = clip_to_slice(given, recipe.plan)
    if not len(detections):
        return ScoredSlice(_no_instances(), np.zeros(0, np.float32))
    box_index, tile_index = recipe.plan.views(detections.boxes_xyxy)
    with clock.measure("encode"):
        encoded = EncodedSlice(prepared, encode_tiles(prepared, tile_index, session.encoder, session.decoder))
    with clock.measure("decode"):
        boxes = boxes_in_tiles(detections.boxes_xyxy[box_index], tile_index, recipe.plan)
        decoder = BoxDecoder(session.decoder, recipe.decode)
        masks = decode_masks(boxes, box_index, tile_index, encoded.embeddings, decoder)
    with clock.measure("paint"):
        _, instances = paint_masks(detections, masks, recipe.plan, recipe.paint)
    with clock.measure("decode"):
        stability = mask_stability(encoded, instances.boxes_xyxy, examination, z)
    return ScoredSlice(instances, stability)


def score_masks(
    volume_path: Path,
    volume: VolumeReader,
    session: Session,
    options: ScoringOptions,
    progress: ProgressCallback = no_progress,
) -> ScoredVolume:
    """Find the masks of a volume and examine each; an interrupted run goes on where it stopped.

    Parameters
    ----------
    volume_path, volume : Path, VolumeReader
        The volume, open.
    session : Session
        An open session.
    options : ScoringOptions
        How; `options.segment.out` is given.
    progress : callable
        Told about every slice.

    Raises
    ------
    InvalidArgumentError
        For options that do not fit the volume, or a folder that holds something else or a run with other settings.
    IncompleteRunError
        When interrupted; what is finished is kept.
    VolumeError, MissingCapabilityError, StorageError
        As the classes say.
    """
    folder = options.segment.out
    if folder is None:
        raise InvalidArgumentError("a run that examines masks needs a folder; set `out`")
    with working_in(folder):
        job = plan_job(volume_path, volume, session, options.segment, {"jitter": asdict(options.jitter)})
        finished = [z for z in job.output.slices if job.journal.is_proven(z)]
        todo = sorted(set(job.output.slices) - set(finished))
        job.journal.forget(todo)
        _check_same_input(job, finished)
        try:
            _score_slices(job, todo, options.jitter, progress)
        except KeyboardInterrupt as error:
            raise IncompleteRunError(
                f"{folder}: interrupted with {len(job.journal.entries)} of {len(job.output.slices)} slices finished; "
                "run the same command again to resume"
            ) from error
        except DendsamError:
            abandon_run(job.journal)
            raise
    return ScoredVolume(job.journal, job.output.slices)


def _score_slices(job: Job, todo: list[int], jitter: JitterOptions, progress: ProgressCallback) -> None:
    """Examine the slices that are still to be done; the next one is read meanwhile."""
    examination, total = Examination(job.session, job.recipe, jitter), len(job.output.slices)
    done = total - len(todo)
    with ThreadPoolExecutor(1, "slice-reader") as reader, closing(_read_ahead(job, reader, todo)) as loaded:
        for z, digest, prepared, given, clock in loaded:
            progress(Progress("masks", done, total, f"slice {z}"))
            scored = score_slice(prepared, given, examination, z, clock)
            job.journal.record_piece(z, scored.to_bytes(), len(scored.instances), digest, clock)
            done += 1
    progress(Progress("masks", total, total))


_Loaded = tuple[int, str, PreparedSlice, "Detections | None", StageClock]


def _read_ahead(job: Job, reader: ThreadPoolExecutor, todo: list[int]) -> Generator[_Loaded]:
    """Yield slices in order while the next one is being read."""
    coming = reader.submit(_load, job, todo[0]) if todo else None
    for following in [*todo[1:], None]:
        if coming is None:
            return
        loaded = coming.result()
        coming = None if following is None else reader.submit(_load, job, following)
        yield loaded


def _load(job: Job, z: int) -> _Loaded:
    """Read a slice and bring it to the model's pixels."""
    clock = StageClock()
    with clock.measure("read"):
        image = job.volume.read(z)
        given = job.boxes.for_slice(z) if job.boxes else None
    with clock.measure("prepare"):
        prepared = prepare_slice(to_uint8(image, f"{job.volume.info.source}: slice {z}"), job.recipe.plan)
    return z, input_digest(image), prepared, given, clock


def _check_same_input(job: Job, finished: list[int]) -> None:
    """Raise where a finished slice was made of another input."""
    for z in finished:
        if input_digest(job.volume.read(z)) != job.journal.entries[z].input_sha256:
            raise InvalidArgumentError(
                f"{job.journal.folder}: slice {z} of {job.volume.info.source} has changed since its masks were made; "
                "restore the volume, choose another --out, or --restart"
            )


def _no_instances() -> Instances:
    """Return the objects of a slice that shows none."""
    return Instances(
        np.zeros(0, np.uint32),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.int64),
        (),
    )
