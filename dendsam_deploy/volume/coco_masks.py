"""Masks as COCO JSON with run-length codes, the exchange format of detection data sets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.durable import published
from dendsam_deploy.errors import InputFileError
from dendsam_deploy.volume.exported_masks import tight_box_xyxy

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.instances import RunLengths
    from dendsam_deploy.volume.exported_masks import SliceMasks

CATEGORY = {"id": 1, "name": "dendrite"}

_CHUNK_BITS, _CHUNK_OFFSET, _MORE, _SIGN = 5, 48, 0x20, 0x10


def write_coco(path: Path, slices: Iterable[SliceMasks], source: str) -> int:
    """Write masks as one COCO file, whole or not at all; slices stream past.

    Image ids are slice numbers. An annotation has the COCO keys (``bbox`` is ``x, y, width, height`` of the tight box,
    pixel edges; ``segmentation`` the compressed run-length code of the slice, column by column; ``iscrowd`` is 0, as of
    single objects), and ``score`` and ``object_id``, the 3-D object.

    Parameters
    ----------
    path : Path
        File to write.
    slices : iterable of SliceMasks
        Ascending in z.
    source : str
        Name of the volume; images are called ``<source>#z=<z>``.

    Returns
    -------
    int
        Number of annotations.

    Raises
    ------
    StorageError
        Where the file system refuses.

    References
    ----------
    https://cocodataset.org/#format-data
    """
    images: list[dict[str, Any]] = []
    count = 0
    with published(path) as stream:
        stream.write(b'{"annotations": [')
        for found in slices:
            height, width = found.slice_hw
            images.append(
                {"id": found.z, "file_name": f"{source}#z={found.z}", "height": height, "width": width, "z": found.z}
            )
            for mask, number, score in zip(found.masks, found.ids.tolist(), found.scores.tolist(), strict=True):
                count += 1
                row = _annotation(mask, found.slice_hw) | {
                    "id": count, "image_id": found.z, "object_id": number, "score": round(score, 4)
                }  # fmt: skip
                stream.write(b"\n" if count == 1 else b",\n")
                stream.write(json.dumps(row, sort_keys=True).encode())
        about = {"description": f"masks of {source}", "version": "1.0"}
        rest = json.dumps({"categories": [CATEGORY], "images": images, "info": about, "licenses": []})
        stream.write(b"\n], " + rest[1:].encode() + b"\n")
    return count


def rle_counts(mask: RunLengths, slice_hw: tuple[int, int]) -> NDArray[np.int64]:
    """Return the run lengths of a whole slice read column by column: background, mask, background, and so on.

    Parameters
    ----------
    mask : RunLengths
        The mask, which has pixels.
    slice_hw : (int, int)
        Shape of the slice, which the last run completes.

    Returns
    -------
    ndarray, shape (R,), int64
        The first run, of background, may be 0.
    """
    height, width = slice_hw
    columns = np.pad(mask.to_mask().T.astype(np.int8), ((0, 0), (1, 1)))
    change = np.diff(columns, axis=1)
    column, first = np.nonzero(change == 1)
    _, stop = np.nonzero(change == -1)
    begin = (column + mask.window.x0) * height + mask.window.y0
    starts, stops = begin + first, begin + stop
    # A run that reaches the bottom goes on at the top of the next column.
    apart = starts[1:] != stops[:-1]
    edges = np.stack([starts[np.insert(apart, 0, True)], stops[np.append(apart, True)]], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    return counts if counts[-1] else counts[:-1]


def compress_counts(counts: NDArray[np.int64]) -> str:
    """Write run lengths as COCO's text: from the fourth on the difference to the one before the last, 5 bits a letter.

    References
    ----------
    https://github.com/cocodataset/cocoapi, ``common/maskApi.c``, ``rleToString``
    """
    letters: list[str] = []
    for index, count in enumerate(counts.tolist()):
        value = count - int(counts[index - 2]) if index > 2 else count
        while True:
            chunk = value & (2**_CHUNK_BITS - 1)
            value >>= _CHUNK_BITS
            # The sign bit of the last letter is that of the number, so nothing else may be left above it.
            is_last = value == (-1 if chunk & _SIGN else 0)
            letters.append(chr((chunk if is_last else chunk | _MORE) + _CHUNK_OFFSET))
            if is_last:
                break
    return "".join(letters)


def expand_counts(text: str) -> NDArray[np.int64]:
    """Read what `compress_counts` wrote.

    Raises
    ------
    InputFileError
        The text is no such code.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        chunk = ord(letter) - _CHUNK_OFFSET
        if not 0 <= chunk < 2 * _MORE:
            raise InputFileError(f"{letter!r} in a COCO run-length code; expected letters from '0' to 'o'")
        value |= (chunk & (2**_CHUNK_BITS - 1)) << shift
        shift += _CHUNK_BITS
        if chunk & _MORE:
            continue
        if chunk & _SIGN:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise InputFileError("a COCO run-length code ends in the middle of a number; the file is cut or damaged")
    return np.array(counts, np.int64)


def decode_counts(counts: NDArray[np.int64], slice_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the slice ``slice_hw`` that run lengths describe.

    Raises
    ------
    InputFileError
        They do not fill it.
    """
    height, width = slice_hw
    if (counts < 0).any() or int(counts.sum()) != height * width:
        raise InputFileError(
            f"COCO run lengths add up to {int(counts.sum())} px, expected {height * width} of a slice of "
            f"{height} x {width}"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def _annotation(mask: RunLengths, slice_hw: tuple[int, int]) -> dict[str, Any]:
    """Return what an annotation says about the mask itself."""
    x0, y0, x1, y1 = tight_box_xyxy(mask)
    return {
        "area": mask.area_px,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "category_id": CATEGORY["id"],
        "iscrowd": 0,
        "segmentation": {"counts": compress_counts(rle_counts(mask, slice_hw)), "size": list(slice_hw)},
    }
