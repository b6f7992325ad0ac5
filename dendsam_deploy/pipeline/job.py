"""What a run will do, settled before its first slice, and written down so that two runs are never mixed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

import dendsam_deploy
from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.instances import Detections, suppress_duplicates
from dendsam_deploy.pipeline.finish import LabelFormat, OutputSpec
from dendsam_deploy.pipeline.journal import Journal, Settings, begin_run, restart_run
from dendsam_deploy.pipeline.link import LinkMethod, LinkOptions
from dendsam_deploy.pipeline.segment import SliceOptions, SliceRecipe, make_recipe, require_detector
from dendsam_deploy.volume.open import input_signature

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.runtimes.session import Session
    from dendsam_deploy.volume.boxes import BoxSource
    from dendsam_deploy.volume.volume import VolumeReader


@dataclass(frozen=True, slots=True)
class SegmentOptions:
    """How a volume is segmented; None takes what the bundle's manifest or the volume says.

    Parameters
    ----------
    out : Path or None
        Folder of the result; None puts ``<volume>.dendsam`` beside the volume.
    slices : (int, int) or None
        First slice and the one after the last; None takes all.
    detection_score : float or None
        Least detection score of a box, 0 to 1.
    nms_iou : float or None
        Largest IoU of two boxes of one slice, 0 to 1.
    min_area_px : float or None
        Least area of an object in a slice, slice px.
    linker : {"overlap-graph", "iou-greedy"}
        How slices are linked.
    format : {"tif", "ome-zarr"} or None
        Format of the labels; None takes that of the volume.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)`` that replaces what the volume records.
    zoom : float or None
        Model px per slice px, in place of what follows from the pixel sizes.
    boxes : BoxSource or None
        Boxes in place of the detector's. They are taken as they are unless `detection_score` or `nms_iou` is given.
    restart : bool
        Discard an earlier run in the same folder instead of resuming it.
    """

    out: Path | None = None
    slices: tuple[int, int] | None = None
    detection_score: float | None = None
    nms_iou: float | None = None
    min_area_px: float | None = None
    linker: LinkMethod = "overlap-graph"
    format: LabelFormat | None = None
    voxel_size_nm: tuple[float, float, float] | None = None
    zoom: float | None = None
    boxes: BoxSource | None = None
    restart: bool = False


@dataclass(frozen=True, slots=True)
class GivenBoxes:
    """Boxes from a file, thinned out only as far as was asked for.

    Parameters
    ----------
    source : BoxSource
        Where they come from.
    least_score, nms_iou : float or None
        Limits; None keeps all.
    """

    source: BoxSource
    least_score: float | None
    nms_iou: float | None

    def for_slice(self, z: int) -> Detections:
        """Return the boxes of a slice, slice px."""
        found = self.source.for_slice(z)
        if self.least_score is not None:
            found = found.take(found.scores >= self.least_score)
        if self.nms_iou is not None:
            found = found.take(suppress_duplicates(found, self.nms_iou))
        return found

    def sha256(self, slices: range) -> str:
        """Return the digest of all boxes of some slices."""
        digest = hashlib.sha256()
        for z in slices:
            found = self.for_slice(z)
            digest.update(f"{z}:{len(found)};".encode())
            digest.update(found.boxes_xyxy.tobytes())
            digest.update(found.scores.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Job:
    """A run: what is read, how it is segmented, what becomes of it, and how far it is; made by `plan_job`."""

    volume: VolumeReader
    session: Session
    recipe: SliceRecipe
    boxes: GivenBoxes | None
    output: OutputSpec
    journal: Journal


def plan_job(
    volume_path: Path,
    volume: VolumeReader,
    session: Session,
    options: SegmentOptions,
    further: Settings | None = None,
) -> Job:
    """Settle everything that does not depend on the slices, and open the run's folder.

    Parameters
    ----------
    volume_path, volume : Path, VolumeReader
        The volume, open.
    session : Session
        What segments it.
    options : SegmentOptions
        How.
    further : dict, optional
        Settings of a run that does more than `segment`; JSON values.

    Raises
    ------
    InvalidArgumentError
        For options that do not fit the volume, or a folder that holds something else or a run with other settings.
    MissingCapabilityError
        Where neither boxes nor a detector are there.
    """
    info = volume.info
    depth, height, width = info.shape_zyx
    first, stop = options.slices or (0, depth)
    if not 0 <= first < stop <= depth:
        raise InvalidArgumentError(f"{volume_path}: slices {first}:{stop} are not within its {depth} slices, 0:{depth}")
    if options.boxes is None:
        require_detector(session)
    wishes = SliceOptions(
        voxel_size_nm=info.voxel_size_nm,
        zoom=options.zoom,
        detection_score=options.detection_score,
        nms_iou=options.nms_iou,
        min_area_px=options.min_area_px,
    )
    recipe = make_recipe((height, width), session.manifest, wishes)
    output = OutputSpec(
        slices=range(first, stop),
        slice_hw=(height, width),
        voxel_size_nm=info.voxel_size_nm,
        format=options.format or ("ome-zarr" if info.format in ("zarr", "ome-zarr") else "tif"),
        link=LinkOptions(method=options.linker),
    )
    boxes = GivenBoxes(options.boxes, options.detection_score, options.nms_iou) if options.boxes is not None else None
    folder = result_folder(volume_path, options)
    settings = {
        "program": dendsam_deploy.__version__,
        "input": _input_settings(volume, output.slices),
        "bundle": _bundle_settings(session),
        "slices": [first, stop],
        "recipe": _recipe_settings(recipe, session),
        "boxes": boxes.sha256(output.slices) if boxes else None,
        "link": asdict(output.link),
        "format": output.format,
        **(further or {}),
    }
    begin = restart_run if options.restart else begin_run
    journal = begin(folder, settings, input_signature(volume_path))
    return Job(volume, session, recipe, boxes, output, journal)


def result_folder(volume_path: Path, options: SegmentOptions) -> Path:
    """Return the folder that a run gets: by default ``NAME.dendsam`` beside the volume."""
    if options.out is not None:
        return options.out
    # A path such as ``.`` has no name of its own.
    named = volume_path if volume_path.name not in ("", "..") else volume_path.resolve()
    return named.with_name(f"{named.name}.dendsam")


def input_digest(image: NDArray[np.generic]) -> str:
    """Return the digest of a slice as it was read."""
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()


def _input_settings(volume: VolumeReader, slices: range) -> Settings:
    """Describe the input by its facts and by the digest of its first, middle and last slice."""
    info = volume.info
    sample = sorted({slices[0], slices[len(slices) // 2], slices[-1]})
    return {
        "shape_zyx": list(info.shape_zyx),
        "dtype": str(info.dtype),
        "voxel_size_nm": None if info.voxel_size_nm is None else list(info.voxel_size_nm),
        "sample_sha256": {str(z): input_digest(volume.read(z)) for z in sample},
    }


def _bundle_settings(session: Session) -> Settings:
    """Describe the graphs by what executes them and by the digests of their files."""
    graphs = [runner.spec for runner in session.runners]
    return {
        "name": session.manifest.name,
        "engine": session.engine,
        "device": session.device,
        "precision": session.precision,
        "graphs": {graph.role: [file.sha256 for file in graph.files] for graph in graphs},
    }


def _recipe_settings(recipe: SliceRecipe, session: Session) -> Settings:
    """Describe how a slice is segmented; the tiles follow from their size and overlap."""
    return {
        "model_hw": list(recipe.plan.frame.model_hw),
        "tile_size_px": recipe.plan.tile_size_px,
        "overlap_px": session.manifest.preprocessing.overlap_px,
        "detect": asdict(recipe.detect),
        "decode": asdict(recipe.decode),
        "paint": asdict(recipe.paint),
    }
