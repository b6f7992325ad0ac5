"""What an Ultralytics checkpoint holds, read in a closed process: a description and arrays, no class of the library."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.errors import CheckpointError
from dendsam_deploy.models.closed_process import ClosedTask, run_closed
from dendsam_deploy.models.detector_conversion import ARRAYS_FILE, DESCRIPTION_FILE
from dendsam_deploy.models.detector_names import check_detector_names
from dendsam_deploy.models.stored_tensor import STATISTICS
from dendsam_deploy.models.tensor_file import open_tensor_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

COCO_IMAGE_SIZE_PX = 640


@dataclass(frozen=True, slots=True)
class DetectorRecord:
    """How a detector of ours came about.

    Parameters
    ----------
    tile_size_px : int
        Side of the tiles that it was trained on.
    model_pixel_size_nm : float or None
        Size of a tile pixel in training, where the training volume recorded its voxel size.
    zoom : float or None
        Tile px per slice px of the training volume.
    score_threshold : float or None
        Least score at which precision and recall balanced best on held-out tiles.
    summary : dict
        Plain values about the training: data, slices used and held out, scores, statistics of the boxes.
    """

    tile_size_px: int
    model_pixel_size_nm: float | None = None
    zoom: float | None = None
    score_threshold: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DetectorFile:
    """A detector as data.

    Parameters
    ----------
    model_class : str
        Ultralytics' class of the network, such as ``DetectionModel``.
    head : str
        Class of its last layer, such as ``Detect``.
    description : mapping
        Its layers, from which ultralytics builds it.
    architecture : str
        Such as ``yolo11n``.
    class_names : tuple of str
        One name per class.
    tensors : mapping of str to ndarray
        Its state dict.
    fused : tuple of str
        Layers that skip the normalisation behind them, because it is part of their weights.
    train_args : mapping
        Settings of the training.
    epoch : int or None
        Epochs finished by an interrupted training; -1 for a finished one.
    version, date, licence : str
        Of ultralytics, of the file, of the weights; empty where not recorded.
    record : DetectorRecord or None
        Present in checkpoints that this program trained.
    """

    model_class: str
    head: str
    description: Mapping[str, Any]
    architecture: str
    class_names: tuple[str, ...]
    tensors: Mapping[str, NDArray[Any]]
    fused: tuple[str, ...]
    train_args: Mapping[str, Any]
    epoch: int | None
    version: str
    date: str
    licence: str
    record: DetectorRecord | None

    @property
    def parameters(self) -> int:
        """Number of parameters; the running statistics of normalisation are none."""
        return sum(array.size for key, array in self.tensors.items() if not key.endswith(STATISTICS))

    @property
    def image_size_px(self) -> int:
        """Side of the square images of the training."""
        size = self.train_args.get("imgsz", COCO_IMAGE_SIZE_PX)
        sides = size if isinstance(size, list) else [size]
        return max((side for side in sides if isinstance(side, int) and side > 0), default=COCO_IMAGE_SIZE_PX)


def is_detector_file(names: frozenset[str]) -> bool:
    """Tell from the names that a checkpoint mentions whether Ultralytics made it."""
    return any(name.startswith("ultralytics.") for name in names)


def read_detector_file(path: Path) -> DetectorFile:
    """Read an Ultralytics checkpoint.

    The names that its pickle mentions are compared with an allow-list first. The file is then read by a process that
    has no network and little else (`models.closed_process`), which hands back plain values and arrays.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or holds another kind of model.
    UnsafeFileError
        If it mentions anything that is no part of a network.
    """
    with open_tensor_file(path) as file:
        check_detector_names(path, file.pickled)
    with tempfile.TemporaryDirectory(prefix="dendsam-deploy-") as made:
        folder = Path(made).resolve()
        run_closed(ClosedTask("dendsam_deploy.models.detector_conversion", "convert", path, folder))
        try:
            found = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
            with np.load(folder / ARRAYS_FILE, allow_pickle=False) as arrays:
                tensors = {key: arrays[f"t{index}"] for index, key in enumerate(found["tensors"])}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: could not be converted ({error!r:.100}); save it again") from error
    return _detector_file(found, tensors, path)


def _detector_file(found: dict[str, Any], tensors: dict[str, NDArray[Any]], path: Path) -> DetectorFile:
    """Put together what the closed process told."""
    description = found["description"]
    if not isinstance(description, dict):
        raise CheckpointError(f"{path}: its network has no description (yaml); save it again by ultralytics")
    names = found["names"]
    file = description.get("yaml_file") or found["file"]
    arguments = found["train_args"]
    return DetectorFile(
        model_class=found["class"],
        head=found["head"],
        description=description,
        architecture=Path(str(file)).stem if file else found["class"],
        class_names=tuple(map(str, names.values() if isinstance(names, dict) else names or ())),
        tensors=tensors,
        fused=tuple(found["fused"]),
        train_args=arguments if isinstance(arguments, dict) else {},
        epoch=found["epoch"] if isinstance(found["epoch"], int) else None,
        version=str(found["version"] or ""),
        date=str(found["date"] or ""),
        licence=str(found["license"] or ""),
        record=_record(found["dendsam"], path),
    )


def _record(raw: object, path: Path) -> DetectorRecord | None:
    """Read our own record of a checkpoint's training, if it has one."""
    if raw is None:
        return None
    known = {entry.name for entry in dataclasses.fields(DetectorRecord)}
    if not isinstance(raw, dict) or raw.keys() - known or "tile_size_px" not in raw:
        raise CheckpointError(f"{path}: written by another version of dendsam-deploy; its record cannot be read")
    return DetectorRecord(**raw)
