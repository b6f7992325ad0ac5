"""Level 5 of parity where ground truth is given: what the deployment costs in scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.findings import Finding
from dendsam_deploy.instances import Detections
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.metrics.panoptic import panoptic_quality
from dendsam_deploy.pipeline.segment import SliceOptions, decode_boxes, make_recipe, segment_slice
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.label_objects import label_components
from dendsam_deploy.volume.open import open_labels, open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.parity import Reference
    from dendsam_deploy.geometry import Frame
    from dendsam_deploy.pipeline.segment import BoxMask
    from dendsam_deploy.runtimes.session import Session

_FEW_SLICES = 8
_RESAMPLES, _SEED = 2000, 20
_INTERVAL_PERCENT = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class LabelledSlices:
    """Slices with their ground truth, read once for all sessions.

    Parameters
    ----------
    images : tuple of ndarray, each (Y, X), uint8
        The slices.
    truth : tuple of ndarray, each (Y, X), uint32
        Their labels, 0 for background.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)``.
    """

    images: tuple[NDArray[np.uint8], ...]
    truth: tuple[NDArray[np.uint32], ...]
    voxel_size_nm: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class SliceScores:
    """What a session scores on labelled slices, one number for each slice.

    Parameters
    ----------
    pq : ndarray, shape (Z,), float64
        Panoptic quality of the labels; from exact boxes where there is no detector.
    box_iou : ndarray, shape (Z,), float64
        Mean IoU of the masks of exact boxes with their objects; 1 in a slice without objects.
    """

    pq: NDArray[np.float64]
    box_iou: NDArray[np.float64]


def read_labelled_slices(volume: Path, labels: Path, slices: tuple[int, int] | None) -> LabelledSlices:
    """Read slices that are to be scored; without a wish, a few spread evenly over the volume.

    Raises
    ------
    VolumeError
        A file cannot be read, or the two do not show the same voxels.
    InvalidArgumentError
        The slices are not in the volume.
    """
    with open_volume(volume) as raw, open_labels(labels) as truth:
        depth = raw.info.shape_zyx[0]
        if truth.info.shape_zyx != raw.info.shape_zyx:
            found, expected = (" x ".join(map(str, info.shape_zyx)) for info in (truth.info, raw.info))
            raise VolumeError(f"{labels}: {found} voxels (z, y, x), but {volume} has {expected}; crop one of them")
        first, stop = slices or (0, depth)
        if not 0 <= first < stop <= depth:
            raise InvalidArgumentError(f"{volume}: slices {first}:{stop} are not within its {depth} slices, 0:{depth}")
        chosen = list(range(first, stop))
        if slices is None:
            chosen = sorted({int((index + 0.5) * depth / _FEW_SLICES) for index in range(_FEW_SLICES)})
        return LabelledSlices(
            tuple(to_uint8(raw.read(z), f"{volume}: slice {z}") for z in chosen),
            tuple(truth.read(z).astype(np.uint32) for z in chosen),
            raw.info.voxel_size_nm,
        )


def score_slices(session: Session, slices: LabelledSlices) -> SliceScores:
    """Segment labelled slices with an open session and score them."""
    options = SliceOptions(voxel_size_nm=slices.voxel_size_nm)
    pq, box_iou = [], []
    for image, truth in zip(slices.images, slices.truth, strict=True):
        components, _ = label_components(truth)
        frame = make_recipe(truth.shape, session.manifest, options).plan.frame
        exact = _exact_boxes(components, frame, session.manifest.thresholds.min_area_px)
        boxes = np.array(list(exact.values()), np.float32).reshape(-1, 4)
        given = None if session.detector is not None else Detections(boxes, np.ones(len(boxes), np.float32))
        labels, _ = segment_slice(image, session, given, options)
        overlaps = ObjectOverlaps.from_table(ContingencyTable.from_labels(truth, labels))
        pq.append(panoptic_quality(overlaps).pq)
        iou = [
            _mask_iou(components, number, found)
            for number, found in zip(exact, decode_boxes(image, session, boxes, options), strict=True)
        ]
        box_iou.append(float(np.mean(iou)) if iou else 1.0)
    return SliceScores(np.array(pq), np.array(box_iou))


def _exact_boxes(components: NDArray[np.int32], frame: Frame, least_px: int) -> dict[int, list[int]]:
    """Return number -> tight box of the pieces of labels that are large enough and not thinner than a model px."""
    areas_px = np.bincount(components.ravel())
    boxes = {
        number: [columns.start, rows.start, columns.stop, rows.stop]
        for number, (rows, columns) in enumerate(ndimage.find_objects(components), start=1)
        if areas_px[number] >= least_px
    }
    scaled = frame.boxes_to_model(np.array(list(boxes.values()), np.float32).reshape(-1, 4))
    thick = (scaled[:, 2:] - scaled[:, :2]).min(axis=1, initial=np.inf) >= 1
    return {number: box for (number, box), is_thick in zip(boxes.items(), thick, strict=True) if is_thick}


def _mask_iou(components: NDArray[np.int32], number: int, found: BoxMask) -> float:
    """Return the IoU of a piece with the mask that its box prompts."""
    shared = int(np.count_nonzero((components[found.window.slices] == number) & found.mask))
    return shared / (int(np.count_nonzero(components == number)) + int(np.count_nonzero(found.mask)) - shared)


def compare_scores(
    deployed: SliceScores, reference: SliceScores | None, reference_from: Reference
) -> Iterator[Finding]:
    """Compare the scores of the deployed chain with those of the reference on the same slices.

    Parameters
    ----------
    deployed : SliceScores
        Of the session that is judged.
    reference : SliceScores or None
        Of the original modules, or of the fp32 graphs; None where the session is itself the reference.
    reference_from : str
        ``torch`` or ``fp32``.
    """
    for name in ("pq", "box_iou"):
        scores: NDArray[np.float64] = getattr(deployed, name)
        found = {f"truth_{name}": float(scores.mean())}
        if reference is not None:
            loss: NDArray[np.float64] = getattr(reference, name) - scores
            low, high = bootstrap_interval(loss)
            found |= {f"truth_{name}_loss": float(loss.mean())}
            found |= {f"truth_{name}_loss_low": low, f"truth_{name}_loss_high": high}
        for metric, value in found.items():
            yield Finding(5, "chain", metric, value, reference=reference_from)


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the interval that holds the mean in 95 of 100 cases, by drawing slices with replacement.

    Parameters
    ----------
    values : ndarray, shape (Z,)
        One number for each slice.

    References
    ----------
    B. Efron, Annals of Statistics 7 (1979) 1-26, doi:10.1214/aos/1176344552; the percentile interval.
    """
    draws = np.random.default_rng(_SEED).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), _INTERVAL_PERCENT)
    return float(low), float(high)
