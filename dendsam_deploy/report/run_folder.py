"""Read the folder of a finished run into what its page shows."""

from __future__ import annotations

import csv
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.errors import IncompleteRunError, InputFileError
from dendsam_deploy.pipeline.journal import DETECTIONS_FILE, INSTANCES_FILE, LABEL_FILES, REPORT_FILE, RUN_FILE
from dendsam_deploy.report.overlays import LabelledSlice, Picture, draw_pictures
from dendsam_deploy.report.run_report import ObjectColumns, ProfileColumns, RunReport, write_run_report
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.open import open_labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from dendsam_deploy.volume.volume import VolumeReader

_PICTURES = 4
"""Slices that are shown."""

_PROFILE_COLUMNS = {
    "z": "z",
    "object_id": "id",
    "score": "score",
    "predicted_iou": "predicted_iou",
    "link_confidence": "link_confidence",
    "area_px": "area_px",
}
"""Columns of ``detections.csv`` by the names that they have here."""

_OBJECT_COLUMNS = {
    "object_id": "id",
    "z_first": "z_first",
    "z_last": "z_last",
    "slices": "slices",
    "voxels": "voxels",
    "mean_score": "mean_score",
    "mean_link_confidence": "mean_link_confidence",
}
"""Columns of ``instances.csv`` by the names that they have here."""

_WHOLE = frozenset({"z", "object_id", "z_first", "z_last", "slices", "voxels"})
"""Columns of whole numbers."""


def report_from_run(run_folder: Path, raw: VolumeReader | None) -> None:
    """Write ``report.html`` into the folder of a finished run.

    Parameters
    ----------
    run_folder : Path
        The folder that `segment_volume` filled.
    raw : VolumeReader or None
        The volume that was segmented, for the pictures; without it they show the labels alone.

    Raises
    ------
    IncompleteRunError
        The run is not finished.
    InputFileError
        A file of the run is damaged.
    StorageError
        Where the file system refuses.
    """
    write_run_report(run_folder / REPORT_FILE, read_run(run_folder, raw))


def read_run(run_folder: Path, raw: VolumeReader | None) -> RunReport:
    """Read the folder of a finished run; see `report_from_run`."""
    path = run_folder / RUN_FILE
    if not path.is_file():
        raise IncompleteRunError(f"{run_folder}: holds no {RUN_FILE}; run segment again to finish it, then report")
    try:
        document = json.loads(path.read_bytes())
        result, settings = document["result"], document["settings"]
        first_z, (_, *slice_hw) = int(document["z_offset"]), settings["input"]["shape_zyx"]
        voxel_size = settings["input"]["voxel_size_nm"]
        profiles = ProfileColumns(**_columns(run_folder / DETECTIONS_FILE, _PROFILE_COLUMNS))
        shape_zyx = (int(result["slices"]), int(slice_hw[0]), int(slice_hw[1]))
        return RunReport(
            name=Path(document["input"]).name,
            source=document["input"],
            shape_zyx=shape_zyx,
            first_z=first_z,
            voxel_size_nm=None if voxel_size is None else tuple(voxel_size),
            bundle=settings["bundle"]["name"],
            engine=result["engine"],
            device=result["device"],
            precision=result["precision"],
            notices=tuple(result["notices"]),
            seconds=result["seconds"],
            stage_seconds=result["stage_seconds"],
            limiting_stage=result["limiting_stage"],
            profiles=profiles,
            objects=ObjectColumns(**_columns(run_folder / INSTANCES_FILE, _OBJECT_COLUMNS)),
            pictures=_draw(run_folder, raw, first_z, slices_to_show(profiles.z - first_z, shape_zyx[0])),
            settings={"fingerprint": result["fingerprint"], **_flat(settings)},
            environment=_flat(document["environment"]),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputFileError(f"{path}: is damaged ({error!r}); run segment again with --restart") from error


def slices_to_show(z: NDArray[np.int64], depth: int) -> list[int]:
    """Choose slices that are spread over the volume and have objects, where any have.

    Parameters
    ----------
    z : ndarray, shape (N,), int64
        Slice of each object, counted from the first slice of the labels.
    depth : int
        Number of slices.

    Returns
    -------
    list of int
        Ascending.
    """
    with_objects = np.unique(z) if len(z) else np.arange(depth)
    wanted = (np.arange(_PICTURES) + 0.5) * depth / _PICTURES
    nearest = np.abs(with_objects[None] + 0.5 - wanted[:, None]).argmin(axis=1)
    return [int(z) for z in np.unique(with_objects[nearest])]


def _draw(run_folder: Path, raw: VolumeReader | None, first_z: int, slices: list[int]) -> tuple[Picture, ...]:
    """Draw some slices of the labels over the volume."""
    found = [run_folder / name for name in LABEL_FILES.values() if (run_folder / name).exists()]
    if not found:
        raise IncompleteRunError(f"{run_folder}: its labels are missing; run segment again to write them")
    with ExitStack() as stack:
        labels = stack.enter_context(open_labels(found[0]))
        return draw_pictures(
            LabelledSlice(
                z=first_z + z,
                image=None if raw is None else _image(raw, first_z + z),
                labels=labels.read(z).astype(np.uint32, copy=False),
            )
            for z in slices
        )


def _image(raw: VolumeReader, z: int) -> NDArray[np.uint8]:
    """Read a slice as the models saw it."""
    return to_uint8(raw.read(z), f"{raw.info.source}: slice {z}")


def _columns(path: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """Read some columns of a table."""
    if not path.is_file():
        raise IncompleteRunError(f"{path}: missing; run segment again to write it")
    with path.open(newline="") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        places = [header.index(name) for name in names.values()]
        values = np.fromiter((float(cell) for cell in _cells(lines, places)), np.float64).reshape(-1, len(places))
    return {
        name: column.astype(np.int64 if name in _WHOLE else np.float64)
        for name, column in zip(names, values.T, strict=True)
    }


def _cells(lines: Iterator[list[str]], places: list[int]) -> Iterator[str]:
    """Yield the wanted cells of all lines, one after the other."""
    for line in lines:
        for place in places:
            yield line[place]


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested document as names with dots and values as a person would write them."""
    flat: dict[str, str] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = _readable(value)
    return flat


def _readable(value: object) -> str:
    """Return a value of a JSON document as text."""
    if isinstance(value, list):
        return ", ".join(map(_readable, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else str(value)
