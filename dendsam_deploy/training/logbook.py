"""The course of a training in files that other programs read: a CSV table, settings as JSON, TensorBoard events."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import TYPE_CHECKING

from dendsam_deploy.durable import make_folder, storage_errors, write_text
from dendsam_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Any, Self

    from dendsam_deploy.training.story import HistoryRow


def logbook_folder(out: Path) -> Path:
    """Return the folder beside a checkpoint in which the course of its training is kept.

    Examples
    --------
    >>> from pathlib import Path
    >>> logbook_folder(Path("ca1-sam.pt")).name
    'ca1-sam.training'
    """
    return out.with_name(f"{out.stem}.training")


class Logbook:
    """``history.csv``, ``config.json`` and, where tensorboard is installed, ``tensorboard/`` of one training.

    A context manager. The table is replaced whole with every row, so that it is complete whenever it is looked at.

    Parameters
    ----------
    folder : Path
        See `logbook_folder`; made where it is missing.
    config : mapping
        Plain values for ``config.json``.
    axis : str
        Column that counts, such as ``step`` or ``epoch``.
    resume_at : float or None
        Go on behind the row of this count; later rows of an interrupted training are struck out. None begins anew.

    Raises
    ------
    CheckpointError
        If the table to go on from is damaged.
    StorageError
        If the file system refuses.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], axis: str, resume_at: float | None = None) -> None:
        make_folder(folder)
        self.path, self._axis = folder / "history.csv", axis
        earlier = read_history(self.path) if resume_at is not None and self.path.is_file() else ()
        self._rows: list[HistoryRow] = [row for row in earlier if resume_at is not None and row[axis] <= resume_at]
        write_text(folder / "config.json", json.dumps(config, indent=2, default=str, ensure_ascii=False) + "\n")
        self._board = _open_board(folder / "tensorboard", resume_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    @property
    def rows(self) -> tuple[HistoryRow, ...]:
        """All rows so far, those of an interrupted training included."""
        return tuple(self._rows)

    def add(self, row: HistoryRow) -> None:
        """Note one judgement or epoch.

        Raises
        ------
        StorageError
            If the file system refuses.
        """
        self._rows.append(dict(row))
        write_text(self.path, _csv_text(self._rows))
        if self._board is not None:
            with storage_errors(self.path.parent / "tensorboard"):
                for name, value in row.items():
                    if name != self._axis and math.isfinite(value):
                        self._board.add_scalar(name, value, round(row[self._axis]))
                self._board.flush()


def read_history(path: Path) -> tuple[HistoryRow, ...]:
    """Read a table that a `Logbook` wrote.

    Raises
    ------
    CheckpointError
        If it is missing or damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return tuple(
                {name: math.nan if value == "" else float(value) for name, value in row.items()}
                for row in csv.DictReader(stream, strict=True)
            )
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise CheckpointError(
            f"{path}: the course of the training cannot be read ({error}); start anew with --no-resume"
        ) from error


def _csv_text(rows: list[HistoryRow]) -> str:
    """Return a table whose columns are the names of all rows, in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if math.isnan(value) else f"{value:.9g}" for name, value in row.items()} for row in rows)
    return stream.getvalue()


def _open_board(folder: Path, resume_at: float | None) -> Any:  # noqa: ANN401 - untyped, and absent where not installed
    """Return a writer of TensorBoard events; None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional library, slow to import
    except ImportError:
        return None
    # What an interrupted training noted behind the point it goes on from is to be shown no more.
    purge = None if resume_at is None else math.floor(resume_at) + 1
    with storage_errors(folder):
        if resume_at is None:
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()  # those of an earlier training would be drawn into the same curves
        return SummaryWriter(str(folder), purge_step=purge)
