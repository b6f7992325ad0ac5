"""Slices for linker tests, made from label images."""

from __future__ import annotations

import numpy as np

from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Instances, RunLengths
from dendsam_deploy.pipeline.link import LinkOptions, LinkResult, SliceObjects, link_slices


def instances_from(labels):
    """Return the objects of a label image (Y, X) as the painter would."""
    ids = np.unique(labels[labels > 0]).astype(np.uint32)
    boxes, codes, areas = [], [], []
    for label in ids:
        mask = labels == label
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        boxes.append((x0, y0, x1, y1))
        codes.append(RunLengths.from_mask(mask[y0:y1, x0:x1], Window(int(y0), int(x0), int(y1 - y0), int(x1 - x0))))
        areas.append(int(mask.sum()))
    count = len(ids)
    return Instances(
        ids=ids,
        boxes_xyxy=np.array(boxes, np.float32).reshape(count, 4),
        scores=np.full(count, 0.9, np.float32),
        predicted_iou=np.full(count, 0.8, np.float32),
        areas_px=np.array(areas, np.int64),
        run_lengths=tuple(codes),
    )


def link_volume(volume, **options) -> LinkResult:
    """Link the slices of a volume of 2-D labels (Z, Y, X)."""
    return link_slices(
        (SliceObjects(z, instances_from(labels)) for z, labels in enumerate(volume)), LinkOptions(**options)
    )


def relabelled(volume, result):
    """Return the volume with its 2-D labels replaced by 3-D ids."""
    return np.stack([result.ids_of(z)[labels] for z, labels in enumerate(volume)])


def blank(slices, height=40, width=60):
    """Return an empty volume of 2-D labels."""
    return np.zeros((slices, height, width), np.int64)
