"""From finished slices to the result: link, relabel, publish labels and tables."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dendsam_deploy.durable import published
from dendsam_deploy.pipeline.journal import DETECTIONS_FILE, INSTANCES_FILE, LABEL_FILES, Journal
from dendsam_deploy.pipeline.link import LinkOptions, LinkResult, SliceObjects, link_slices
from dendsam_deploy.pipeline.pieces import paint_instances
from dendsam_deploy.pipeline.tables import (
    DETECTION_COLUMNS,
    INSTANCE_COLUMNS,
    LinkedSlice,
    ObjectTable,
    csv_bytes,
    detection_rows,
)
from dendsam_deploy.progress import Progress
from dendsam_deploy.volume.labels import create_labels, smallest_label_dtype
from dendsam_deploy.volume.volume import LabelVolumeSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dendsam_deploy.pipeline.clock import StageClock
    from dendsam_deploy.progress import ProgressCallback

LabelFormat = Literal["tif", "ome-zarr"]


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What is made of the slices of a run.

    Parameters
    ----------
    slices : range
        Slices of the input volume; the first of them becomes slice 0 of the labels.
    slice_hw : (int, int)
        Their shape.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)``, where it is known.
    format : str
        ``tif`` or ``ome-zarr``.
    link : LinkOptions
        How slices are linked.
    """

    slices: range
    slice_hw: tuple[int, int]
    voxel_size_nm: tuple[float, float, float] | None
    format: LabelFormat
    link: LinkOptions

    def labels_path(self, folder: Path) -> Path:
        """Return where the labels of a run lie."""
        return folder / LABEL_FILES[self.format]


def finish_run(journal: Journal, spec: OutputSpec, clock: StageClock, progress: ProgressCallback) -> LinkResult:
    """Link all slices of a run, then publish labels and tables in one pass over them.

    Raises
    ------
    IncompleteRunError
        Where a slice is missing.
    StorageError
        Where the file system refuses.
    """
    with clock.measure("link"):
        steps = _reported(spec.slices, "link", progress)
        links = link_slices((SliceObjects(z, journal.load(z)) for z in steps), spec.link)
    with clock.measure("publish"):
        objects = ObjectTable(links.object_count)
        labels_spec = LabelVolumeSpec(
            shape_zyx=(len(spec.slices), *spec.slice_hw),
            dtype=smallest_label_dtype(links.object_count),
            voxel_size_nm=spec.voxel_size_nm,
            format=spec.format,
        )
        with ExitStack() as stack:
            detections = stack.enter_context(published(journal.folder / DETECTIONS_FILE))
            labels = stack.enter_context(create_labels(spec.labels_path(journal.folder), labels_spec))
            detections.write(csv_bytes([DETECTION_COLUMNS]))
            for z in _reported(spec.slices, "publish", progress):
                linked = _linked(z, journal, links)
                labels.write(z - spec.slices.start, paint_instances(linked.instances, linked.ids, spec.slice_hw))
                detections.write(csv_bytes(detection_rows(linked)))
                objects.add(linked)
        with published(journal.folder / INSTANCES_FILE) as stream:
            stream.write(csv_bytes([INSTANCE_COLUMNS, *objects.rows(spec.voxel_size_nm)]))
    return links


def _linked(z: int, journal: Journal, links: LinkResult) -> LinkedSlice:
    """Return the objects of a slice with their 3-D ids."""
    instances = journal.load(z)
    return LinkedSlice(z, instances, links.ids_of(z)[instances.ids], links.confidence_of(z)[instances.ids])


def _reported(slices: range, stage: str, progress: ProgressCallback) -> Iterator[int]:
    """Yield the slices and report each when the next one is asked for."""
    for count, z in enumerate(slices):
        progress(Progress(stage, count, len(slices)))
        yield z
    progress(Progress(stage, len(slices), len(slices)))
