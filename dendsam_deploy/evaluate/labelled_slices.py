"""What a comparison of prompts is asked for, and the labelled slices that it works on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.point_grid import GridOptions
from dendsam_deploy.evaluate.prompt_sources import SOURCES, SourceOptions, TrueSlice, read_true_slice
from dendsam_deploy.pipeline.segment import SliceOptions, make_recipe
from dendsam_deploy.runtimes.session import SessionOptions
from dendsam_deploy.volume.intensity import to_uint8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dendsam_deploy.bundle.manifest import Manifest
    from dendsam_deploy.volume.volume import VolumeReader

_FEW_SLICES = 8


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What is compared, and how prompts are made.

    Parameters
    ----------
    slices : (int, int) or None
        First slice and the one after the last; None takes eight of those that show objects, spread evenly.
    sources : tuple of str
        Prompt sources, of `prompt_sources.SOURCES`; empty takes all that the bundles can serve.
    ignore_labels : tuple of int
        Labels of the truth that are not judged, such as membrane.
    sparse_truth : bool
        The truth shows only some objects: segments that touch none of them are left out.
    min_area_px : float or None
        Pieces of the truth of fewer slice px are neither prompted nor judged; None takes the least area of an object
        from the first bundle.
    points : int
        Clicks on each object in the row of several points.
    grid_points, grid_iou, grid_stability, grid_nms : int, float or None, float or None, float
        The grid of points, see `point_grid.GridOptions`, which has the defaults of what is None.
    grid_slices : (int, int) or None
        Labelled slices on which those of the two thresholds that are None are chosen for each bundle, see
        `grid_choice`. They are not judged.
    curve_repeats : int
        Draws of boxes at each level of the curve of quality against box error; 0 leaves the curve out.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)``, in place of what the volume records.
    zoom : float or None
        Model px per slice px; None as in `segment`.
    resamples, seed : int
        Draws of slices behind the intervals, and what decides about all draws.
    session : SessionOptions
        What the graphs run on.
    """

    slices: tuple[int, int] | None = None
    sources: tuple[str, ...] = ()
    ignore_labels: tuple[int, ...] = ()
    sparse_truth: bool = False
    min_area_px: float | None = None
    points: int = 3
    grid_points: int = 32
    grid_iou: float | None = None
    grid_stability: float | None = None
    grid_nms: float = 0.7
    grid_slices: tuple[int, int] | None = None
    curve_repeats: int = 2
    voxel_size_nm: tuple[float, float, float] | None = None
    zoom: float | None = None
    resamples: int = 1000
    seed: int = 0
    session: SessionOptions = field(default_factory=SessionOptions)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.sources if name not in SOURCES]:
            raise InvalidArgumentError(f"there are no prompts {unknown[0]!r}; choose {', '.join(SOURCES)}")
        if not 1 <= self.points <= 20:
            raise InvalidArgumentError(f"{self.points} points on an object, expected 1 to 20")
        if self.min_area_px is not None and not 0 <= self.min_area_px < np.inf:
            raise InvalidArgumentError(f"min_area_px is {self.min_area_px}, expected 0 or more")
        if min(self.curve_repeats, self.resamples, self.seed) < 0:
            raise InvalidArgumentError("repeats, resamples and the seed are 0 or more")
        assert self.prompting, "made here, because it checks the options of the grid"

    @property
    def slice_options(self) -> SliceOptions:
        """How slices are resampled and cut."""
        return SliceOptions(self.voxel_size_nm, self.zoom)

    @property
    def prompting(self) -> SourceOptions:
        """How prompts are made."""
        given = {"predicted_iou": self.grid_iou, "stability": self.grid_stability}
        thresholds = {name: value for name, value in given.items() if value is not None}
        return SourceOptions(self.points, GridOptions(self.grid_points, nms_iou=self.grid_nms, **thresholds))

    def to_document(self) -> dict[str, object]:
        """Return the options as JSON values, without what the graphs run on."""
        document = asdict(replace(self, session=SessionOptions()))
        del document["session"]
        return document


@dataclass(frozen=True, slots=True, eq=False)
class LabelledStack:
    """The slices of a volume that are compared, and by which rules their truth is read.

    On `choosing`, which are none of those, the thresholds of a grid are chosen.
    """

    raw: VolumeReader
    labels: VolumeReader
    chosen: tuple[int, ...]
    choosing: tuple[int, ...]
    least_px: float
    options: CompareOptions

    @classmethod
    def choose(
        cls, raw: VolumeReader, labels: VolumeReader, manifest: Manifest, options: CompareOptions
    ) -> LabelledStack:
        """Check that volume and truth fit, and settle which slices and which objects are judged."""
        depth, height, width = raw.info.shape_zyx
        if labels.info.shape_zyx != raw.info.shape_zyx:
            found, expected = (" x ".join(map(str, reader.info.shape_zyx)) for reader in (labels, raw))
            raise VolumeError(
                f"{labels.info.source}: {found} voxels (z, y, x), but {raw.info.source} has {expected}; crop one of "
                "them"
            )
        for first, stop in filter(None, (options.slices, options.grid_slices)):
            if not 0 <= first < stop <= depth:
                raise InvalidArgumentError(
                    f"{raw.info.source}: slices {first}:{stop} are not within its {depth} slices, 0:{depth}"
                )
        choosing = tuple(range(*options.grid_slices)) if options.grid_slices else ()
        if options.slices:
            chosen = tuple(range(*options.slices))
        else:
            left = [z for z in range(depth) if z not in choosing]
            if not left:
                raise InvalidArgumentError(f"--grid-slices leaves none of the {depth} slices to be judged; take fewer")
            chosen = _spread(left)
            if not all(_shows(labels, z, options.ignore_labels) for z in chosen):
                left = [z for z in left if _shows(labels, z, options.ignore_labels)]
                chosen = _spread(left) or chosen
        if overlap := set(chosen) & set(choosing):
            raise InvalidArgumentError(
                f"slice {min(overlap)} would be judged and choose the thresholds of the grid; let --slices and "
                "--grid-slices lie apart"
            )
        options = replace(options, voxel_size_nm=options.voxel_size_nm or raw.info.voxel_size_nm)
        recipe = make_recipe((height, width), manifest, options.slice_options)
        least_px = recipe.paint.min_area_px if options.min_area_px is None else options.min_area_px
        return cls(raw, labels, chosen, choosing, least_px, options)

    def read(self, z: int) -> TrueSlice:
        """Read a slice and its truth."""
        image = to_uint8(self.raw.read(z), f"{self.raw.info.source}: slice {z}")
        labels = self.labels.read(z).astype(np.uint32)
        return read_true_slice(z, image, labels, self.options.ignore_labels, self.least_px)


def _spread(slices: Sequence[int]) -> tuple[int, ...]:
    """Return a few of the slices, spread evenly."""
    count = min(_FEW_SLICES, len(slices))
    return tuple(slices[int((index + 0.5) * len(slices) / count)] for index in range(count))


def _shows(labels: VolumeReader, z: int, ignored: tuple[int, ...]) -> bool:
    """Tell whether a slice of the truth shows an object that is judged."""
    return bool((~np.isin(labels.read(z), (0, *ignored))).any())
