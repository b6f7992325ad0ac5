"""The labelled volumes of a training: one on the command line, or several, one line each, in a file.

Known without torch, so that mistakes in such a file are found before anything is loaded.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dendsam_deploy.errors import InvalidArgumentError, VolumeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST_BYTES = 1 << 20
"""A longer file is no list of volumes but, say, a volume."""

_CALLED = {
    "volume": ("volume", "image", "raw"),
    "labels": ("labels", "label", "truth"),
    "slices": ("slices",),
    "train": ("train", "train_slices"),
    "held_out": ("held_out", "heldout", "holdout"),
    "weight": ("weight",),
    "voxel_size": ("voxel_size", "voxel_size_nm", "voxelsize"),
}
_COLUMN_OF = {word: column for column, words in _CALLED.items() for word in words}
_POSITIONAL = ("volume", "labels", "slices", "weight", "voxel_size")
_EXAMPLE = "such as: raw.tif labels.tif slices=0:80 weight=2 voxel-size=40,15,15"


@dataclass(frozen=True, slots=True)
class LabelledPaths:
    """Where one labelled volume of a training lies and what is said of it.

    Parameters
    ----------
    volume, labels : Path
        Image and instance labels of the same shape.
    slices : (int, int) or None
        Half-open range of slices that may be used; None: as the training's options say.
    train : tuple of (int, int)
        Half-open ranges that train, of those that may; empty: all that may.
    held_out : tuple of (int, int)
        Half-open ranges that judge and never train; empty: as the training's options say.
    only_teaches : bool
        Whether it holds nothing out.
    weight : float
        How often it is drawn from, relative to the others.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)`` in place of what the file records; None: as the training's options say.
    place : str
        Where it is named, for messages; empty for the command line.
    """

    volume: Path
    labels: Path
    slices: tuple[int, int] | None = None
    train: tuple[tuple[int, int], ...] = ()
    held_out: tuple[tuple[int, int], ...] = ()
    only_teaches: bool = False
    weight: float = 1.0
    voxel_size_nm: tuple[float, float, float] | None = None
    place: str = ""


def training_volumes(
    volume: Path | None, labels: Path | None, data_file: Path | None = None
) -> tuple[LabelledPaths, ...]:
    """Return the volumes of a training: the one that was named, then those that a file lists.

    Parameters
    ----------
    volume, labels : Path or None
        One labelled volume; both or none.
    data_file : Path or None
        See `read_volume_list`.

    Raises
    ------
    InvalidArgumentError
        If no volume is named, or one without its labels.
    VolumeError
        If the file cannot be used.
    """
    if (volume is None) != (labels is None):
        raise InvalidArgumentError("a volume and its labels go together: give both VOLUME and LABELS, or --data alone")
    named = () if volume is None or labels is None else (LabelledPaths(Path(volume), Path(labels)),)
    listed = () if data_file is None else read_volume_list(Path(data_file))
    if not named and not listed:
        raise InvalidArgumentError(
            "nothing to train on: give a VOLUME and its LABELS, or a file that lists several with --data"
        )
    return named + listed


def read_volume_list(path: Path) -> tuple[LabelledPaths, ...]:
    """Read a file that names one labelled volume in each line.

    A line holds the volume, its labels and, where they are needed, the slices to use, a weight and the voxel size. It
    is either words, ``raw.tif labels.tif slices=0:80 held-out=70:80 weight=2 voxel-size=40,15,15``, or a row of a table
    with commas, semicolons or tabs, whose first line may name the columns ``volume, labels, slices, held_out, weight,
    voxel_size``. Without such a line they come in the order ``volume, labels, slices, weight, voxel_size``. Paths are
    relative to the folder of the file; a name with spaces stands in quotes. Empty lines and lines that begin with ``#``
    are skipped. ``held-out=none`` makes a volume teach and never judge, and
    ``train=0:4`` makes no others than these slices teach.

    Parameters
    ----------
    path : Path
        The file, UTF-8.

    Returns
    -------
    tuple of LabelledPaths
        In the order of the lines.

    Raises
    ------
    VolumeError
        If the file is missing or no such list; names the line.
    """
    lines = [(number, line) for number, line in enumerate(_text(path).splitlines(), 1) if _is_content(line)]
    if not lines:
        raise VolumeError(f"{path}: names no volume; expected one in each line, {_EXAMPLE}")
    split = _splitter(lines[0][1], path)
    columns: Sequence[str] | None = None
    found: list[LabelledPaths] = []
    for number, line in lines:
        place = f"{path}: line {number}"
        words = _split_line(split, line, place)
        if number == lines[0][0] and _is_header(words, path.parent):
            columns = _header(words, place)
            continue
        found.append(_entry(_named_values(words, columns, place), path.parent, place))
    if not found:
        raise VolumeError(f"{path}: names columns but no volume; expected one in each further line")
    return tuple(found)


def _text(path: Path) -> str:
    """Return the text of a file, which may be one that a spreadsheet wrote."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise VolumeError(
                f"{path}: {path.stat().st_size} bytes are no list of volumes; expected a text file, {_EXAMPLE}"
            )
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise VolumeError(f"{path}: the list of volumes cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise VolumeError(
            f"{path}: not UTF-8 text; expected a list of volumes, one in each line, {_EXAMPLE}"
        ) from error


def _is_content(line: str) -> bool:
    return bool(line.strip(" \t,;")) and not line.lstrip().startswith("#")


def _splitter(line: str, path: Path) -> str:
    """Return what separates the columns, as the first line shows it; a blank stands for words of a shell."""
    if "\t" in line:
        return "\t"
    if path.suffix.lower() == ".csv":
        return ";" if ";" in line and "," not in line else ","
    first = re.match(r"""\s*("[^"]*"|'[^']*'|[^\s,;"']+)\s*([,;]?)""", line)
    return (first and first[2]) or " "


def _is_header(words: Sequence[str], folder: Path) -> bool:
    """Tell whether the first line names columns; files may bear the names of columns, too, if they exist."""
    columns = [_column(word) for word in words]
    return columns[0] is not None and "labels" in columns and not (folder / words[0]).exists()


def _split_line(separator: str, line: str, place: str) -> list[str]:
    """Split a line into trimmed words."""
    try:
        if separator == " ":
            return shlex.split(line, comments=False)
        words = next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True))
    except (ValueError, csv.Error) as error:
        raise VolumeError(f"{place}: {error}; put quotes on both sides of a name with spaces") from error
    return [word.strip() for word in words]


def _column(word: str) -> str | None:
    """Return the column that a word names."""
    return _COLUMN_OF.get(word.strip().lower().replace("-", "_").replace(" ", "_"))


def _header(words: Sequence[str], place: str) -> list[str]:
    """Read the names of the columns."""
    columns = []
    for word in words:
        column = _column(word)
        if column is None or column in columns:
            problem = "is no column" if column is None else "occurs twice"
            raise VolumeError(f"{place}: {word!r} {problem}; expected some of {', '.join(_CALLED)}, each once")
        columns.append(column)
    if "volume" not in columns:
        raise VolumeError(f"{place}: there is no column volume; expected at least volume and labels")
    return columns


def _named_values(words: Sequence[str], columns: Sequence[str] | None, place: str) -> dict[str, str]:
    """Return what a line says, by column."""
    if columns is not None:
        if len(words) > len(columns):
            raise VolumeError(
                f"{place}: {len(words)} values for {len(columns)} columns ({', '.join(columns)}); "
                "a value with a separator in it stands in quotes"
            )
        return {column: word for column, word in zip(columns, words, strict=False) if word}
    values: dict[str, str] = {}
    plain = []
    for word in words:
        name, equals, value = word.partition("=")
        column = _column(name) if equals else None
        if column is None:
            plain.append(word)
        elif column in values:
            raise VolumeError(f"{place}: {name} is given twice; give it once")
        else:
            values[column] = value
    if len(plain) == 7:  # a voxel size without quotes in a table with commas
        plain[4:] = [",".join(plain[4:])]
    if len(plain) > len(_POSITIONAL):
        raise VolumeError(f"{place}: {plain[len(_POSITIONAL)]!r} is one word too many; expected words {_EXAMPLE}")
    for column, word in zip(_POSITIONAL, plain, strict=False):
        if word and column in values:
            raise VolumeError(f"{place}: {word!r} stands where {column} stands, which is given by name as well")
        if word:
            values[column] = word
    return values


def _entry(values: dict[str, str], folder: Path, place: str) -> LabelledPaths:
    """Make a volume of what its line says."""
    if not values.get("volume") or not values.get("labels"):
        missing = "labels" if values.get("volume") else "volume"
        raise VolumeError(f"{place}: the {missing} of a volume are missing; expected words {_EXAMPLE}")
    paths = LabelledPaths(folder / values["volume"], folder / values["labels"], place=place)
    readers: dict[str, tuple[str, Callable[[str], object]]] = {
        "slices": ("slices", _slices),
        "train": ("train", _blocks),
        "held_out": ("held_out", _blocks),
        "weight": ("weight", _weight),
        "voxel_size": ("voxel_size_nm", _voxel_size),
    }
    read: dict[str, Any] = {}
    for column, (field, reader) in readers.items():
        if column in values:
            try:
                read[field] = reader(values[column])
            except ValueError as error:
                expected = error.args[0] if error.args else ""
                raise VolumeError(f"{place}: {column} is {values[column]!r}, expected {expected}") from error
    if read.get("held_out") == ():
        read["only_teaches"] = True
    return dataclasses.replace(paths, **read)


def _blocks(text: str) -> tuple[tuple[int, int], ...]:
    """Read ranges of slices with plus signs between them; ``none`` is none."""
    if text.strip().lower() == "none":
        return ()
    try:
        return tuple(_slices(part) for part in re.split(r"[+\s]+", text.strip()))
    except ValueError as error:
        raise ValueError(f"{error.args[0]}, several with + between them, or none") from error


def _slices(text: str) -> tuple[int, int]:
    first, colon, stop = text.strip().partition(":")
    if not colon or not (first or "0").isdecimal() or not stop.isdecimal() or int(first or 0) >= int(stop):
        raise ValueError("a range A:B of slices such as 0:80, from A to before B")
    return int(first or 0), int(stop)


def _weight(text: str) -> float:
    weight = _number(text)
    if not 0 < weight < math.inf:
        raise ValueError("a positive number")
    return weight


def _voxel_size(text: str) -> tuple[float, float, float]:
    lengths = [_number(part) for part in re.split(r"[,;x\s]+", text.strip().removesuffix("nm"))]
    if len(lengths) != 3 or not all(0 < length < math.inf for length in lengths):
        raise ValueError("three lengths Z,Y,X in nm such as 40,15,15")
    return lengths[0], lengths[1], lengths[2]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
