"""The objects of a finished run, written for other programs: COCO, YOLO, ImageJ."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from dendsam_deploy.errors import InputFileError, InvalidArgumentError
from dendsam_deploy.pipeline.journal import DETECTIONS_FILE, OTHER_FILES, read_journal
from dendsam_deploy.volume.coco_masks import write_coco
from dendsam_deploy.volume.exported_masks import SliceMasks
from dendsam_deploy.volume.imagej_rois import write_rois
from dendsam_deploy.volume.yolo_boxes import write_yolo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from dendsam_deploy.pipeline.journal import Settings

OtherFormat = Literal["coco", "yolo", "roi"]
OTHER_FORMATS: tuple[OtherFormat, ...] = get_args(OtherFormat)


def check_formats(formats: Sequence[str]) -> tuple[OtherFormat, ...]:
    """Return names of formats, each once.

    Raises
    ------
    InvalidArgumentError
        For a name that is none.
    """
    for name in formats:
        if name not in OTHER_FORMATS:
            raise InvalidArgumentError(f"there is no format {name!r}; choose among {', '.join(OTHER_FORMATS)}")
    return tuple(name for name in OTHER_FORMATS if name in formats)


def write_run_formats(folder: Path, formats: Sequence[OtherFormat]) -> dict[str, Path]:
    """Write the objects of a finished run of `segment` into its folder, in formats of other programs.

    Parameters
    ----------
    folder : Path
        The run.
    formats : sequence of str
        ``coco`` (`coco_masks.write_coco`), ``yolo`` (`yolo_boxes.write_yolo`), ``roi`` (`imagej_rois.write_rois`).

    Returns
    -------
    dict
        The file or folder of each.

    Raises
    ------
    InputFileError
        A table of the run is damaged.
    IncompleteRunError
        A slice of the run is missing.
    StorageError
        Where the file system refuses.
    """
    if not formats:
        return {}
    header = read_journal(folder).header.settings
    source = str(folder.resolve().name.removesuffix(".dendsam"))
    objects = _objects_by_slice(folder / DETECTIONS_FILE)
    return write_formats(folder, formats, lambda: _run_masks(folder, header, objects), source)


def write_formats(
    folder: Path, formats: Sequence[OtherFormat], masks: Callable[[], Iterable[SliceMasks]], source: str
) -> dict[str, Path]:
    """Write masks into a folder, in formats of other programs; see `write_run_formats`.

    Parameters
    ----------
    folder : Path
        Where to.
    formats : sequence of str
        Which.
    masks : callable
        Returns the masks, slice by slice, anew at each call.
    source : str
        Name of the volume.
    """
    written: dict[str, Path] = {}
    for name in check_formats(formats):
        path = written[name] = folder / OTHER_FILES[name]
        if name == "coco":
            write_coco(path, masks(), source)
        elif name == "yolo":
            write_yolo(path, masks())
        else:
            write_rois(path, masks())
    return written


def _run_masks(folder: Path, settings: Settings, objects: dict[int, dict[int, int]]) -> Iterator[SliceMasks]:
    """Yield the objects of a run, slice by slice."""
    journal = read_journal(folder)
    try:
        first, stop = settings["slices"]
        _, height, width = settings["input"]["shape_zyx"]
        slices, slice_hw = range(int(first), int(stop)), (int(height), int(width))
    except (KeyError, TypeError, ValueError) as error:
        raise InputFileError(
            f"{folder}: the record of the run is damaged ({error!r}); segment with --restart"
        ) from error
    for z in slices:
        found = journal.load(z)
        ids = objects.get(z, {})
        if sorted(ids) != found.ids.tolist():
            raise InputFileError(f"{folder / DETECTIONS_FILE}: does not list the objects of slice {z}; segment again")
        yield SliceMasks(
            z,
            slice_hw,
            found.run_lengths,
            np.array([ids[label] for label in found.ids.tolist()], np.int64),
            (found.scores * found.predicted_iou).astype(np.float64),
        )


def _objects_by_slice(path: Path) -> dict[int, dict[int, int]]:
    """Read which 3-D object each label of each slice belongs to."""
    found: dict[int, dict[int, int]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.setdefault(int(row["z"]), {})[int(row["label"])] = int(row["id"])
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputFileError(f"{path}: cannot be read ({error!r}); run segment again to write it") from error
    return found
