"""`pseudo-label`: masks of a volume that are good enough to train on, with provenance and a review list."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.durable import make_folder, storage_errors
from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.mask_choice import JudgedMasks, MaskChoice, MaskCriteria, choose_criteria
from dendsam_deploy.evaluate.mask_table import collect_masks, judge_masks, separate_twins
from dendsam_deploy.evaluate.pseudo_files import (
    MASKS_FILE,
    REVIEW_PAGE,
    RUN_FOLDER,
    ChosenMasks,
    kept_masks,
    write_mask_tables,
    write_pseudo_labels,
)
from dendsam_deploy.evaluate.pseudo_options import DEFAULT_PRECISION, PseudoLabelOptions
from dendsam_deploy.pipeline.interchange import write_formats
from dendsam_deploy.pipeline.job import SegmentOptions
from dendsam_deploy.pipeline.journal import JOURNAL_FILE, LABEL_FILES, OTHER_FILES, fingerprint_of
from dendsam_deploy.pipeline.scored_masks import ScoringOptions, score_masks
from dendsam_deploy.progress import no_progress
from dendsam_deploy.volume.open import open_labels, open_volume
from dendsam_deploy.volume.pseudo_record import RECORD_FILE, PseudoRecord, pseudo_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.mask_table import MaskTable
    from dendsam_deploy.pipeline.scored_masks import ScoredVolume
    from dendsam_deploy.progress import ProgressCallback
    from dendsam_deploy.runtimes.session import Session
    from dendsam_deploy.volume.volume import VolumeInfo


@dataclass(frozen=True, slots=True)
class PseudoLabels:
    """What `pseudo_label_volume` did.

    Parameters
    ----------
    out : Path
        Folder of the result.
    labels : Path or None
        The labels; None where the wanted precision was not reached, and nothing was kept.
    slices : (int, int)
        Slices that were looked at, half-open.
    masks, kept : int
        Masks that were found, and those that were kept.
    criteria : MaskCriteria
        What kept them.
    choice : MaskChoice or None
        How the thresholds were chosen; None without truth.
    fingerprint : str
        Digest of everything that decides the result.
    notices : tuple of str
        What a careful person should know.
    """

    out: Path
    labels: Path | None
    slices: tuple[int, int]
    masks: int
    kept: int
    criteria: MaskCriteria
    choice: MaskChoice | None
    fingerprint: str
    notices: tuple[str, ...]

    @property
    def reached(self) -> bool:
        """Whether the wanted precision was reached; true where none was asked for."""
        return self.choice is None or self.choice.reached

    def to_document(self) -> dict[str, Any]:
        """Return the result as JSON values, with the keys of ``pseudo-label --json``."""
        return {
            "out": str(self.out),
            "labels": None if self.labels is None else str(self.labels),
            "slices": list(self.slices),
            "masks": self.masks,
            "kept": self.kept,
            "criteria": asdict(self.criteria),
            "reached": self.reached,
            "choice": None if self.choice is None else self.choice.to_document(),
            "fingerprint": self.fingerprint,
            "notices": list(self.notices),
        }


def pseudo_label_volume(
    volume_path: Path | str, session: Session, options: PseudoLabelOptions, progress: ProgressCallback = no_progress
) -> PseudoLabels:
    """Find the masks of a volume, keep those that are good enough to train on, and write them with their provenance.

    The masks are found once: run again with other thresholds or another truth, the call chooses anew among them. An
    interrupted call goes on where it stopped. The result is finished when its record, ``pseudo.json``, is there.

    Parameters
    ----------
    volume_path : Path or str
        The volume.
    session : Session
        An open session.
    options : PseudoLabelOptions
        How.
    progress : callable
        Told about every slice.

    Raises
    ------
    VolumeError
        Where the volume or the truth cannot be read.
    InvalidArgumentError
        For options that do not fit the volume, or an output folder that holds something else.
    MissingCapabilityError
        Where neither boxes nor a detector are there.
    IncompleteRunError
        When interrupted; what is finished is kept.
    StorageError
        Where the file system refuses.
    """
    path, folder = Path(volume_path), pseudo_folder(options.out)
    with ExitStack() as stack:
        volume = stack.enter_context(open_volume(path, options.voxel_size_nm))
        looked_at = range(*(options.slices or (0, volume.info.shape_zyx[0])))
        judged = _judged_slices(options, looked_at)
        truth = None
        if options.truth is not None:
            truth = stack.enter_context(open_labels(options.truth))
            _check_shape(truth.info, volume.info)
        _begin(folder)
        scored = score_masks(path, volume, session, _scoring(options, folder), progress)
        table = collect_masks(scored, progress)
        truth_iou, choice = np.full(len(table), np.nan), None
        labelled: tuple[int, ...] = ()
        if truth is not None:
            truth_iou, labelled = judge_masks(table, scored, truth, judged, options.judging())
            choice = _choose(table, truth_iou, options)
        criteria = _criteria(options) if choice is None else choice.criteria
        kept = criteria.keeps(table.qualities) & (choice is None or choice.reached)
        kept &= ~(truth_iou < options.right_iou)  # what is known to be wrong need not be taught
        if options.kept_slices:
            kept &= np.isin(table.z, options.kept_slices)
        masks = ChosenMasks(
            table,
            scored,
            criteria,
            kept,
            separate_twins(table, scored, kept),
            truth_iou,
            options.right_iou,
            _bundle_digest(scored),
            "its slice gets no labels" if choice is None or choice.reached else "the wanted precision was not reached",
        )
        labels = None
        _remove_results(folder, options.out)
        if choice is None or choice.reached:
            labels = _publish(masks, volume.info, options, progress)
    first, stop = looked_at.start, looked_at.stop
    fingerprint = fingerprint_of(
        {
            "masks": scored.journal.header.fingerprint,
            "criteria": asdict(criteria),
            "slices": [first, stop],
            "kept_slices": list(options.kept_slices),
        }
    )
    result = PseudoLabels(
        folder, labels, (first, stop), len(table), int(kept.sum()), criteria, choice, fingerprint,
        _notices(session, choice, table, kept),
    )  # fmt: skip
    write_mask_tables(folder, masks)
    if labels is not None:
        write_formats(folder, options.also, partial(kept_masks, masks, volume.info.shape_zyx), path.name)
        _record(result, masks, path, volume.info, labelled).write(folder)
    return result


def _judged_slices(options: PseudoLabelOptions, looked_at: range) -> range | None:
    """Return the slices whose truth is said to be complete; None where nothing is said."""
    if options.truth_slices is None:
        return None
    first, stop = options.truth_slices
    if not looked_at.start <= first < stop <= looked_at.stop:
        raise InvalidArgumentError(
            f"the truth slices {first}:{stop} are not among the slices {looked_at.start}:{looked_at.stop} that are "
            "looked at; name some of these"
        )
    return range(first, stop)


def _check_shape(truth: VolumeInfo, volume: VolumeInfo) -> None:
    """Raise where the truth is not that of the volume."""
    if truth.shape_zyx != volume.shape_zyx:
        raise VolumeError(
            f"{truth.source}: its shape {truth.shape_zyx} (z, y, x) differs from {volume.shape_zyx} of "
            f"{volume.source}; give the labels of the same volume, with zeros where slices are not labelled"
        )


def _begin(folder: Path) -> None:
    """Open the folder of the result; its old record goes first, since what follows may differ from it.

    Raises
    ------
    InvalidArgumentError
        Where it holds something else.
    """
    is_ours = (folder / RUN_FOLDER / JOURNAL_FILE).is_file() or (folder / RECORD_FILE).is_file()
    if folder.exists() and not is_ours:
        only_begun = folder.is_dir() and all(entry.name == RUN_FOLDER for entry in folder.iterdir())
        if not only_begun:
            raise InvalidArgumentError(f"{folder}: exists and holds no pseudo-labels; choose another --out")
    make_folder(folder)
    with storage_errors(folder):
        (folder / RECORD_FILE).unlink(missing_ok=True)
        (folder / REVIEW_PAGE).unlink(missing_ok=True)


def _scoring(options: PseudoLabelOptions, folder: Path) -> ScoringOptions:
    """Return how the masks are found and examined."""
    segment = SegmentOptions(
        out=folder / RUN_FOLDER,
        slices=options.slices,
        detection_score=options.detection_score,
        nms_iou=options.nms_iou,
        min_area_px=options.min_area_px,
        format="tif",  # of no labels that are written there, so that it is no difference between runs
        voxel_size_nm=options.voxel_size_nm,
        zoom=options.zoom,
        boxes=options.boxes,
        restart=options.restart,
    )
    return ScoringOptions(segment, options.jitter())


def _criteria(options: PseudoLabelOptions) -> MaskCriteria:
    """Return the thresholds without any truth."""
    return MaskCriteria(**{**asdict(MaskCriteria()), **options.given_thresholds()})


def _choose(table: MaskTable, truth_iou: NDArray[np.float64], options: PseudoLabelOptions) -> MaskChoice:
    """Choose the thresholds by the masks whose truth is known."""
    known = ~np.isnan(truth_iou)
    judged = JudgedMasks(table.z[known], table.qualities[known], truth_iou[known] >= options.right_iou)
    wanted = DEFAULT_PRECISION if options.precision is None else options.precision
    return choose_criteria(judged, wanted, options.given_thresholds())


def _publish(masks: ChosenMasks, info: VolumeInfo, options: PseudoLabelOptions, progress: ProgressCallback) -> Path:
    """Write the labels and return where they are."""
    folder = pseudo_folder(options.out)
    label_format = options.format or ("ome-zarr" if info.format in ("zarr", "ome-zarr") else "tif")
    if folder != options.out:
        label_format = "tif"
    path = options.out if folder != options.out else folder / LABEL_FILES[label_format]
    write_pseudo_labels(path, masks, info, label_format, progress)
    return path


def _remove_results(folder: Path, out: Path) -> None:
    """Remove the labels of an earlier call and their exports, whose thresholds hold no longer."""
    outdated = [folder / name for name in (*LABEL_FILES.values(), *OTHER_FILES.values())]
    if out != folder and (folder / MASKS_FILE).is_file():
        outdated.append(out)
    with storage_errors(folder):
        for path in outdated:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _record(
    result: PseudoLabels, masks: ChosenMasks, volume: Path, info: VolumeInfo, labelled: tuple[int, ...]
) -> PseudoRecord:
    """Return what the folder says about itself."""
    if result.labels is None:
        raise InvalidArgumentError(f"{result.out}: holds no labels, so there is nothing to record")
    of_slice, counts = np.unique(masks.table.z[masks.kept], return_counts=True)
    inside = result.labels.parent == result.out
    return PseudoRecord(
        labels=result.labels.name if inside else f"../{result.labels.name}",
        volume=str(volume),
        shape_zyx=info.shape_zyx,
        slices=result.slices,
        kept_masks=dict(zip(of_slice.tolist(), counts.tolist(), strict=True)),
        bundle=str(masks.scored.journal.header.settings["bundle"]["name"]),
        bundle_sha256=masks.bundle_sha256,
        fingerprint=result.fingerprint,
        criteria=asdict(result.criteria),
        truth_slices=labelled,
        choice=None if result.choice is None else result.choice.to_document(),
    )


def _bundle_digest(scored: ScoredVolume) -> str:
    """Return one digest of all graphs that took part."""
    return fingerprint_of(scored.journal.header.settings["bundle"]["graphs"])


def _notices(session: Session, choice: MaskChoice | None, table: MaskTable, kept: NDArray[np.bool_]) -> tuple[str, ...]:
    """Say what a careful person should know about the result."""
    notices = []
    if not session.is_proven:
        notices.append("the bundle is unproven on this engine, device and precision; run `dendsam-deploy verify` on it")
    if choice is None:
        notices.append("the precision of the kept masks is not known; give --truth to choose thresholds by it")
    elif choice.reached and choice.left_out is None:
        notices.append(
            "the precision is that of the one slice that chose the thresholds; more labelled slices would tell whether "
            "it holds elsewhere"
        )
    if len(table) and np.isnan(table.qualities[:, 3]).any():
        notices.append("some masks have no neighbouring slice and were not asked for agreement")
    if not len(table):
        notices.append("no mask was found at all; check the boxes, the detection score and the scale")
    elif not kept.any() and (choice is None or choice.reached):
        notices.append("no mask was good enough; lower the thresholds, or look at review.html")
    return tuple(notices)
