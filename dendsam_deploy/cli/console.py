"""What a command says, and where: its result on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

import click

from dendsam_deploy.durable import write_text
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

PLAIN_INTERVAL_S = 30.0
"""Seconds between two lines of progress where nobody watches a terminal."""

_REDRAW_INTERVAL_S = 0.1
_BAR_WIDTH = 24


class CheckFailedError(click.ClickException):
    """What was checked did not pass; the result itself has been given."""

    exit_code = 1


@dataclass(slots=True)
class Console:
    """The two streams of a command.

    Parameters
    ----------
    verbosity : int
        Below 0 only results and errors are shown; 1 adds the warnings of other libraries, 2 their log and tracebacks.
    """

    verbosity: int = 0

    def set_verbosity(self, verbosity: int) -> None:
        """Decide how much is shown from now on, by this program and by the libraries that it uses."""
        self.verbosity = verbosity
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger().setLevel({0: logging.CRITICAL, 1: logging.WARNING}.get(max(0, verbosity), logging.DEBUG))
        warnings.simplefilter("default" if verbosity > 0 else "ignore")

    def note(self, text: str) -> None:
        """Tell something that is not the result."""
        if self.verbosity >= 0:
            print(text, file=sys.stderr)

    def result(self, text: str, document: Mapping[str, object], json_file: Path | None = None) -> None:
        """Give the result: as text on stdout, and as JSON where the user asked for it.

        Parameters
        ----------
        text : str
            For people.
        document : mapping
            For programs.
        json_file : Path or None
            File for the document; ``-`` prints it on stdout in place of the text.

        Raises
        ------
        StorageError
            If the file cannot be written.
        """
        as_json = json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n"
        to_stdout = str(json_file) == "-"
        if json_file is not None and not to_stdout:
            write_text(json_file, as_json)
        sys.stdout.write(as_json if to_stdout else f"{text}\n")
        sys.stdout.flush()

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback]:
        """Show how a piece of work goes on for as long as the block runs."""
        if self.verbosity < 0:
            yield no_progress
        elif sys.stderr.isatty():
            bar = _Bar(sys.stderr)
            try:
                yield bar
            finally:
                bar.finish()
        else:
            yield PlainLines(sys.stderr)


@dataclass(slots=True)
class _StageTimer:
    """Knows since when the present stage runs, and from that when it will end."""

    clock: Callable[[], float]
    stage: str = ""
    started_s: float = 0.0

    def describe(self, progress: Progress) -> str:
        """Return the share that is done and the time left, such as ``40 %, 1:20 left``."""
        now = self.clock()
        if progress.stage != self.stage:
            self.stage, self.started_s = progress.stage, now
        share = min(1.0, progress.done / progress.total) if progress.total > 0 else 0.0
        elapsed = now - self.started_s
        if not 0 < share < 1 or elapsed <= 0:
            return f"{share:4.0%}"
        return f"{share:4.0%}, {format_duration(elapsed * (1 - share) / share)} left"


@dataclass(slots=True)
class PlainLines:
    """Progress for a log file: one line every 30 s."""

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    _timer: _StageTimer = field(init=False)
    _last_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._timer = _StageTimer(self.clock)
        self._last_s = self.clock()

    def __call__(self, progress: Progress) -> None:
        """Print a line if the last one is old enough."""
        text = self._timer.describe(progress)
        if self.clock() - self._last_s >= PLAIN_INTERVAL_S:
            self._last_s = self.clock()
            print(f"{progress.stage}: {text.strip()}  {progress.note}".rstrip(), file=self.stream, flush=True)


@dataclass(slots=True)
class _Bar:
    """Progress for a terminal: one line that is drawn over and over."""

    stream: TextIO
    _timer: _StageTimer = field(default_factory=lambda: _StageTimer(time.monotonic))
    _last_s: float = 0.0
    _is_drawn: bool = False

    def __call__(self, progress: Progress) -> None:
        """Redraw the bar, but not more often than an eye can follow."""
        now = time.monotonic()
        is_new_stage = progress.stage != self._timer.stage
        if is_new_stage:
            self.finish()
        elif now - self._last_s < _REDRAW_INTERVAL_S and progress.done < progress.total:
            return
        self._last_s = now
        text = self._timer.describe(progress)
        share = min(1.0, progress.done / progress.total) if progress.total > 0 else 0.0
        bar = "█" * round(_BAR_WIDTH * share)
        line = f"{progress.stage:<10} {bar:░<{_BAR_WIDTH}} {text}  {progress.note}"
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r{line[:width]}\x1b[K")
        self.stream.flush()
        self._is_drawn = True

    def finish(self) -> None:
        """Leave the bar as it stands and go to the next line."""
        if self._is_drawn:
            self.stream.write("\n")
            self._is_drawn = False


def format_duration(seconds: float) -> str:
    """Write a time as ``m:ss`` or ``h:mm:ss``.

    Examples
    --------
    >>> format_duration(80), format_duration(4000)
    ('1:20', '1:06:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
