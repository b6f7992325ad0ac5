"""The hidden folder beside a checkpoint in which a training keeps what it needs to go on after an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING

from dendsam_deploy.durable import write_text
from dendsam_deploy.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class ResumeFolder:
    """A folder that belongs to one training: one checkpoint, one set of settings, one input.

    Parameters
    ----------
    out : Path
        The checkpoint that the training is to write.
    settings : mapping
        Everything that decides about the result.
    """

    def __init__(self, out: Path, settings: Mapping[str, object]) -> None:
        self.path = out.with_name(f".{out.name}.training")
        text = json.dumps(settings, default=str, sort_keys=True)
        self._settings = hashlib.sha256(text.encode()).hexdigest()
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
                if state["settings"] != self._settings:
                    raise CheckpointError(
                        f"{self.path}: left by an interrupted training with other settings or data; "
                        "repeat those to go on, or start anew with --no-resume"
                    )
                return float(state["elapsed_s"])
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror or error}); free space") from error
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{self._note}: damaged; start anew with --no-resume") from error
        return 0.0

    def note(self, elapsed_s: float) -> None:
        """Record that there is something to go on from, and the time that it has taken."""
        write_text(self._note, json.dumps({"settings": self._settings, "elapsed_s": elapsed_s}))

    def remove(self) -> None:
        """Forget the training: it is finished."""
        shutil.rmtree(self.path, ignore_errors=True)
