"""Boxes of masks as YOLO text files, one for each slice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dendsam_deploy.durable import make_folder, write_text
from dendsam_deploy.volume.exported_masks import tight_box_xyxy

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from dendsam_deploy.volume.exported_masks import SliceMasks

_DIGITS = 8
"""Decimals of a place; at 65,536 px that is a thousandth of a pixel."""


def write_yolo(folder: Path, slices: Iterable[SliceMasks], *, with_scores: bool = True) -> int:
    """Write ``z000000.txt`` and so on: a line ``0 xc yc w h score`` for the tight box of each mask.

    Places are parts of the slice's width and height; 0 is the outer edge of the first pixel and 1 that of the last one,
    so the box of the whole slice is ``0.5 0.5 1 1``. Slices that were looked at and show nothing get an empty file.
    Those that were not looked at get none: an empty one would teach a detector that there is nothing.

    Parameters
    ----------
    folder : Path
        Folder of the files, made where it is missing; files of other slices in it stay.
    slices : iterable of SliceMasks
        What is written.
    with_scores : bool
        Whether to write the sixth column; files to train a detector on have five.

    Returns
    -------
    int
        Number of boxes.

    Raises
    ------
    StorageError
        Where the file system refuses.

    References
    ----------
    https://docs.ultralytics.com/datasets/detect/
    """
    make_folder(folder)
    count = 0
    for found in slices:
        height, width = found.slice_hw
        lines = []
        for mask, score in zip(found.masks, found.scores.tolist(), strict=True):
            x0, y0, x1, y1 = tight_box_xyxy(mask)
            place = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
            words = ["0", *(f"{value:.{_DIGITS}f}" for value in place), *([f"{score:.4f}"] if with_scores else [])]
            lines.append(" ".join(words) + "\n")
        write_text(folder / f"z{found.z:06d}.txt", "".join(lines))
        count += len(lines)
    return count
