"""The page of a training: how it went, how good the result is, on what it learnt, and what it still gets wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dendsam_deploy.durable import make_folder, published
from dendsam_deploy.report.page import render_page

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.training.story import TrainingStory


def write_training_report(folder: Path, story: TrainingStory) -> Path:
    """Write ``report.html`` of a training, whole or not at all.

    Parameters
    ----------
    folder : Path
        Where it goes, usually `training.logbook.logbook_folder`; made where it is missing.
    story : TrainingStory
        What there is to tell.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    make_folder(folder)
    path = folder / "report.html"
    with published(path) as stream:
        stream.write(render_training_report(story).encode())
    return path


def render_training_report(story: TrainingStory) -> str:
    """Return the page of a training."""
    return render_page("training.html.jinja", {"story": story})
