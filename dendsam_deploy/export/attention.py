"""Which exact form of relative position the fp32 encoder gets: the one that is faster on the engines here."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dendsam_deploy.bundle.manifest import AttentionForm, GraphSpec
from dendsam_deploy.export.graphs import GraphExport, onnx_from_torch
from dendsam_deploy.models.plain_encoder import PlainEncoder, is_plain

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

Stopwatch = Callable[[Path, GraphSpec], Mapping[str, float]]
"""Times an encoder graph: seconds of one tile by engine."""

DEFAULT_FORM: AttentionForm = "added"

_SMALLEST_TIMED_GRID = 32
"""With fewer cells the forms differ by less than the time that measuring them takes."""

_BLOCKS = 2  # one that attends in windows and one to everything


def choose_attention(sam: Sam, wish: AttentionForm | None, stopwatch: Stopwatch | None) -> AttentionForm | None:
    """Choose the form in which the fp32 encoder computes relative position.

    Both forms of an encoder of two blocks are timed on every engine of this machine. The form with the lower geometric
    mean of times wins.

    Parameters
    ----------
    sam : Sam
        The model.
    wish : str or None
        A form that is taken without measuring.
    stopwatch : callable or None
        Times a graph; without one the default is taken.

    Returns
    -------
    str or None
        None for an encoder that has no relative position.
    """
    if not is_plain(sam):
        return None
    size = sam.image_encoder.img_size
    if wish is not None or stopwatch is None or size // 16 < _SMALLEST_TIMED_GRID:
        return wish or DEFAULT_FORM
    with tempfile.TemporaryDirectory() as folder:
        times = {form: _time(sam, form, stopwatch, Path(folder)) for form in get_args(AttentionForm)}
    engines = set.intersection(*(set(of_form) for of_form in times.values()))
    if not engines:
        return DEFAULT_FORM
    return min(times, key=lambda form: math.prod(times[form][engine] for engine in engines))


def _time(sam: Sam, form: AttentionForm, stopwatch: Stopwatch, folder: Path) -> Mapping[str, float]:
    """Time the two kinds of block in one form."""
    encoder = PlainEncoder(sam, form)
    kinds = {block.window: block for block in encoder.blocks}
    encoder.blocks = type(encoder.blocks)(list(kinds.values())[:_BLOCKS])
    export = GraphExport("encoder", sam.image_encoder.img_size, attention=form)
    path = folder / f"{form}.onnx"
    return stopwatch(path, onnx_from_torch(encoder, export, path))
