"""`rounds`: train, pseudo-label, train again, for as long as slices that were held out from all of it gain by it.

Every round has a folder with everything that it made; its record, written last, says that it is finished. What is
finished is not done again, and what was interrupted goes on where its own step can.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import dendsam_deploy
from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.durable import make_folder, published, storage_errors, write_text
from dendsam_deploy.errors import IncompleteRunError, InputFileError, InvalidArgumentError
from dendsam_deploy.evaluate.compare_scores import LabelledSlices, SliceScores, score_slices
from dendsam_deploy.evaluate.pseudo_labels import pseudo_label_volume
from dendsam_deploy.evaluate.pseudo_options import PseudoLabelOptions
from dendsam_deploy.evaluate.rounds_options import data_line, plan_roles
from dendsam_deploy.evaluate.rounds_record import RoundRecord, RoundsResult, rounds_without_gain
from dendsam_deploy.export.bundle import export_bundle
from dendsam_deploy.export.options import ExportOptions
from dendsam_deploy.models.weights import load_sam
from dendsam_deploy.pipeline.journal import differences, fingerprint_of, working_in
from dendsam_deploy.pipeline.tables import csv_bytes
from dendsam_deploy.progress import Progress, no_progress
from dendsam_deploy.report.review_page import write_review_page
from dendsam_deploy.runtimes.session import SessionOptions, open_session
from dendsam_deploy.training.detector import finetune_detector
from dendsam_deploy.training.finetune import finetune_sam
from dendsam_deploy.training.options import DetectorSchedule, DetectorTrainingOptions
from dendsam_deploy.training.sam_options import FinetuneSamOptions
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.open import input_signature, open_labels, open_volume

if TYPE_CHECKING:
    from dendsam_deploy.evaluate.pseudo_labels import PseudoLabels
    from dendsam_deploy.evaluate.rounds_options import RoundsOptions, SliceRoles
    from dendsam_deploy.progress import ProgressCallback

SETTINGS_FILE = "settings.json"
RESULT_FILE = "rounds.json"
TABLE_FILE = "rounds.csv"
PAGE_FILE = "rounds.html"
BEST_FILE = "best.pt"
"""Copy of the best round's checkpoint."""

_DATA_FILE, _SAM_FILE, _DETECTOR_FILE = "data.txt", "sam.pt", "detector.pt"
_BUNDLE, _PSEUDO = "bundle", "pseudo"

TABLE_COLUMNS = (
    "round", "held_out_box_iou", "held_out_pq", "masks_found", "masks_kept", "mask_precision", "steps", "seconds",
    "checkpoint",
)  # fmt: skip


def run_rounds(
    volume_path: Path, labels_path: Path, options: RoundsOptions, progress: ProgressCallback = no_progress
) -> RoundsResult:
    """Train on few labelled slices, and then in rounds on what each model makes of the unlabelled ones.

    Parameters
    ----------
    volume_path, labels_path : Path
        Image and instance labels of the same shape, 0 in slices that nobody labelled.
    options : RoundsOptions
        How.
    progress : callable
        Told about every step; what is to be read as a line comes in the stage ``plan``.

    Raises
    ------
    InvalidArgumentError, VolumeError, CheckpointError, MissingCapabilityError, StorageError
        As the classes say; finished rounds are kept.
    IncompleteRunError
        When interrupted; the same call goes on.
    """
    volume_path, labels_path = Path(volume_path), Path(labels_path)
    with open_labels(labels_path) as labels:
        roles = plan_roles(labels, options)
    with working_in(options.out):
        fingerprint = _begin(volume_path, labels_path, options, roles)
        work = _Rounds(volume_path, labels_path, options, roles, fingerprint)
        try:
            result = work.run(progress)
        except KeyboardInterrupt as error:
            raise IncompleteRunError(
                f"{options.out}: interrupted; what is finished is kept, run the same command again to go on"
            ) from error
        _publish(result)
    return result


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The work on all rounds."""

    volume: Path
    labels: Path
    options: RoundsOptions
    roles: SliceRoles
    fingerprint: str

    def run(self, progress: ProgressCallback) -> RoundsResult:
        """Make rounds until there are enough, or the score stalls."""
        write_text(self.options.out / _DATA_FILE, data_line(self.volume, self.labels, self.roles))
        detector = self._detector(progress)
        truth = self._held_out()
        records: list[RoundRecord] = []
        reason = "all rounds that were asked for are done"
        for number in range(self.options.rounds + 1):
            record = self._round(number, records, detector, truth, progress)
            if record is None:
                reason = f"in round {number} no mask was good enough to teach"
                break
            records.append(record)
            told = f"round {number}: held-out IoU {record.score:.3f} from exact boxes, PQ {record.automatic:.3f}"
            progress(Progress("plan", 0, 1, told))
            stalled = rounds_without_gain([entry.score for entry in records], self.options.least_gain)
            if stalled >= self.options.patience:
                reason = f"the held-out score stalled in round {number}"
                break
        return RoundsResult(
            self.options.out, tuple(records), self.roles.texts(), reason, self.options.rounds, self.fingerprint,
            self._notices(),
        )  # fmt: skip

    def _round(
        self,
        number: int,
        earlier: list[RoundRecord],
        detector: Path,
        truth: LabelledSlices,
        progress: ProgressCallback,
    ) -> RoundRecord | None:
        """Make a round, or return its record if it is finished; None where there is nothing to teach it."""
        name = f"round-{number}"
        folder = self.options.out / name
        finished = RoundRecord.read(folder, self.fingerprint)
        if finished is not None:
            return finished
        make_folder(folder)
        started = time.monotonic()
        pseudo = None
        if number > 0:
            pseudo = self._pseudo_label(folder, earlier[-1], progress)
            if not pseudo.kept:
                return None
        steps = self._train(folder, earlier, progress)
        bundle = self._export(folder, detector, progress)
        scores = _score(bundle, truth)
        share = None if pseudo is None or pseudo.choice is None else pseudo.choice.left_out or pseudo.choice.chosen_on
        record = RoundRecord(
            number=number,
            checkpoint=f"{name}/{_SAM_FILE}",
            bundle=f"{name}/{_BUNDLE}",
            box_iou=tuple(scores.box_iou.tolist()),
            pq=tuple(scores.pq.tolist()),
            masks=0 if pseudo is None else pseudo.masks,
            kept=0 if pseudo is None else pseudo.kept,
            mask_precision=None if share is None else share.precision,
            steps=steps,
            seconds=round(time.monotonic() - started, 1),
        )
        record.write(folder, self.fingerprint)
        return record

    def _detector(self, progress: ProgressCallback) -> Path:
        """Return the detector of all rounds; without one, train it on the labelled slices."""
        if self.options.detector is not None:
            return self.options.detector
        path = self.options.out / _DETECTOR_FILE
        if not path.is_file():
            options = self.options
            seed, device = options.schedule.seed, options.schedule.device
            schedule = DetectorSchedule(minutes=options.detector_minutes, seed=seed, device=device)
            wishes = DetectorTrainingOptions(
                out=path,
                data=options.out / _DATA_FILE,
                gap=options.gap,
                background_labels=options.background_labels,
                voxel_size_nm=options.voxel_size_nm,
                schedule=schedule,
            )
            finetune_detector(None, None, wishes, _named("detector", progress))
        return path

    def _pseudo_label(self, folder: Path, before: RoundRecord, progress: ProgressCallback) -> PseudoLabels:
        """Let the model of the round before label the unlabelled slices."""
        options, roles = self.options, self.roles
        calibration = (roles.calibration[0], roles.calibration[-1] + 1) if roles.calibration else None
        wishes = PseudoLabelOptions(
            out=folder / _PSEUDO,
            slices=roles.looked_at(),
            kept_slices=roles.unlabelled,
            voxel_size_nm=options.voxel_size_nm,
            format="tif",
            seed=options.schedule.seed,
            background_labels=options.background_labels,
            truth=None if calibration is None else self.labels,
            truth_slices=calibration,
            precision=None if calibration is None else options.wanted_precision,
        )
        if calibration is None:
            wishes = replace(wishes, **{f"least_{name}": value for name, value in asdict(options.criteria).items()})
        bundle, runtime = Bundle.open(options.out / before.bundle), SessionOptions(device=options.schedule.device)
        with open_session(bundle, runtime) as session:
            made = pseudo_label_volume(self.volume, session, wishes, _named(folder.name, progress))
        with open_volume(self.volume) as raw:
            write_review_page(made, raw)
        return made

    def _train(self, folder: Path, earlier: list[RoundRecord], progress: ProgressCallback) -> int:
        """Train the model of a round unless it is there, and return the number of steps."""
        options, path = self.options, folder / _SAM_FILE
        if not path.is_file():  # it appears when training has ended, not before
            carried = options.out / earlier[-1].checkpoint if options.carry_on and earlier else options.start
            wishes = FinetuneSamOptions(
                out=path,
                data=options.out / _DATA_FILE,
                gap=options.gap,
                background_labels=options.background_labels,
                voxel_size_nm=options.voxel_size_nm,
                model_type=options.model_type,
                start=carried,
                image_size=options.image_size,
                pseudo=(folder / _PSEUDO,) if earlier else (),
                pseudo_weight=options.pseudo_weight,
                schedule=options.schedule,
            )
            finetune_sam(None, None, wishes, _named(folder.name, progress))
        return int(load_sam(path).record.summary.get("steps", 0))

    def _export(self, folder: Path, detector: Path, progress: ProgressCallback) -> Path:
        """Export the model of a round unless that is done."""
        bundle = folder / _BUNDLE
        if not bundle.is_dir():  # it appears when it is whole
            wishes = ExportOptions(folder / _SAM_FILE, bundle, detector, name=folder.name, reference_volume=self.volume)
            export_bundle(wishes, progress=_named(folder.name, progress))
        return bundle

    def _held_out(self) -> LabelledSlices:
        """Read the held-out slices and their truth."""
        with ExitStack() as stack:
            image = stack.enter_context(open_volume(self.volume, self.options.voxel_size_nm))
            labels = stack.enter_context(open_labels(self.labels))
            truth = []
            for z in self.roles.held_out:
                shown = labels.read(z).astype(np.uint32)
                shown[np.isin(shown, self.options.background_labels)] = 0
                truth.append(shown)
            images = tuple(to_uint8(image.read(z), f"{self.volume}: slice {z}") for z in self.roles.held_out)
            return LabelledSlices(images, tuple(truth), image.info.voxel_size_nm)

    def _notices(self) -> tuple[str, ...]:
        """Say what a careful person should know about these rounds."""
        notices = [
            "each training keeps the weights that did best on the held-out slices, so all scores flatter a little, "
            "alike in every round; of several rounds the best by the same slices is shown, which flatters its gain",
            "the bundles are unproven; run `dendsam-deploy verify` on the one that you use",
        ]
        if self.options.carry_on:
            notices.append("later rounds were trained for longer, so a gain is not that of the pseudo-labels alone")
        if not self.roles.calibration:
            notices.append("the precision of the masks that taught is not known: there were no calibration slices")
        return tuple(notices)


def _begin(volume: Path, labels: Path, options: RoundsOptions, roles: SliceRoles) -> str:
    """Write down what the rounds are, or compare with what was written, and return its digest.

    Raises
    ------
    InvalidArgumentError
        Where the folder holds something else, or rounds with other settings.
    """
    settings = _settings(volume, labels, options, roles)
    path = options.out / SETTINGS_FILE
    if path.is_file() and not options.restart:
        try:
            old = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputFileError(f"{path}: is damaged; begin anew with --restart") from error
        if changes := differences(old, settings):
            raise InvalidArgumentError(
                f"{options.out}: holds rounds with other settings ({'; '.join(changes)}); restore them, choose another "
                "--out, or --restart"
            )
    elif path.is_file():
        _remove_rounds(options.out)
    elif any(options.out.iterdir()):
        raise InvalidArgumentError(f"{options.out}: exists and holds no rounds; choose another --out")
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return fingerprint_of(settings)


def _settings(volume: Path, labels: Path, options: RoundsOptions, roles: SliceRoles) -> dict[str, Any]:
    """Return everything that decides the result of a round; how many there are does not."""
    aside = ("out", "rounds", "restart", "patience", "least_gain", "start", "detector")
    chosen = {name: value for name, value in asdict(options).items() if name not in aside}
    plain: dict[str, Any] = json.loads(json.dumps(chosen, default=str))
    return plain | {
        "program": dendsam_deploy.__version__,
        "volume": input_signature(volume),
        "labels": input_signature(labels),
        "start": _digest(options.start),
        "detector": _digest(options.detector),
        "roles": roles.texts(),
    }


def _digest(path: Path | None) -> str | None:
    """Return the digest of a file of weights."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _remove_rounds(folder: Path) -> None:
    """Remove what rounds put into their folder; what others put there stays."""
    files = (SETTINGS_FILE, RESULT_FILE, TABLE_FILE, PAGE_FILE, BEST_FILE, _DATA_FILE, _DETECTOR_FILE)
    with storage_errors(folder):
        for entry in folder.iterdir():
            if entry.is_dir() and (entry.name.startswith("round-") or entry.name.endswith(".training")):
                shutil.rmtree(entry)
            elif entry.name in files or entry.name.startswith(f".{_DETECTOR_FILE}"):
                entry.unlink() if entry.is_file() else shutil.rmtree(entry)


def _score(bundle: Path, truth: LabelledSlices) -> SliceScores:
    """Score the deployed graphs of a round on the held-out slices, on the CPU: the same arithmetic in every round."""
    with open_session(Bundle.open(bundle), SessionOptions(device="cpu")) as session:
        return score_slices(session, truth)


def _publish(result: RoundsResult) -> None:
    """Write the best checkpoint, the table, and then the result."""
    source = result.out / result.best.checkpoint
    with published(result.out / BEST_FILE) as stream, source.open("rb") as file:
        shutil.copyfileobj(file, stream)
    rows = [
        (
            record.number, f"{record.score:.4f}", f"{record.automatic:.4f}", record.masks, record.kept,
            "" if record.mask_precision is None else f"{record.mask_precision:.4f}", record.steps,
            f"{record.seconds:.1f}", record.checkpoint,
        )
        for record in result.records
    ]  # fmt: skip
    with published(result.out / TABLE_FILE) as stream:
        stream.write(csv_bytes([TABLE_COLUMNS, *rows]))
    write_text(result.out / RESULT_FILE, json.dumps(result.to_document(), indent=2) + "\n")


def _named(what: str, progress: ProgressCallback) -> ProgressCallback:
    """Return a callback that says which round a step belongs to."""

    def tell(entry: Progress) -> None:
        if entry.stage == "plan":
            progress(replace(entry, note=f"{what}: {entry.note}"))
        else:
            progress(replace(entry, stage=f"{what} {entry.stage}"))

    return tell
