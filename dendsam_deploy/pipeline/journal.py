"""What a run has done so far, in a form that survives a kill at any moment.

A run's folder holds one file per finished slice and ``journal.jsonl``. The first line of that says what the run is
(settings and their fingerprint); every further line says that a slice is finished and what digest its file has. A line
is written only after its file is on the disk. What no line proves is done again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dendsam_deploy.durable import append_line, exclusive, make_folder, published, storage_errors, sync, write_text
from dendsam_deploy.errors import IncompleteRunError, InputFileError, InvalidArgumentError
from dendsam_deploy.pipeline.pieces import bytes_from_instances, instances_from_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dendsam_deploy.instances import Instances
    from dendsam_deploy.pipeline.clock import StageClock

JOURNAL_FILE = "journal.jsonl"
RUN_FILE = "run.json"
DETECTIONS_FILE = "detections.csv"
INSTANCES_FILE = "instances.csv"
REPORT_FILE = "report.html"
SLICES_FOLDER = "slices"
LABEL_FILES = {"tif": "labels.tif", "ome-zarr": "labels.ome.zarr"}
OTHER_FILES = {"coco": "masks.coco.json", "yolo": "boxes.yolo", "roi": "rois.zip"}
"""What is written for other programs, where that is wished: two files and a folder."""

_OWN_NAMES = {
    JOURNAL_FILE, RUN_FILE, DETECTIONS_FILE, INSTANCES_FILE, REPORT_FILE, SLICES_FOLDER, *LABEL_FILES.values(),
    *OTHER_FILES.values(),
}  # fmt: skip

SCHEMA_VERSION = 1
"""Version of the journal that this program writes and reads."""

Settings = dict[str, Any]
"""JSON values that together decide every byte of a run's result."""


@dataclass(frozen=True, slots=True)
class SliceEntry:
    """A finished slice.

    Parameters
    ----------
    z : int
        Slice in the input volume.
    sha256 : str
        Digest of the slice's file.
    input_sha256 : str
        Digest of the slice's samples as they were read.
    objects : int
        Number of its objects.
    seconds : dict
        Duration of each stage.
    """

    z: int
    sha256: str
    input_sha256: str
    objects: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What a run is.

    Parameters
    ----------
    fingerprint : str
        Digest of the settings.
    settings : dict
        Everything that decides the result.
    input_signature : str
        Size and time stamps of the input when the run began, see `input_signature`.
    """

    fingerprint: str
    settings: Settings
    input_signature: str
    schema_version: int = SCHEMA_VERSION


@dataclass(slots=True)
class Journal:
    """The journal of a run; made by `begin_run` or `read_journal`.

    Parameters
    ----------
    folder : Path
        The run's folder.
    header : RunHeader
        What the run is.
    entries : dict
        Finished slices by z; grows as slices are recorded.
    """

    folder: Path
    header: RunHeader
    entries: dict[int, SliceEntry]

    def piece_path(self, z: int) -> Path:
        """Return the file of a slice."""
        return self.folder / SLICES_FOLDER / f"{z:06d}.npz"

    def record(self, z: int, instances: Instances, input_sha256: str, clock: StageClock) -> None:
        """Write a slice's file, then the line that proves it.

        Raises
        ------
        StorageError
            Where the file system refuses.
        """
        with clock.measure("write"):
            piece = bytes_from_instances(instances)
        self.record_piece(z, piece, len(instances), input_sha256, clock)

    def record_piece(self, z: int, piece: bytes, objects: int, input_sha256: str, clock: StageClock) -> None:
        """Write a slice's file of any content, then the line that proves it; see `record`."""
        with clock.measure("write"), published(self.piece_path(z)) as stream:
            stream.write(piece)
        entry = SliceEntry(z, sha256(piece), input_sha256, objects, clock.seconds)
        append_line(self.folder / JOURNAL_FILE, json.dumps(asdict(entry), sort_keys=True))
        self.entries[z] = entry

    def forget(self, unproven: list[int]) -> None:
        """Drop entries whose files turned out to be missing or altered."""
        for z in unproven:
            self.entries.pop(z, None)

    def is_proven(self, z: int) -> bool:
        """Tell whether a slice is recorded and its file is there, unaltered."""
        entry, path = self.entries.get(z), self.piece_path(z)
        return entry is not None and path.is_file() and sha256(path.read_bytes()) == entry.sha256

    def load(self, z: int) -> Instances:
        """Return the objects of a finished slice.

        Raises
        ------
        IncompleteRunError
            Where the slice is not there, unaltered. An absent slice is never taken for an empty one.
        """
        return instances_from_bytes(self.read_piece(z))

    def read_piece(self, z: int) -> bytes:
        """Return the file of a finished slice, proven to be unaltered; raises as `load` does."""
        path = self.piece_path(z)
        try:
            data = path.read_bytes() if path.is_file() else b""
        except OSError as error:
            raise IncompleteRunError(
                f"{path}: cannot be read ({error.strerror or error}); make it readable and run the same command again"
            ) from error
        if z not in self.entries or sha256(data) != self.entries[z].sha256:
            raise IncompleteRunError(f"{path}: slice {z} is missing or altered; run the same command again to redo it")
        return data


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder for one process at a time; a folder that stays empty is removed again.

    Raises
    ------
    InvalidArgumentError
        Where the path is no folder, or another process is at work in it.
    StorageError
        Where the file system refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"{folder}: exists and is no run of this program; choose another --out")
    make_folder(folder)
    with exclusive(folder) as is_alone:
        if not is_alone:
            raise InvalidArgumentError(f"{folder}: another run is at work there; wait for it or choose another --out")
        try:
            yield
        finally:
            if not any(folder.iterdir()):
                folder.rmdir()


def begin_run(folder: Path, settings: Settings, signature: str) -> Journal:
    """Open a run's folder for the given settings, new or begun before.

    Parameters
    ----------
    folder : Path
        The run's folder; missing parents are made.
    settings : dict
        Everything that decides the result.
    signature : str
        See `input_signature`.

    Raises
    ------
    InvalidArgumentError
        Where the folder holds something else, or a run with other settings; names the differences.
    StorageError
        Where the file system refuses.
    """
    path = folder / JOURNAL_FILE
    if not path.exists():
        if folder.exists() and not (folder.is_dir() and all(map(_is_begun, folder.iterdir()))):
            raise InvalidArgumentError(f"{folder}: exists and is no run of this program; choose another --out")
        return _new_journal(folder, settings, signature)
    journal = read_journal(folder)
    if journal.header.fingerprint != fingerprint_of(settings):
        changes = "; ".join(differences(journal.header.settings, settings)) or "its record was altered"
        raise InvalidArgumentError(
            f"{folder}: holds a run with other settings ({changes}); restore them, choose another --out, or --restart"
        )
    make_folder(folder / SLICES_FOLDER)
    _drop_torn_line(path)
    return journal


def read_journal(folder: Path) -> Journal:
    """Read the journal of a run.

    A line that was cut by a kill, or damaged since, proves nothing and is passed over.

    Raises
    ------
    InputFileError
        Where there is no journal, or its first line is not readable.
    """
    path = folder / JOURNAL_FILE
    if not path.is_file():
        raise InputFileError(f"{path}: missing, so {folder} is no run of this program")
    try:
        first, *others = path.read_bytes().split(b"\n")[:-1] or [b""]
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    try:
        header = RunHeader(**json.loads(first))
    except (ValueError, TypeError) as error:
        raise InputFileError(f"{path}: its first line is damaged; begin anew with --restart") from error
    if header.schema_version != SCHEMA_VERSION:
        raise InputFileError(
            f"{path}: schema version {header.schema_version}, this program reads {SCHEMA_VERSION}; "
            "use the version of dendsam-deploy that wrote it, or begin anew with --restart"
        )
    entries = [_entry_from_line(line) for line in others]
    return Journal(folder, header, {entry.z: entry for entry in entries if entry is not None})


def restart_run(folder: Path, settings: Settings, signature: str) -> Journal:
    """Open a run's folder anew; see `begin_run`. What an earlier run put into it goes, what others put into it stays.

    Only a journal proves that there was a run: in a folder without one, nothing is removed.
    """
    path = folder / JOURNAL_FILE
    if not path.exists():
        return begin_run(folder, settings, signature)
    _remove_results(folder)
    return _new_journal(folder, settings, signature)


def abandon_run(journal: Journal) -> None:
    """Forget a run that has not finished a single slice, so that it is in nobody's way."""
    if not journal.entries:
        _remove_results(journal.folder)
        with storage_errors(journal.folder):
            (journal.folder / JOURNAL_FILE).unlink(missing_ok=True)


def fingerprint_of(settings: Settings) -> str:
    """Return the SHA-256 of settings, independent of the order of their keys."""
    return sha256(json.dumps(settings, sort_keys=True).encode())


def differences(old: Settings, new: Settings, where: str = "") -> list[str]:
    """Name the settings that differ as ``name: old -> new``."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{where}{key}.")
        elif json.dumps(before) != json.dumps(after):  # a journal has lists where settings have tuples
            found.append(f"{where}{key}: {_short(before)} -> {_short(after)}")
    return found


def sha256(data: bytes | memoryview) -> str:
    """Return a digest as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def _remove_results(folder: Path) -> None:
    """Remove what a run put into its folder, except for the journal."""
    with storage_errors(folder):
        for entry in sorted(folder.iterdir()):
            if _is_ours(entry) and entry.name != JOURNAL_FILE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        sync(folder)


def _new_journal(folder: Path, settings: Settings, signature: str) -> Journal:
    """Write the first line, in place of what was in the journal."""
    make_folder(folder / SLICES_FOLDER)
    header = RunHeader(fingerprint_of(settings), settings, signature)
    write_text(folder / JOURNAL_FILE, json.dumps(asdict(header), sort_keys=True) + "\n")
    return Journal(folder, header, {})


def _entry_from_line(line: bytes) -> SliceEntry | None:
    """Read one line; None where it is damaged."""
    try:
        return SliceEntry(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _drop_torn_line(path: Path) -> None:
    """Cut off what a kill left of an unfinished last line, so that the next line begins on its own."""
    content = path.read_bytes()
    if content.endswith(b"\n"):
        return
    with published(path) as stream:
        stream.write(content[: content.rfind(b"\n") + 1])


def _is_ours(entry: Path) -> bool:
    """Tell whether an entry of a run's folder was put there by a run: finished, partial, or stepping aside."""
    return entry.name.removesuffix(".partial").removesuffix(".old").removeprefix(".") in _OWN_NAMES


def _is_begun(entry: Path) -> bool:
    """Tell whether an entry of a folder is what a run that was killed before its journal began may have left."""
    if entry.name == SLICES_FOLDER:
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name == f".{JOURNAL_FILE}.partial"


def _short(value: object) -> str:
    """Write a setting so that it fits into a message; of a digest the beginning is enough."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:14]}..."
