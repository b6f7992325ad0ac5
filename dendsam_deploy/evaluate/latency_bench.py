"""One combination of engine, device and precision on the bench: its graphs are loaded, samples are taken one by one."""

from __future__ import annotations

import importlib
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.latency import TORCH_REFERENCE
from dendsam_deploy.bundle.parity import Combination
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.evaluate.latency_subjects import SpreadBoxes, spread_boxes, spread_detections, with_fixed_boxes
from dendsam_deploy.evaluate.operations import graph_flop, reference_encoder_flop, useful_encoder_flop
from dendsam_deploy.evaluate.process_memory import PeakMemory
from dendsam_deploy.host import gpu_memory_in_use_mb
from dendsam_deploy.models.architectures import ENCODER_SHAPES
from dendsam_deploy.pipeline.clock import StageClock
from dendsam_deploy.pipeline.job import SegmentOptions, input_digest
from dendsam_deploy.pipeline.prepare import PreparedSlice, prepare_slice
from dendsam_deploy.pipeline.run import segment_volume
from dendsam_deploy.pipeline.segment import SliceOptions, SliceRecipe, make_recipe, segment_prepared
from dendsam_deploy.progress import ProgressCallback, no_progress
from dendsam_deploy.runtimes.choice import Choice, proven_here
from dendsam_deploy.runtimes.runner import keeps_tensors
from dendsam_deploy.runtimes.session import Session, SessionOptions, session_on
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.open import open_volume

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.latency import Level
    from dendsam_deploy.bundle.manifest import Precision, Role
    from dendsam_deploy.instances import Detections
    from dendsam_deploy.models.architectures import ModelType
    from dendsam_deploy.runtimes.runner import Runner
    from dendsam_deploy.volume.volume import VolumeReader

_VARIANTS = 4
"""Inputs that take turns, so that no sample repeats the one before it."""


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """What is put on the bench.

    Parameters
    ----------
    bundle : str
        Its folder.
    engine, device, precision : str
        The combination; the engine may be `TORCH_REFERENCE`.
    threads : int or None
        Threads of one operator on the CPU.
    volume : str
        The volume whose slices are measured.
    slices : (int, int)
        First slice to use and the one after the last.
    voxel_size_nm : (float, float, float) or None
        Voxel size that replaces what the volume records.
    zoom : float or None
        Model px per slice px; None for what follows from the pixel sizes.
    boxes : int or None
        Objects of every slice; None for those that the detector finds.
    workspace : str
        Folder for the results of whole runs.
    trusted_engines : tuple of str
        SHA-256 of compiled engines that may be loaded although somebody else made them.
    sam, detector : str or None
        Checkpoints of the reference.
    """

    bundle: str
    engine: str
    device: str
    precision: Precision
    threads: int | None
    volume: str
    slices: tuple[int, int]
    voxel_size_nm: tuple[float, float, float] | None
    zoom: float | None
    boxes: int | None
    workspace: str
    trusted_engines: tuple[str, ...] = ()
    sam: str | None = None
    detector: str | None = None

    @property
    def combination(self) -> Combination:
        """Engine, device and precision."""
        return Combination(self.engine, self.device, self.precision)


@dataclass(frozen=True, slots=True)
class Case:
    """What one sample executes.

    Parameters
    ----------
    level : str
        ``graph``, ``slice`` or ``volume``.
    name : str
        Role of the graph, otherwise the level.
    batch : int
        Tiles, boxes or slices.
    region : int or None
        Side of the decoder's regions, cells.
    """

    level: Level
    name: str
    batch: int = 1
    region: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """What one sample took.

    Parameters
    ----------
    total_ms : float
        Its duration.
    stage_ms : dict
        Durations of the stages of a slice; reading and preparing are not part of `total_ms`.
    objects : float or None
        Objects that came out, on average over slices.
    tiles : int or None
        Tiles of a slice that were encoded.
    rss_mb, device_mb : float or None
        Peak of this process's memory meanwhile; memory in use on the GPU afterwards beyond what was before loading.
    """

    total_ms: float
    stage_ms: dict[str, float] = field(default_factory=dict)
    objects: float | None = None
    tiles: int | None = None
    rss_mb: float | None = None
    device_mb: float | None = None


@dataclass(slots=True)
class Bench:
    """A session on which samples are taken; a context manager, made by `open_bench`."""

    setup: BenchSetup
    session: Session
    volume: VolumeReader
    recipe: SliceRecipe
    memory: PeakMemory
    device_before_mb: float | None
    _inputs: dict[Case, list[dict[str, NDArray[np.generic]]]] = field(default_factory=dict)
    _runs: int = 0

    @property
    def graphs(self) -> dict[str, str]:
        """Precision of each graph that is there, by role."""
        return {runner.spec.role: runner.spec.precision for runner in self.session.runners}

    @property
    def encoder_batches(self) -> list[int]:
        """Tiles of one call: one, and as many as the pipeline hands to a GPU."""
        encoder = self.session.encoder
        return sorted({1, encoder.rows_per_call}) if keeps_tensors(encoder) else [1]

    def take(self, case: Case, index: int) -> Sample:
        """Take sample number `index`; equal numbers have equal inputs on every combination."""
        self.memory.restart()
        sample = {"graph": self._graph_sample, "slice": self._slice_sample, "volume": self._volume_sample}[case.level](
            case, index
        )
        in_use = _device_memory_mb(self.session.device)
        device_mb = None if in_use is None or self.device_before_mb is None else in_use - self.device_before_mb
        return replace(sample, rss_mb=self.memory.peak_mb(), device_mb=device_mb)

    def _graph_sample(self, case: Case, index: int) -> Sample:
        """Call one graph."""
        runner = self._runner(case.name)
        if case not in self._inputs:
            self._inputs[case] = [self.graph_inputs(case, variant) for variant in range(_VARIANTS)]
        inputs = self._inputs[case][index % _VARIANTS]
        started = time.perf_counter()
        runner.run(inputs)
        return Sample(_ms_since(started))

    def graph_inputs(self, case: Case, variant: int) -> dict[str, NDArray[np.generic]]:
        """Return one set of inputs of a graph."""
        spec, size = self._runner(case.name).spec, self.recipe.plan.tile_size_px
        if spec.role != "decoder":
            tiles = [self._tile(variant + k) for k in range(case.batch)]
            joined = {name: np.concatenate([tile[name] for tile in tiles]) for name in ("tiles", "sizes")}
            return {tensor.name: joined[tensor.name] for tensor in spec.inputs}
        shape = tuple(n if isinstance(n, int) else 1 for n in spec.inputs[0].shape)
        rng = np.random.default_rng(variant)
        return {
            # What the numbers are does not matter to matrix products.
            "embeddings": rng.standard_normal(shape).astype(np.float32),
            "boxes": spread_boxes((size, size), case.batch, variant),
            "tile_index": np.zeros(case.batch, np.int64),
            "region": np.array([case.region], np.int64),
        }

    def flop(self, case: Case) -> tuple[float | None, float | None]:
        """Return the useful operations of a call of a graph, and those of segment_anything's encoder for the same."""
        manifest = self.session.manifest
        shape = ENCODER_SHAPES.get(cast("ModelType", manifest.model_type))
        if case.name == "encoder" and shape is not None:
            size = manifest.preprocessing.tile_size_px
            return case.batch * useful_encoder_flop(shape, size), case.batch * reference_encoder_flop(shape, size)
        graph = manifest.graph(cast("Role", case.name), "fp32")
        if graph is None:
            return None, None
        return graph_flop(Path(self.setup.bundle, graph.files[0].file), self.graph_inputs(case, 0)), None

    def _slice_sample(self, case: Case, index: int) -> Sample:
        """Segment a slice, from the file to labels; what counts begins when it is in memory."""
        clock = StageClock()
        prepared = self._prepared(index, clock)
        session, given = self._with_boxes()
        started = time.perf_counter()
        _, instances = segment_prepared(prepared, session, given, self.recipe, clock)
        total_ms = _ms_since(started)
        stages = {stage: seconds * 1000 for stage, seconds in clock.seconds.items()}
        boxes_xyxy = instances.boxes_xyxy if self.setup.boxes is None else self._fixed.boxes_xyxy
        _, tiles = self.recipe.plan.views(boxes_xyxy)
        return Sample(total_ms, stages, float(len(instances)), len(np.unique(tiles)))

    def _volume_sample(self, case: Case, index: int) -> Sample:
        """Segment some slices of the volume, from files to files."""
        first = self.setup.slices[0]
        self._runs += 1
        out = Path(self.setup.workspace, f"{'-'.join(self.setup.combination).replace(':', '')}-{self._runs}")
        session, given = self._with_boxes()
        options = SegmentOptions(
            out=out,
            slices=(first, first + case.batch),
            voxel_size_nm=self.setup.voxel_size_nm,
            zoom=self.setup.zoom,
            boxes=None if given is None else SpreadBoxes(given),
        )
        started = time.perf_counter()
        result = segment_volume(self.setup.volume, session, options)
        total_ms = _ms_since(started)
        shutil.rmtree(out, ignore_errors=True)
        return Sample(total_ms, objects=result.objects_2d / result.slices)

    def _prepared(self, index: int, clock: StageClock) -> PreparedSlice:
        """Read a slice and cut it into tiles, as a run of `segment` does."""
        first, stop = self.setup.slices
        z = first + index % (stop - first)
        with clock.measure("read"):
            image = self.volume.read(z)
        with clock.measure("prepare"):
            image_u8 = to_uint8(image, f"{self.volume.info.source}: slice {z}")
            prepared = prepare_slice(image_u8, self.recipe.plan)
            input_digest(image)
            return prepared

    def _tile(self, index: int) -> dict[str, NDArray[np.generic]]:
        """Return one tile of the volume, and its size."""
        prepared = self._prepared(index, StageClock())
        inputs = prepared.tile_inputs(index % len(self.recipe.plan.tiles))
        return cast("dict[str, NDArray[np.generic]]", inputs)  # nothing was uploaded

    def _with_boxes(self) -> tuple[Session, Detections | None]:
        """Return the session that finds the objects of this setup, or else the boxes to give to it."""
        if self.setup.boxes is None:
            return self.session, None
        if self.session.detector is None:
            return self.session, self._fixed
        return with_fixed_boxes(self.session, self.recipe.plan, self._fixed), None

    @property
    def _fixed(self) -> Detections:
        """The objects of every slice."""
        return spread_detections(self.recipe.plan, self.setup.boxes or 0)

    def _runner(self, role: str) -> Runner:
        """Return the runner of a role."""
        found = next((runner for runner in self.session.runners if runner.spec.role == role), None)
        if found is None:
            raise InvalidArgumentError(f"the bundle {self.session.manifest.name!r} has no {role}")
        return found

    def __enter__(self) -> Self:
        try:
            self.session = self.session.__enter__()
        except BaseException:
            self.volume.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.session.__exit__(kind, error, traceback)
        finally:
            self.volume.__exit__(kind, error, traceback)


def open_bench(setup: BenchSetup, progress: ProgressCallback = no_progress) -> Bench:
    """Open a bundle and a volume for measuring; the graphs are loaded when the bench is entered.

    Parameters
    ----------
    setup : BenchSetup
        What is put on the bench.
    progress : callable
        Told about slow preparations of an engine, such as compiling.

    Raises
    ------
    DendsamError
        Where the bundle, the volume, the engine or a checkpoint cannot be used.
    """
    memory, before_mb = PeakMemory(), _device_memory_mb(setup.device)
    bundle = Bundle.open(setup.bundle)
    session = _open_session(bundle, setup, progress)
    volume = open_volume(Path(setup.volume), setup.voxel_size_nm)
    height, width = volume.info.shape_zyx[1:]
    wishes = SliceOptions(voxel_size_nm=volume.info.voxel_size_nm, zoom=setup.zoom)
    return Bench(setup, session, volume, make_recipe((height, width), bundle.manifest, wishes), memory, before_mb)


def _open_session(bundle: Bundle, setup: BenchSetup, progress: ProgressCallback) -> Session:
    """Open the bundle on one combination, or the modules that it was exported from."""
    if setup.engine != TORCH_REFERENCE:
        choice = Choice(setup.combination, setup.combination in proven_here(bundle))
        options = SessionOptions(threads=setup.threads, trusted_engines=setup.trusted_engines, progress=progress)
        return session_on(bundle, choice, options)
    try:
        reference: Any = importlib.import_module("dendsam_deploy.runtimes.torch_reference")
    except ImportError as error:
        raise MissingCapabilityError(
            f"comparing with checkpoints needs torch ({error}); install dendsam-deploy[train], or leave --sam out"
        ) from error
    if setup.sam is None:
        raise InvalidArgumentError("the torch reference needs the SAM checkpoint that the bundle was exported from")
    encoder, decoder = reference.sam_runners(Path(setup.sam), bundle.manifest)
    detector = reference.detector_runner(Path(setup.detector), bundle.manifest) if setup.detector else None
    return Session(bundle.manifest, encoder, decoder, detector)


def _device_memory_mb(device: str) -> float | None:
    """Return the memory in use on a GPU; None for the CPU."""
    kind, _, index = device.partition(":")
    return gpu_memory_in_use_mb(int(index or 0)) if kind == "cuda" else None


def _ms_since(started: float) -> float:
    """Return the milliseconds since a reading of the clock."""
    return (time.perf_counter() - started) * 1000
