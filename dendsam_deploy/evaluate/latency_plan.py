"""What a benchmark will measure, settled before anything is loaded: on what slices, which combinations, which calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.bundle.latency import LEVELS, TORCH_REFERENCE, LeftOut, Level
from dendsam_deploy.bundle.manifest import PRECISIONS
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.evaluate.latency_bench import BenchSetup, Case
from dendsam_deploy.runtimes.choice import combinations_on_offer
from dendsam_deploy.runtimes.probe import why_not
from dendsam_deploy.runtimes.session import ENGINES, SessionOptions
from dendsam_deploy.volume.labels import LabelVolumeSpec, create_labels
from dendsam_deploy.volume.open import open_volume
from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.bundle.manifest import Manifest, Precision
    from dendsam_deploy.bundle.parity import Combination

DEFAULT_BOXES = 64
"""Objects of a slice where nothing else is said: what a section of neuropil has in a tile."""

BOX_COUNTS = (1, 8, DEFAULT_BOXES)
"""Boxes of one call of the decoder."""

_PHANTOM_PX, _PHANTOM_SLICES, _STACK_SLICES = 256, 4, 16
_MOST_SLICES_USED = 32
_ANY = "auto"


@dataclass(frozen=True, slots=True)
class BenchmarkOptions:
    """What to measure, and for how long.

    Parameters
    ----------
    engines, devices, precisions : tuple of str
        What to measure side by side; empty takes everything that works here and has not failed `verify`, in the order
        of preference and as far as the time allows.
    threads : int or None
        Threads of one operator on the CPU; None takes one per physical core.
    trusted_engines : tuple of str
        SHA-256 of compiled engines that may be loaded, which runs code, although somebody else made them.
    volume : Path or None
        A volume whose slices are measured; None makes a synthetic one whose slices fill one tile.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)`` that replaces what the volume records.
    boxes : int or None
        Objects of each slice. None: those that the detector finds on a given volume, otherwise 64.
    levels : tuple of str
        Of ``graph``, ``stage``, ``slice`` and ``volume``.
    repeats : int
        Most samples of anything.
    seconds : float
        About how long it may take in all. What is slow gets fewer samples, but three at least.
    quick : bool
        At most five samples, thirty seconds, and no whole volume, in place of what the other options say.
    sam, detector : Path or None
        Checkpoints that the bundle was exported from; the original torch modules are then measured beside the graphs.
    """

    engines: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ()
    threads: int | None = None
    trusted_engines: tuple[str, ...] = ()
    volume: Path | None = None
    voxel_size_nm: tuple[float, float, float] | None = None
    boxes: int | None = None
    levels: tuple[Level, ...] = LEVELS
    repeats: int = 20
    seconds: float = 90.0
    quick: bool = False
    sam: Path | None = None
    detector: Path | None = None

    def __post_init__(self) -> None:
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise InvalidArgumentError(
                f"levels are {', '.join(self.levels) or 'none'}, expected some of {', '.join(LEVELS)}"
            )
        if self.boxes is not None and self.boxes < 1:
            raise InvalidArgumentError(f"boxes is {self.boxes}, expected at least 1")
        if self.repeats < 1 or not self.seconds > 0:
            raise InvalidArgumentError(f"repeats is {self.repeats} and seconds {self.seconds:g}, expected more than 0")
        if self.detector is not None and self.sam is None:
            raise InvalidArgumentError("a detector checkpoint was given without --sam; give both, or leave it out")

    @property
    def settled(self) -> BenchmarkOptions:
        """The options with `quick` spelt out."""
        if not self.quick:
            return self
        levels = tuple(level for level in self.levels if level != "volume") or self.levels
        return replace(self, quick=False, repeats=5, seconds=30.0, levels=levels)


@dataclass(frozen=True, slots=True)
class Subject:
    """The slices that are measured.

    Parameters
    ----------
    volume : Path
        Where they are.
    name : str
        What they are, for people.
    shape_zyx : (int, int, int)
        Shape of the volume.
    slices : (int, int)
        Those that samples take turns with.
    voxel_size_nm : (float, float, float) or None
        Voxel size that replaces what the volume records.
    zoom : float or None
        Model px per slice px; None for what follows from the pixel sizes.
    boxes : int or None
        Objects of each slice; None for those that the detector finds.
    """

    volume: Path
    name: str
    shape_zyx: tuple[int, int, int]
    slices: tuple[int, int]
    voxel_size_nm: tuple[float, float, float] | None
    zoom: float | None
    boxes: int | None

    @property
    def is_synthetic(self) -> bool:
        """Whether it was made for the benchmark."""
        return self.zoom is not None


def choose_subject(manifest: Manifest, options: BenchmarkOptions, workspace: Path) -> Subject:
    """Take the user's volume, or make one.

    Raises
    ------
    VolumeError
        Where the volume cannot be read.
    """
    if options.volume is None:
        path = workspace / "phantom.tif"
        shape_zyx = _write_stack(path, manifest.preprocessing.tile_size_px)
        boxes = options.boxes or DEFAULT_BOXES
        return Subject(path, "synthetic slices of one tile", shape_zyx, (0, shape_zyx[0]), None, 1.0, boxes)
    with open_volume(options.volume, options.voxel_size_nm) as volume:
        shape_zyx = volume.info.shape_zyx
    used = min(shape_zyx[0], _MOST_SLICES_USED)
    first = (shape_zyx[0] - used) // 2
    has_detector = any(graph.role == "detector" for graph in manifest.graphs)
    found = options.boxes or (None if has_detector else DEFAULT_BOXES)
    return Subject(
        options.volume, options.volume.name, shape_zyx, (first, first + used), options.voxel_size_nm, None, found
    )


def _write_stack(path: Path, tile_size_px: int) -> tuple[int, int, int]:
    """Write slices that fill one tile: a small phantom, mirrored out to that size and shifted from slice to slice."""
    side = max(64, min(tile_size_px, _PHANTOM_PX))
    raw = make_phantom(PhantomOptions((_PHANTOM_SLICES, side, side), seed=1)).raw
    lattice = np.pad(raw, ((0, 0), (0, side), (0, side)), mode="symmetric")
    copies = -(-tile_size_px // (2 * side)) + 1
    shape_zyx = (_STACK_SLICES, tile_size_px, tile_size_px)
    with create_labels(path, LabelVolumeSpec(shape_zyx, np.dtype(np.uint8), None)) as writer:
        for z in range(_STACK_SLICES):
            shift = 7 * (z // _PHANTOM_SLICES)
            wide = np.tile(lattice[z % _PHANTOM_SLICES], (copies, copies))
            writer.write(z, wide[shift : shift + tile_size_px, shift : shift + tile_size_px])
    return shape_zyx


def choose_combinations(
    bundle: Bundle, options: BenchmarkOptions
) -> tuple[tuple[Combination, ...], tuple[LeftOut, ...]]:
    """Return what to measure, the preferred first and fp32 before other precisions; and what not, and why.

    Raises
    ------
    InvalidArgumentError
        For an engine, device or precision that does not exist.
    MissingCapabilityError
        Where one that was asked for does not work here, or nothing does.
    """
    wishes = [
        SessionOptions(engine, device, precision, options.threads)
        for engine in options.engines or (_ANY,)
        for device in options.devices or (_ANY,)
        for precision in options.precisions or (None,)
    ]
    offered = dict.fromkeys(
        combination for wish in wishes for combination in combinations_on_offer(bundle.manifest, wish, tuple(ENGINES))
    )
    refusals = {place: _refusal(*place, options) for place in dict.fromkeys((c.engine, c.device) for c in offered)}
    left_out = [LeftOut(*place, None, None, reason) for place, reason in refusals.items() if reason is not None]
    works = [c for c in offered if refusals[c.engine, c.device] is None]
    refused = {place[0]: reason for place, reason in refusals.items() if reason is not None}
    for engine in options.engines:
        if engine not in {c.engine for c in works}:
            raise MissingCapabilityError(f"engine {engine}: {refused[engine]}; see `dendsam-deploy doctor`")
    if not works:
        raise MissingCapabilityError(f"nothing here runs {bundle.path}; see `dendsam-deploy doctor`")
    if not options.engines and not options.precisions and bundle.parity is not None:
        failed = [c for c in works if bundle.parity.failures_of(*c)]
        left_out += [LeftOut(*c, None, "it broke limits of `verify`: ask for it by --engine") for c in failed]
        works = [c for c in works if c not in failed]
    return tuple(sorted(works, key=lambda c: PRECISIONS.index(c.precision))), tuple(left_out)


def _refusal(engine: str, device: str, options: BenchmarkOptions) -> str | None:
    """Return why an engine does not run on a device here, or None."""
    return why_not(ENGINES[engine], device, SessionOptions(engine, device, None, options.threads))


def bench_setup(
    bundle: Bundle, combination: Combination, subject: Subject, options: BenchmarkOptions, workspace: Path
) -> BenchSetup:
    """Say what one worker puts on its bench."""
    is_reference = combination.engine == TORCH_REFERENCE
    return BenchSetup(
        bundle=str(bundle.path),
        engine=combination.engine,
        device=combination.device,
        precision=combination.precision,
        threads=options.threads,
        volume=str(subject.volume),
        slices=subject.slices,
        voxel_size_nm=subject.voxel_size_nm,
        zoom=subject.zoom,
        boxes=subject.boxes,
        workspace=str(workspace),
        trusted_engines=options.trusted_engines,
        sam=str(options.sam) if is_reference else None,
        detector=str(options.detector) if is_reference and options.detector else None,
    )


def graph_cases(
    manifest: Manifest, graphs: Mapping[str, str], precision: str, encoder_batches: list[int]
) -> tuple[Case, ...]:
    """Return the calls of graphs to measure; a graph that runs at another precision is measured with that one.

    Parameters
    ----------
    manifest : Manifest
        The bundle's manifest.
    graphs : mapping
        Precision of each graph of a combination, by role.
    precision : str
        The combination's own.
    encoder_batches : list of int
        Tiles of one call of the encoder.
    """
    regions = manifest.decoding.region_sizes
    usual = regions[min(1, len(regions) - 1)]
    cases = {
        "detector": [Case("graph", "detector")],
        "encoder": [Case("graph", "encoder", batch) for batch in encoder_batches],
        "decoder": [Case("graph", "decoder", count, usual) for count in BOX_COUNTS]
        + [Case("graph", "decoder", DEFAULT_BOXES, region) for region in regions if region != usual],
    }
    return tuple(case for role, of_role in cases.items() if graphs.get(role) == precision for case in of_role)
