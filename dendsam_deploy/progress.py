"""How long work reports on itself: a plain record handed to a plain function. The command line draws bars from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a piece of work.

    Parameters
    ----------
    stage : str
        What is being done, such as ``segment`` or ``train``.
    done, total : float
        Units finished and units in all.
    note : str
        A few words worth showing beside the bar, such as the current loss.
    """

    stage: str
    done: float
    total: float
    note: str = ""


ProgressCallback = Callable[[Progress], None]


def no_progress(progress: Progress) -> None:
    """Ignore a progress record; the default of every function that takes a callback."""
