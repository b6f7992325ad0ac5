"""The page of pseudo-labels: what was kept, how right it is, and crops of the masks to look at, worst first."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.durable import published
from dendsam_deploy.errors import InputFileError
from dendsam_deploy.evaluate.mask_choice import CONFIDENCE, MaskCriteria
from dendsam_deploy.evaluate.pseudo_files import MASKS_FILE, REVIEW_FILE, REVIEW_PAGE, REVIEW_ROIS_FILE, RUN_FOLDER
from dendsam_deploy.pipeline.journal import read_journal
from dendsam_deploy.pipeline.scored_masks import ScoredSlice
from dendsam_deploy.report.figures import Series, chart_along_z, fraction_histogram
from dendsam_deploy.report.overlays import paint_overlay
from dendsam_deploy.report.page import render_page
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.pseudo_record import UNLABELLED_POLICY
from dendsam_deploy.volume.raster import encode_png

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.pseudo_labels import PseudoLabels
    from dendsam_deploy.volume.volume import VolumeReader

SHOWN = 48
"""Crops of kept masks on the page, and as many of those that were not kept; the lists in CSV and ROIs are longer."""

_CONTEXT = 0.5
"""Margin of a crop on each side, as a part of the mask's longer side."""

_LEAST_MARGIN_PX = 12

_KEPT_ROW, _LEFT_ROW = 2, 5
"""Colours of `overlays.PALETTE`: green and vermilion."""

_MEANINGS = {
    "score": "detection score of the box",
    "predicted_iou": "the model's own estimate of the mask's IoU",
    "stability": "mean IoU with the masks of boxes that are a little wrong",
    "agreement": "largest IoU with a mask of a neighbouring slice",
}


@dataclass(frozen=True, slots=True)
class Card:
    """A mask on the page: its row of the review list and its crop.

    Parameters
    ----------
    row : mapping
        Cells of ``review.csv`` by column.
    image_png, overlay_png : bytes
        The micrograph, and the mask over it, of one size.
    width_px, height_px : int
        That size, slice px.
    box_xywh : tuple of float
        The box that prompted the mask, px of the crop.
    """

    row: Mapping[str, str]
    image_png: bytes
    overlay_png: bytes
    width_px: int
    height_px: int
    box_xywh: tuple[float, float, float, float]


def write_review_page(result: PseudoLabels, raw: VolumeReader) -> Path:
    """Write ``review.html`` into a folder of pseudo-labels and return its path.

    Parameters
    ----------
    result : PseudoLabels
        What `pseudo_label_volume` returned.
    raw : VolumeReader
        The volume, open.

    Raises
    ------
    InputFileError
        A table of the folder is damaged.
    StorageError
        Where the file system refuses.
    """
    path = result.out / REVIEW_PAGE
    with published(path) as stream:
        stream.write(render_review_page(result, raw).encode())
    return path


def render_review_page(result: PseudoLabels, raw: VolumeReader) -> str:
    """Return the page of pseudo-labels; see `write_review_page`."""
    rows = _read_table(result.out / REVIEW_FILE)
    kept, left = ([row for row in rows if row["kept"] == word] for word in ("yes", "no"))
    shares = {} if result.choice is None else {
        "all masks of these slices": result.choice.everything,
        "kept, on the slices that chose the thresholds": result.choice.chosen_on,
        "kept, on slices that were left out of the choice": result.choice.left_out,
    }  # fmt: skip
    content = {
        "result": result,
        "source": raw.info.source,
        "policy": UNLABELLED_POLICY,
        "criteria": [(name, asdict(result.criteria)[name], _MEANINGS[name]) for name in _names()],
        "shares": [(name, share, share.interval) for name, share in shares.items() if share is not None],
        "confidence": CONFIDENCE,
        "charts": _charts(_read_table(result.out / MASKS_FILE), result),
        "lists": [
            ("Kept, worst first", len(kept), _cards(kept[:SHOWN], result.out, raw, _KEPT_ROW)),
            ("Not kept, nearest to being kept first", len(left), _cards(left[:SHOWN], result.out, raw, _LEFT_ROW)),
        ],
        "files": (REVIEW_FILE, REVIEW_ROIS_FILE, MASKS_FILE),
    }
    return render_page("review.html.jinja", content)


def _names() -> list[str]:
    """Return the names of the criteria."""
    return [field.name for field in fields(MaskCriteria)]


def _read_table(path: Path) -> list[dict[str, str]]:
    """Read a table of the folder."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, strict=True))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputFileError(f"{path}: cannot be read ({error}); run pseudo-label again to write it") from error


def _charts(rows: Sequence[Mapping[str, str]], result: PseudoLabels) -> dict[str, str]:
    """Draw how many masks were found and kept along z, and the values of each criterion."""
    charts = {}
    first, stop = result.slices
    z = np.arange(first, stop)
    if len(z) > 1:
        found, kept = (
            np.bincount(np.array([int(row["z"]) - first for row in some], np.int64), minlength=len(z)).astype(
                np.float64
            )
            for some in (rows, [row for row in rows if row["kept"] == "yes"])
        )
        charts["counts"] = chart_along_z(z, [Series("found", found), Series("kept", kept)], "masks in the slice")
    for name in _names():
        values = np.array([float(row[name]) for row in rows if row[name]])
        if len(values):
            charts[name] = fraction_histogram(np.clip(values, 0, 1), f"{name.replace('_', ' ')} of all masks")
    return charts


def _cards(rows: Sequence[Mapping[str, str]], folder: Path, raw: VolumeReader, colour: int) -> list[Card]:
    """Cut the masks of some rows out of the volume; each slice is read once."""
    journal = read_journal(folder / RUN_FOLDER)
    cards: dict[str, Card] = {}
    for z in sorted({int(row["z"]) for row in rows}):
        image = to_uint8(raw.read(z), f"{raw.info.source}: slice {z}")
        found = ScoredSlice.from_bytes(journal.read_piece(z)).instances
        place = {label: index for index, label in enumerate(found.ids.tolist())}
        for row in rows:
            if int(row["z"]) == z:
                runs = found.run_lengths[place[int(row["label"])]]
                mask = np.zeros(image.shape, bool)
                mask[runs.window.slices] = runs.to_mask()
                cards[row["rank"]] = _card(row, image, mask, colour)
    return [cards[row["rank"]] for row in rows]


def _card(row: Mapping[str, str], image: NDArray[np.uint8], mask: NDArray[np.bool_], colour: int) -> Card:
    """Cut one mask out, with its surroundings."""
    x0, y0, x1, y1 = (float(row[name]) for name in ("x0", "y0", "x1", "y1"))
    rows, columns = np.nonzero(mask)
    margin = max(_CONTEXT * max(x1 - x0, y1 - y0), _LEAST_MARGIN_PX)
    height, width = image.shape
    top, bottom = max(int(min(y0, rows.min()) - margin), 0), min(int(max(y1, rows.max() + 1) + margin), height)
    left, right = max(int(min(x0, columns.min()) - margin), 0), min(int(max(x1, columns.max() + 1) + margin), width)
    window = (slice(top, bottom), slice(left, right))
    return Card(
        row=row,
        image_png=encode_png(np.ascontiguousarray(image[window])),
        overlay_png=encode_png(paint_overlay(mask[window].astype(np.uint32), {1: colour})),
        width_px=right - left,
        height_px=bottom - top,
        box_xywh=(x0 - left, y0 - top, x1 - x0, y1 - y0),
    )
