"""Finds the labels of a finished run, and which slices of the volume they cover."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.pipeline.journal import RUN_FILE

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Segmentation:
    """A label volume on disk and the slice of the segmented volume that its first slice shows; None: not recorded."""

    path: Path
    first_slice: int | None


def find_segmentation(path: Path) -> Segmentation:
    """Resolve the folder of a run, or a label file, to labels and their place in z.

    Parameters
    ----------
    path : Path
        A folder that `segment` wrote, the label file in it, or any label volume.

    Raises
    ------
    VolumeError
        If the run is not complete or its record is damaged.
    """
    record = path / RUN_FILE if (path / RUN_FILE).is_file() else path.parent / RUN_FILE
    if not record.is_file():
        return Segmentation(path, None)
    try:
        document = json.loads(record.read_bytes())
        names = [name for name in document["outputs"] if name.startswith("labels.")]
        first_slice = int(document["z_offset"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if record.parent != path:  # some other program's file of that name
            return Segmentation(path, None)
        raise VolumeError(f"{record}: the record of the run is damaged; run `segment` again") from error
    if record.parent == path:
        if not names:
            raise VolumeError(f"{path}: the run has no labels; run `segment` again")
        return Segmentation(path / names[0], first_slice)
    return Segmentation(path, first_slice if path.name in names else None)
