"""Boxes that were drawn elsewhere: a folder of YOLO text files, a CSV table, or a label volume."""

from __future__ import annotations

import csv
import math
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dendsam_deploy.errors import InputFileError
from dendsam_deploy.instances import Detections
from dendsam_deploy.volume.label_objects import boxes_from_labels
from dendsam_deploy.volume.open import open_labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from dendsam_deploy.volume.volume import VolumeReader

_CSV_COLUMNS = ("z", "x0", "y0", "x1", "y1")
_TOLERANCE_PX = 1.0  # text files are rounded: a box may end that far outside of its slice


class BoxSource(Protocol):
    """Boxes of the slices of one volume; a context manager."""

    def for_slice(self, z: int) -> Detections:
        """Return the boxes of slice `z`, slice px; none where the source has none."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def open_boxes(path: Path, shape_zyx: tuple[int, int, int]) -> BoxSource:
    """Open boxes that take the place of a detector's.

    Parameters
    ----------
    path : Path
        A folder of YOLO text files (``class xc yc w h [score]``, parts of the slice), one file per slice; a CSV file
        with the columns ``z, x0, y0, x1, y1`` and perhaps ``score``, slice px, pixel edges, slices counted from 0; or a
        volume of labels, each piece of which gives its tight box. A score that is not given is 1.
    shape_zyx : (int, int, int)
        Shape of the volume that the boxes belong to.

    Raises
    ------
    InputFileError
        Names the file and line, what was found and what was expected.
    """
    if not path.exists():
        raise InputFileError(f"{path}: does not exist; give a folder of YOLO txt files, a CSV or a label volume")
    if path.is_dir() and (files := sorted(file for file in path.glob("*.txt") if _is_box_file(file))):
        return _BoxTable(_read_yolo(path, files, shape_zyx))
    if path.suffix.lower() == ".csv":
        return _BoxTable(_read_csv(path, shape_zyx))
    return _LabelBoxes(open_labels(path), shape_zyx)


class _BoxTable:
    """Boxes in memory."""

    def __init__(self, slices: Mapping[int, Detections]) -> None:
        self._slices = slices

    def for_slice(self, z: int) -> Detections:
        """Return the boxes of slice `z`."""
        return self._slices.get(z, Detections.none())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


_MANY_PIECES, _SPECK_PX = 500, 5


class _LabelBoxes:
    """Boxes around the pieces of the labels of a volume, slice by slice."""

    def __init__(self, labels: VolumeReader, shape_zyx: tuple[int, int, int]) -> None:
        if labels.info.shape_zyx != shape_zyx:
            with labels:  # nobody else will close it
                raise InputFileError(
                    f"{labels.info.source}: its shape {labels.info.shape_zyx} (z, y, x) differs from {shape_zyx} of "
                    "the volume; give labels of the same volume"
                )
        self._labels = labels

    def for_slice(self, z: int) -> Detections:
        """Return the boxes of slice `z`."""
        found = boxes_from_labels(self._labels.read(z).astype(np.uint32))
        if len(found.areas_px) > _MANY_PIECES and np.median(found.areas_px) < _SPECK_PX:
            raise InputFileError(
                f"{self._labels.info.source}: slice {z} has {len(found.areas_px)} pieces of labels, most of them "
                f"smaller than {_SPECK_PX} px; give instance labels: this may be the image itself"
            )
        boxes = found.boxes_xyxy
        return Detections(boxes, np.ones(len(boxes), np.float32))

    def __enter__(self) -> Self:
        self._labels.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._labels.__exit__(kind, error, traceback)


def _is_box_file(file: Path) -> bool:
    """Tell YOLO's box files from hidden ones and from the list of classes that labelling programs write beside them."""
    return file.name[0] not in "._" and file.name != "classes.txt"


def _read_csv(path: Path, shape_zyx: tuple[int, int, int]) -> dict[int, Detections]:
    """Read a table of boxes."""
    rows: dict[int, list[list[float]]] = {}
    with _readable(path), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip().lower() for name in next(reader, [])]
        if missing := [name for name in _CSV_COLUMNS if name not in header]:
            raise InputFileError(
                f"{path}: its first line lacks {', '.join(missing)} (found {', '.join(header) or 'nothing'}); expected "
                f"{','.join(_CSV_COLUMNS)}[,score], separated by commas"
            )
        if len(set(header)) < len(header):
            raise InputFileError(f"{path}: its first line names a column twice ({', '.join(header)}); keep one of them")
        for words in reader:
            if not any(word.strip() for word in words):
                continue
            where = f"{path}:{reader.line_num}"
            if len(words) != len(header):
                raise InputFileError(
                    f"{where}: has {len(words)} columns, its first line {len(header)}; correct the line"
                )
            row = dict(zip(header, words, strict=True))
            z, *box = _numbers([row[name] for name in _CSV_COLUMNS], where)
            if z != int(z) or not 0 <= z < shape_zyx[0]:
                raise InputFileError(
                    f"{where}: slice {z:g}, the volume has slices 0 to {shape_zyx[0] - 1}; correct the line"
                )
            score = _numbers([row.get("score", "1")], where)[0]
            rows.setdefault(int(z), []).append(_checked(box, score, shape_zyx, where))
    return {z: _detections(found) for z, found in rows.items()}


def _read_yolo(folder: Path, files: Sequence[Path], shape_zyx: tuple[int, int, int]) -> dict[int, Detections]:
    """Read one text file per slice."""
    height, width = shape_zyx[1:]
    slices = {}
    for z, file in _numbered(folder, files, shape_zyx[0]).items():
        rows = []
        with _readable(file):
            lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            where, words = f"{file}:{number}", line.split()
            if not words:
                continue
            if len(words) not in (5, 6):
                raise InputFileError(
                    f"{where}: has {len(words)} columns, expected class xc yc w h [score]; correct the line"
                )
            x, y, w, h, *score = _numbers(words[1:], where)
            if max(abs(x), abs(y), w, h) > 1.01:
                raise InputFileError(
                    f"{where}: has values above 1, expected parts of the slice; divide pixels by its size"
                )
            box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            rows.append(_checked(box, score[0] if score else 1.0, shape_zyx, where))
        slices[z] = _detections(rows)
    return slices


def _numbered(folder: Path, files: Sequence[Path], depth: int) -> dict[int, Path]:
    """Tell which slice each file belongs to.

    As many files as slices are taken in natural order. Fewer, because slices without boxes often get no file, are told
    by the last number in their names, if it is certain whether those count from 0 or from 1.
    """
    runs = {file: [int(run) for run in re.findall(r"\d+", file.name)] for file in files}
    if len(files) == depth:
        return dict(enumerate(sorted(files, key=lambda file: (re.sub(r"\d+", "#", file.name), runs[file]))))
    last = [runs[file][-1] if runs[file] else -1 for file in files]
    remedy = "add an empty file for each slice without boxes, or give a CSV"
    if len(files) > depth or min(last) < 0 or max(last) > depth or len(set(last)) < len(last):
        raise InputFileError(
            f"{folder}: {len(files)} txt files do not number the {depth} slices of the volume; {remedy}"
        )
    if min(last) > 0 and max(last) < depth:
        raise InputFileError(
            f"{folder}: {len(files)} txt files, numbered {min(last)} to {max(last)}, for {depth} slices: whether they "
            f"count from 0 or from 1 cannot be told; {remedy}"
        )
    first = 0 if min(last) == 0 else 1
    if first == 0 and max(last) == depth:
        raise InputFileError(
            f"{folder}: has txt files for slices 0 and {depth}, the volume has {depth} slices; {remedy}"
        )
    return {number - first: file for number, file in zip(last, files, strict=True)}


def _numbers(words: Sequence[str], where: str) -> list[float]:
    """Read finite numbers."""
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise InputFileError(f"{where}: {error}; correct the line") from error
    if not all(math.isfinite(number) for number in numbers):
        raise InputFileError(f"{where}: holds a number that is not finite; correct the line")
    return numbers


def _checked(box: Sequence[float], score: float, shape_zyx: tuple[int, int, int], where: str) -> list[float]:
    """Return a box, cut off at the slice's border, and its score as one row."""
    height, width = shape_zyx[1:]
    x0, y0, x1, y1 = box
    if not 0 <= score <= 1:
        raise InputFileError(f"{where}: has the score {score:g}, expected 0 to 1; correct the line")
    beyond = max(-x0, -y0, x1 - width, y1 - height)
    inside = [max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)]
    if inside[2] <= inside[0] or inside[3] <= inside[1] or beyond > _TOLERANCE_PX:
        raise InputFileError(
            f"{where}: the box {x0:g}, {y0:g} to {x1:g}, {y1:g} px is empty or leaves the slice of {width} x {height} "
            "px; correct the line"
        )
    return [*inside, score]


def _detections(rows: Sequence[Sequence[float]]) -> Detections:
    """Make detections of rows (x0, y0, x1, y1, score)."""
    table = np.array(rows, np.float32).reshape(-1, 5)
    return Detections(np.ascontiguousarray(table[:, :4]), np.ascontiguousarray(table[:, 4]))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn failures to read a text file into ours."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: not a text file; expected boxes as text") from error
    except (OSError, csv.Error) as error:
        raise InputFileError(f"{path}: cannot be read ({error}); check the file and its permissions") from error
