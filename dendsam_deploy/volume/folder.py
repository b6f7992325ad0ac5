"""Folders of TIFF or PNG slices, in the order in which a person would number them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.volume.checks import check_read, check_shape
from dendsam_deploy.volume.raster import PNG_MAGIC, decode_png, png_header
from dendsam_deploy.volume.tiff import TiffReader
from dendsam_deploy.volume.volume import VolumeInfo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window
    from dendsam_deploy.volume.voxel_size import RecordedSize

_KINDS = {".tif": "tiff", ".tiff": "tiff", ".png": "png"}


class FolderReader:
    """A folder of slices, one file each, or a single PNG; see `VolumeReader`.

    Hidden files (``.DS_Store``, ``._slice1.tif``) and files of other types are skipped.

    Parameters
    ----------
    path : Path
        The folder, or one slice file.
    voxel_size_nm : (float, float, float) or None
        Replaces the voxel size that the first file records.

    Raises
    ------
    VolumeError
        No slices, slices of several sizes or types, or a gap in their numbers; names the file.
    """

    def __init__(self, path: Path, voxel_size_nm: tuple[float, float, float] | None = None) -> None:
        self._files = find_slices(path) if path.is_dir() else [path]
        first = _header(self._files[0])
        for file in self._files[1:]:
            found = _header(file)
            if (found.shape_hw, found.dtype) != (first.shape_hw, first.dtype):
                raise VolumeError(
                    f"{file}: is {found}, but {self._files[0].name} is {first}; "
                    "expected slices of one size and type, remove or convert the odd one"
                )
        recorded = None if first.recorded_size is None else first.recorded_size.as_zyx(len(self._files))
        self.info = VolumeInfo(
            shape_zyx=(len(self._files), *first.shape_hw),
            dtype=first.dtype,
            voxel_size_nm=voxel_size_nm or recorded,
            source=str(path),
            format="folder" if path.is_dir() else "png",
            detail=f"{len(self._files)} {_KINDS[self._files[0].suffix.lower()].upper()} files" if path.is_dir() else "",
        )
        check_shape(self.info.source, self.info.shape_zyx, self.info.dtype)

    def read(self, z: int, window: Window | None = None) -> NDArray[np.generic]:
        """Return slice `z` or a part of it; see `VolumeReader`."""
        window = check_read(self.info, z, window)
        file = self._files[z]
        if not file.is_file():
            raise VolumeError(f"{file}: slice {z} has disappeared since the folder was opened; put it back")
        if _is_png(file):
            image = decode_png(file)[window.slices]
        else:
            with TiffReader(file) as reader:
                image = reader.read(0, window)
        if image.shape != (window.height, window.width) or image.dtype != self.info.dtype:
            raise VolumeError(f"{file}: has changed since the folder was opened; run again")
        return image

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _Header:
    """What a slice file says about itself."""

    shape_hw: tuple[int, int]
    dtype: np.dtype[np.generic]
    recorded_size: RecordedSize | None = None

    def __str__(self) -> str:
        return f"{self.shape_hw[0]} x {self.shape_hw[1]} px {self.dtype}"


def find_slices(folder: Path) -> list[Path]:
    """Return the slice files of a folder in natural order (``s9`` before ``s10``).

    Where a number in the names grows from file to file, it counts the slices and must do so without gaps, in steps of
    any one size. Names that follow several patterns are taken as they are, unless one pattern rules and a few files
    break it.

    Raises
    ------
    VolumeError
        No slices, several kinds of files, a stray name, or a missing or doubled number.
    """
    files = [file for file in folder.iterdir() if not file.name.startswith(".") and file.suffix.lower() in _KINDS]
    if not files:
        raise VolumeError(
            f"{folder}: holds no slices, expected TIFF or PNG files in the folder itself; "
            "check the path or convert the images"
        )
    if len(kinds := Counter(_KINDS[file.suffix.lower()] for file in files)) > 1:
        found = " and ".join(f"{count} {kind.upper()}" for kind, count in sorted(kinds.items()))
        raise VolumeError(f"{folder}: holds {found} files, expected one kind; move one of them elsewhere")
    files.sort(key=lambda file: (_natural_key(file.name), file.name))
    _check_numbering(folder, files)
    return files


def _natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Return a key that compares runs of digits as numbers and the text between them without regard to case."""
    return tuple(
        (int(part or 0), "") if i % 2 else (0, part.lower()) for i, part in enumerate(re.split(r"([0-9]+)", name))
    )


def _check_numbering(folder: Path, files: Sequence[Path]) -> None:
    """Raise if the numbers of the slices have a gap, or if a file does not belong to the numbered ones."""
    patterns = [re.sub(r"[0-9]+", "#", file.name.lower()) for file in files]
    ruling, count = Counter(patterns).most_common(1)[0]
    if count > len(files) / 2 and count < len(files):
        stray = next(file for file, pattern in zip(files, patterns, strict=True) if pattern != ruling)
        raise VolumeError(f"{stray}: does not fit the other names ({ruling}, # = a number); remove or rename it")
    if count < len(files):
        return
    numbers = [[int(run) for run in re.findall(r"[0-9]+", file.name)] for file in files]
    for (before, row), (file, next_row) in pairwise(zip(files, numbers, strict=True)):
        if row == next_row:
            raise VolumeError(f"{file}: has the same number as {before.name}; remove one of the two")
    # Names may hold several numbers (a position, a date, a grid): a counter is one that grows from every file to the
    # next.
    counters = [column for column in zip(*numbers, strict=True) if all(a < b for a, b in pairwise(column))]
    steps = [[b - a for a, b in pairwise(counter)] for counter in counters]
    if not counters or any(len(set(sizes)) <= 1 for sizes in steps):
        return
    step = min(steps[0])
    gap = next(index for index, size in enumerate(steps[0]) if size != step)
    raise VolumeError(
        f"{folder}: slice number {counters[0][gap] + step} is missing between {files[gap].name} and "
        f"{files[gap + 1].name}; add the file, or renumber the slices if the section was lost"
    )


def _is_png(file: Path) -> bool:
    """Tell whether a file begins as a PNG, whatever its name says."""
    with file.open("rb") as opened:
        return opened.read(len(PNG_MAGIC)) == PNG_MAGIC


def _header(file: Path) -> _Header:
    """Read what is needed to compare a slice with the others."""
    if file.stat().st_size == 0:
        raise VolumeError(f"{file}: is empty (0 bytes); copy it again from its source")
    if _is_png(file):
        return _Header(*png_header(file))
    with TiffReader(file) as reader:
        if reader.info.shape_zyx[0] != 1:
            raise VolumeError(
                f"{file}: holds {reader.info.shape_zyx[0]} slices, expected one per file; "
                "give the file itself instead of its folder"
            )
        return _Header(reader.info.shape_zyx[1:], reader.info.dtype, reader.recorded_size)
