"""Pictures of labelled slices: the micrograph, and over it a transparent layer with areas and outlines of objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.volume.raster import encode_png, resize_bilinear

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

PALETTE = np.array(
    [
        (86, 180, 233),
        (230, 159, 0),
        (0, 158, 115),
        (240, 228, 66),
        (204, 121, 167),
        (213, 94, 0),
        (0, 114, 178),
        (170, 221, 136),
        (238, 136, 102),
    ],
    np.uint8,
)
"""Colours that remain distinct to colour-blind eyes: the first seven of Okabe and Ito, then two of Paul Tol's light
ones.

References
----------
https://jfly.uni-koeln.de/color/, https://personal.sron.nl/~pault/
"""

_FILL_ALPHA, _OUTLINE_ALPHA = 90, 255

_NEIGHBOUR_PX = 4
"""Objects closer than that, in px of the picture, get different colours."""

LONGEST_SIDE_PX = 900
"""Larger slices are reduced to this, so that a page can be mailed."""


@dataclass(frozen=True, slots=True)
class LabelledSlice:
    """A slice to be shown.

    Parameters
    ----------
    z : int
        Slice of the volume.
    image : ndarray, shape (Y, X), uint8, or None
        The micrograph; None where it is not at hand.
    labels : ndarray, shape (Y, X), uint32
        3-D ids.
    """

    z: int
    image: NDArray[np.uint8] | None
    labels: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Picture:
    """A slice as two PNG files of the same size; one px of them is `reduction` slice px."""

    z: int
    objects: int
    image_png: bytes | None
    overlay_png: bytes
    width_px: int
    height_px: int
    reduction: float


def draw_pictures(slices: Iterable[LabelledSlice]) -> tuple[Picture, ...]:
    """Draw slices so that an object has one colour in all of them, and its neighbours have others.

    Parameters
    ----------
    slices : iterable of LabelledSlice
        What is to be shown.
    """
    reduced = [(piece, *_reduce(piece)) for piece in slices]
    colours = choose_colours([labels for _, labels, _ in reduced])
    return tuple(
        Picture(
            z=piece.z,
            objects=len(np.unique(piece.labels[piece.labels > 0])),
            image_png=None if image is None else encode_png(image),
            overlay_png=encode_png(paint_overlay(labels, colours)),
            width_px=labels.shape[1],
            height_px=labels.shape[0],
            reduction=piece.labels.shape[0] / labels.shape[0],
        )
        for piece, labels, image in reduced
    )


def choose_colours(labels: Iterable[NDArray[np.uint32]]) -> dict[int, int]:
    """Give each object a row of `PALETTE` that its neighbours do not have, or the least frequent one among them.

    Parameters
    ----------
    labels : iterable of ndarray, shape (Y, X), uint32
        The slices in which the colours are to differ.

    Returns
    -------
    dict
        Row of the palette of each label.
    """
    neighbours: dict[int, set[int]] = {}
    for image in labels:
        for label in np.unique(image[image > 0]).tolist():
            neighbours.setdefault(label, set())
        for axis in (0, 1):
            for distance in range(1, _NEIGHBOUR_PX + 1):
                near, far = (np.take(image, range(*span), axis) for span in _two_ends(image.shape[axis], distance))
                touching = (near != far) & (near > 0) & (far > 0)
                pairs = np.unique(np.stack([near[touching], far[touching]], axis=1), axis=0)
                for one, other in pairs.tolist():
                    neighbours[one].add(other)
                    neighbours[other].add(one)
    colours: dict[int, int] = {}
    for label in sorted(neighbours):
        taken = np.bincount([colours[other] for other in neighbours[label] if other in colours], minlength=len(PALETTE))
        # Start at a colour of the object's own: all objects beginning with the first would leave the page monochrome.
        preference = (np.arange(len(PALETTE)) + label) % len(PALETTE)
        colours[label] = int(preference[np.argmin(taken[preference])])
    return colours


def paint_overlay(labels: NDArray[np.uint32], colours: dict[int, int]) -> NDArray[np.uint8]:
    """Return a layer ``(Y, X, 4)`` of red, green, blue and opacity: areas translucent, outlines solid."""
    present, place = np.unique(labels, return_inverse=True)
    rows = [(*PALETTE[colours[label]].tolist(), _FILL_ALPHA) if label else (0, 0, 0, 0) for label in present.tolist()]
    layer = np.array(rows, np.uint8)[place.reshape(labels.shape)]
    layer[outlines(labels), 3] = _OUTLINE_ALPHA
    return layer


def outlines(labels: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return the pixels of objects that share an edge with another label or background; the image's border is none."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        near, far = (np.take(labels, range(*span), axis) for span in _two_ends(labels.shape[axis], 1))
        differs = near != far
        for start in (0, 1):
            window = tuple(slice(start, start + differs.shape[k]) if k == axis else slice(None) for k in (0, 1))
            edge[window] |= differs
    return edge & (labels > 0)


def _two_ends(length: int, distance: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the index ranges that pair each element with the one `distance` further."""
    return (0, max(length - distance, 0)), (min(distance, length), length)


def _reduce(piece: LabelledSlice) -> tuple[NDArray[np.uint32], NDArray[np.uint8] | None]:
    """Shrink a slice to the size of the page: the image smoothed, the labels by the pixel at each centre."""
    height, width = piece.labels.shape
    factor = max(height, width) / LONGEST_SIDE_PX
    if factor <= 1:
        return piece.labels, piece.image
    shape = max(1, round(height / factor)), max(1, round(width / factor))
    rows, columns = (
        ((np.arange(n) + 0.5) * full / n).astype(np.intp) for n, full in zip(shape, (height, width), strict=True)
    )
    image = None if piece.image is None else resize_bilinear(piece.image, shape)
    return piece.labels[rows[:, None], columns], image
