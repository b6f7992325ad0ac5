"""What a training keeps beside its checkpoint to go on after an interruption, bound to its settings and data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any, TypeVar

from dendsam_deploy.durable import write_text
from dendsam_deploy.errors import CheckpointError, StorageError
from dendsam_deploy.models.weights import read_tensors, write_tensors
from dendsam_deploy.training.pseudo import pseudo_fingerprints
from dendsam_deploy.volume.open import input_signature

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dendsam_deploy.training.options import DetectorTrainingOptions
    from dendsam_deploy.training.sam_options import FinetuneSamOptions
    from dendsam_deploy.training.volume_list import LabelledPaths

State = TypeVar("State")


def training_fingerprint(
    options: FinetuneSamOptions | DetectorTrainingOptions, volumes: Sequence[LabelledPaths], start_digest: str
) -> str:
    """Return a digest of everything that decides the result of a training but for the random order of its operations.

    Parameters
    ----------
    options : FinetuneSamOptions or DetectorTrainingOptions
        What was asked for; where the result goes does not matter.
    volumes : sequence of LabelledPaths
        The data; changed files count as other data.
    start_digest : str
        Digest, or name, of what training starts from.
    """
    settings = dataclasses.asdict(options) | {
        "out": None,
        "resume": None,
        "data": None,
        "start": start_digest,
        "pseudo": pseudo_fingerprints(getattr(options, "pseudo", ())),
        "volumes": [
            dataclasses.asdict(entry)
            | {"place": None, "volume": input_signature(entry.volume), "labels": input_signature(entry.labels)}
            for entry in volumes
        ],
    }
    return hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()


class ResumeFile:
    """A hidden file beside the checkpoint, for a training whose state is plain values and tensors.

    Parameters
    ----------
    out : Path
        The checkpoint that the training is to write.
    fingerprint : str
        See `training_fingerprint`.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path = out.with_name(f".{out.name}.resume")
        self._fingerprint = fingerprint

    def load(self, build: Callable[..., State]) -> State | None:
        """Return the state at which the training stopped, or None if there is nothing to go on from.

        Parameters
        ----------
        build : callable
            Makes a state of the values that were stored.

        Raises
        ------
        CheckpointError
            If the file is damaged, or belongs to other settings or data.
        """
        if not self.path.exists():
            return None
        try:
            content = read_tensors(self.path)
            fingerprint, state = content["settings"], build(*content["state"])
        except (CheckpointError, KeyError, TypeError) as error:
            raise _damaged(self.path) from error
        if fingerprint != self._fingerprint:
            raise _of_another_training(self.path)
        return state

    def store(self, state: Sequence[Any]) -> None:
        """Replace the file."""
        write_tensors(self.path, {"settings": self._fingerprint, "state": list(state)})

    def remove(self) -> None:
        """Forget the training: it is finished."""
        self.path.unlink(missing_ok=True)


class ResumeFolder:
    """A hidden folder beside the checkpoint, for a training that keeps files of its own.

    Parameters
    ----------
    out : Path
        The checkpoint that the training is to write.
    fingerprint : str
        See `training_fingerprint`.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path = out.with_name(f".{out.name}.training")
        self._fingerprint = fingerprint
        self._note = self.path / "state.json"

    def open(self, *, resume: bool) -> float:
        """Make the folder, or find what an interrupted training left in it.

        Returns
        -------
        float
            Seconds that the interrupted training has taken; 0 for a new one.

        Raises
        ------
        CheckpointError
            If the folder belongs to other settings.
        StorageError
            If the file system refuses.
        """
        try:
            if self._note.is_file() and resume:
                state = json.loads(self._note.read_text(encoding="utf-8"))
                if state["settings"] != self._fingerprint:
                    raise _of_another_training(self.path)
                return float(state["elapsed_s"])
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror or error}); free space") from error
        except (ValueError, KeyError) as error:
            raise _damaged(self._note) from error
        return 0.0

    def note(self, elapsed_s: float) -> None:
        """Record that there is something to go on from, and the time that it has taken."""
        write_text(self._note, json.dumps({"settings": self._fingerprint, "elapsed_s": elapsed_s}))

    def remove(self) -> None:
        """Forget the training: it is finished."""
        shutil.rmtree(self.path, ignore_errors=True)


def _of_another_training(path: Path) -> CheckpointError:
    """Say that what an interrupted training left cannot be continued with the present settings."""
    return CheckpointError(
        f"{path}: left by an interrupted training with other settings or data; "
        "repeat those to go on, or start anew with --no-resume"
    )


def _damaged(path: Path) -> CheckpointError:
    """Say that what an interrupted training left cannot be read."""
    return CheckpointError(f"{path}: the state of an interrupted training is damaged; start anew with --no-resume")
