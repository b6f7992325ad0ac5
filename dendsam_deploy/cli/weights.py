"""Weights on the command line: a path, or a name that `models.named_weights` knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console


def weights_file(console: Console, name_or_path: Path) -> Path:
    """Return the file that the user means, fetched with a progress bar where that is needed."""
    from dendsam_deploy.models.named_weights import resolve

    with console.progress() as progress:
        return resolve(name_or_path, console.note, progress)


def with_weights(console: Console, given: dict[str, Any], *fields: str) -> dict[str, Any]:
    """Return options in which those fields that are given name files."""
    return given | {field: weights_file(console, given[field]) for field in fields if field in given}
