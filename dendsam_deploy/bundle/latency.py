"""How fast a bundle is, as a record that travels with it: what `benchmark` measured, where, and how."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dendsam_deploy.bundle.manifest import Precision  # noqa: TC001  the fields' types are read when a file is
from dendsam_deploy.bundle.parity import Combination
from dendsam_deploy.bundle.records import RecordError, object_from_json, record_from_json
from dendsam_deploy.errors import InputFileError

if TYPE_CHECKING:
    from dendsam_deploy.bundle.manifest import Manifest

BENCHMARK_FILE = "benchmark.json"
SCHEMA_VERSION = 1
"""Version of the file that this program writes and reads."""

TORCH_REFERENCE = "torch-reference"
"""Name by which the original torch modules are compared; they are no engine that a session could be opened on."""

Level = Literal["graph", "stage", "slice", "volume"]
LEVELS: tuple[Level, ...] = typing.get_args(Level)


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """Samples of one duration on one combination of engine, device and precision.

    Parameters
    ----------
    level : str
        ``graph``: one call of one graph, from arrays in main memory to arrays in main memory. ``stage``: a step of the
        pipeline for one slice. ``slice``: detecting, encoding, decoding and painting one slice that is in memory.
        ``volume``: a whole run of `segment`, from files to files.
    name : str
        Graph or stage; ``decoder:16`` is the decoder on regions of 16 cells.
    engine, device : str
        What executed it.
    precision : str
        Precision of that graph, or of the session.
    batch : int
        Tiles, boxes or slices of one sample, as `unit` says.
    unit : str
        ``tile``, ``box`` or ``slice``.
    boxes : int or None
        Objects that every slice was given; None for graphs, and where the detector decided.
    objects : float or None
        Objects of a slice that came out, on average.
    samples_ms, warmup_ms : tuple of float
        Every sample, and what ran before the first one and does not count.
    median_ms, p90_ms, p99_ms, mad_ms : float
        Percentiles of the samples and their median absolute deviation.
    per_second : float
        Units per second at the median.
    megavoxels_per_second : float or None
        The same in 10^6 voxels of the volume, for slices.
    peak_rss_mb : float or None
        Highest resident memory (10^6 bytes) of the process that runs this combination and nothing else, while a
        sample was taken: interpreter, libraries and all graphs of the bundle included.
    peak_device_mb : float or None
        Memory in use on the GPU after a sample, beyond what was in use before the graphs were loaded; None on a CPU.
    flop : float or None
        Useful operations of one sample; see `evaluate.operations`.
    reference_flop : float or None
        Operations with which segment_anything's own encoder does the same; None for other graphs.
    gflop_per_second : float or None
        The same per second, in 10^9.
    of_peak : float or None
        That rate over the machine's own rate for matrix products on this device at this precision.
    """

    level: Level
    name: str
    engine: str
    device: str
    precision: Precision
    batch: int
    unit: str
    boxes: int | None
    objects: float | None
    samples_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...]
    median_ms: float
    p90_ms: float
    p99_ms: float
    mad_ms: float
    per_second: float
    megavoxels_per_second: float | None = None
    peak_rss_mb: float | None = None
    peak_device_mb: float | None = None
    flop: float | None = None
    reference_flop: float | None = None
    gflop_per_second: float | None = None
    of_peak: float | None = None

    @property
    def combination(self) -> Combination:
        """What executed it."""
        return Combination(self.engine, self.device, self.precision)

    @property
    def plural(self) -> str:
        """The unit, of several."""
        return "boxes" if self.unit == "box" else f"{self.unit}s"

    @property
    def key(self) -> tuple[str, ...]:
        """What must be equal for two rows of different files to be about the same thing."""
        parts = (self.level, self.name, self.engine, self.device, self.precision, self.batch, self.boxes)
        return tuple(map(str, parts))


@dataclass(frozen=True, slots=True)
class CombinationRecord:
    """One combination as it was opened.

    Parameters
    ----------
    engine, device, precision : str
        The combination.
    graphs : dict
        Precision of each graph, by role; one that the bundle lacks at the session's precision runs at fp32.
    is_proven : bool
        Whether `verify` has passed it.
    load_ms : float
        From the start of a fresh process to loaded graphs.
    first_result_ms : float or None
        From the same start to the first segmented slice; None where no slice was segmented.
    """

    engine: str
    device: str
    precision: Precision
    graphs: dict[str, str]
    is_proven: bool
    load_ms: float
    first_result_ms: float | None

    @property
    def combination(self) -> Combination:
        """What executed it."""
        return Combination(self.engine, self.device, self.precision)

    @property
    def is_reference(self) -> bool:
        """Whether these are the original modules, which nobody has to prove."""
        return self.engine == TORCH_REFERENCE


@dataclass(frozen=True, slots=True)
class MatrixPeak:
    """Rate at which products of square matrices were computed, by an engine or by numpy."""

    by: str
    device: str
    precision: Precision
    gflop_per_second: float


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that was not measured, and why; None stands for all of a kind."""

    engine: str
    device: str
    precision: Precision | None
    row: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of throughputs.

    Parameters
    ----------
    name : str
        ``end_to_end_over_encoder``: throughput in tiles of a slice or volume over that of the encoder alone.
        ``over_torch_reference``: throughput over that of the original torch modules.
    level, row : str
        What is compared: level and name of the row.
    batch : int
        Its batch.
    engine, device, precision : str
        What executed it.
    value : float
        The ratio of the medians.
    low, high : float
        An interval that holds it in 95 of 100 cases, by resampling; equal to `value` where there is but one sample.
    """

    name: str
    level: Level
    row: str
    batch: int
    engine: str
    device: str
    precision: Precision
    value: float
    low: float
    high: float

    @property
    def combination(self) -> Combination:
        """What executed it."""
        return Combination(self.engine, self.device, self.precision)


@dataclass(frozen=True, slots=True)
class VolumeEstimate:
    """How long a volume takes on this machine.

    Parameters
    ----------
    engine, device, precision : str
        The fastest combination.
    slices : int
        Slices of the volume.
    slice_hw : (int, int)
        Their shape, slice px.
    hours : float
        The estimate.
    basis : str
        What it was extrapolated from, for people.
    """

    engine: str
    device: str
    precision: Precision
    slices: int
    slice_hw: tuple[int, ...]
    hours: float
    basis: str

    @property
    def combination(self) -> Combination:
        """What executed it."""
        return Combination(self.engine, self.device, self.precision)


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """Everything that `benchmark` found about a bundle on a machine.

    Parameters
    ----------
    bundle : str
        Name of the bundle.
    graphs : dict
        SHA-256 of every file of every graph, by file name.
    created_utc : str
        When it was measured.
    host : dict
        The machine, as `host.HostFacts` describes it; no name and no path of it.
    command : str
        The command that measures the same.
    settings : dict
        Threads, objects in a slice, shape of the slices and the like.
    combinations : tuple of CombinationRecord
        What was opened.
    rows : tuple of LatencyRow
        The measurements.
    ratios : tuple of Ratio
        What follows from them.
    matrix_peaks : tuple of MatrixPeak
        What the machine can do at best.
    estimates : tuple of VolumeEstimate
        How long a volume takes.
    left_out : tuple of LeftOut
        What was not measured.
    """

    bundle: str
    graphs: dict[str, str]
    created_utc: str
    host: dict[str, Any]
    command: str
    settings: dict[str, Any]
    combinations: tuple[CombinationRecord, ...]
    rows: tuple[LatencyRow, ...]
    ratios: tuple[Ratio, ...]
    matrix_peaks: tuple[MatrixPeak, ...]
    estimates: tuple[VolumeEstimate, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def slice_ms(self) -> dict[Combination, float]:
        """Median time of a slice, ms, by combination."""
        return {row.combination: row.median_ms for row in self.rows if row.level == "slice"}

    def of_level(self, level: Level) -> tuple[LatencyRow, ...]:
        """Return the rows of a level."""
        return tuple(row for row in self.rows if row.level == level)

    def to_document(self) -> dict[str, Any]:
        """Return the report as JSON values: the content of ``benchmark.json`` and of ``benchmark --json``."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}


def graph_digests(manifest: Manifest) -> dict[str, str]:
    """Return file -> SHA-256 of every file of every graph."""
    return {file.file: file.sha256 for graph in manifest.graphs for file in graph.files}


def latency_to_json(report: LatencyReport) -> str:
    """Return the text of ``benchmark.json``."""
    return json.dumps(report.to_document(), indent=2, ensure_ascii=False) + "\n"


def latency_from_json(text: str, source: str) -> LatencyReport:
    """Read what `latency_to_json` wrote.

    Parameters
    ----------
    text : str
        Content of the file.
    source : str
        Path of the file, for messages.

    Raises
    ------
    InputFileError
        Names the file and what is wrong with it.
    """
    try:
        document = object_from_json(text)
        if (version := document.pop("schema_version", None)) != SCHEMA_VERSION:
            raise RecordError(f"schema version {version!r}, this program reads {SCHEMA_VERSION}")
        return record_from_json(LatencyReport, document, "report", is_strict=False)
    except RecordError as error:
        raise InputFileError(
            f"{source}: not a report of `dendsam-deploy benchmark` ({error}); measure again"
        ) from error
