"""How `segment` scales: with slices, pixels and boxes its time must grow linearly, its memory not at all with slices.

    python benchmarks/scaling.py --bundle exports/ca1
    python benchmarks/scaling.py --model-type tiny --image-size 64 --slices 2,4 --sides 1,2 --counts 4,16 -o trial.json

Every point is a whole run of `segment_volume`, from files to files, linking and tables included, in a fresh process
that does nothing else; its peak of resident memory is the kernel's. The volume is synthetic, the boxes are given (the
detector, if there is one, works and its answer is replaced), and one dimension varies while the others stay. The
exponent is the slope of log time over log size between the smallest and the largest point; "linear misfit" is the
largest relative deviation from the best straight line, which unlike a power law may begin above zero: a run has a
beginning and an end that no slice pays for.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from side_by_side import Models, Table, parser_for, phantom_tiles, prepare_models, write_results

from dendsam_deploy.evaluate.latency_bench import BenchSetup, Case
from dendsam_deploy.evaluate.latency_plan import BenchmarkOptions, choose_combinations
from dendsam_deploy.evaluate.latency_worker import Worker
from dendsam_deploy.volume.labels import LabelVolumeSpec, create_labels

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from dendsam_deploy.bundle.parity import Combination


def main() -> None:
    """Measure, report."""
    parser = parser_for(__doc__, "scaling.json")
    parser.add_argument("--slices", type=numbers, default="4,8,16,32,64", help="numbers of slices")
    parser.add_argument("--sides", type=numbers, default="1,2,3,4", help="tiles along each side of a slice")
    parser.add_argument("--counts", type=numbers, default="16,32,64,128,256", help="boxes of a slice")
    parser.set_defaults(model_type="tiny", repeats=1)
    arguments = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        models = prepare_models(arguments, Path(name))
        run = Runs(models, fastest_combination(models, arguments), arguments, Path(name))
        few, boxes = arguments.slices[0], arguments.boxes
        points = {
            "slices": [Point(n, n, 1, boxes) for n in arguments.slices],
            "pixels": [Point(run.side_px(n) ** 2, few, n, boxes * n * n) for n in arguments.sides],
            "boxes": [Point(n, few, 1, n) for n in arguments.counts],
        }
        measured = {what: [run.measure(what, point, table) for point in listed] for what, listed in points.items()}
    table.facts["engine"] = list(run.combination)
    table.facts["scaling"] = {what: fit(points) for what, points in measured.items()}
    write_results(arguments, __doc__, table, models)
    for what, found in table.facts["scaling"].items():
        print(
            f"{what}: time grows with the power {found['exponent']:.2f}, linear misfit {found['linear_misfit']:.1%}; "
            f"memory {found['memory_ratio']:.2f} times from the smallest to the largest"
        )


@dataclass(frozen=True, slots=True)
class Point:
    """A volume: `size` is what varies, `tiles` counts along one side of a slice, `boxes` in one slice."""

    size: int
    slices: int
    tiles: int
    boxes: int

    @property
    def words(self) -> str:
        """What it is."""
        return f"{self.slices} slices of {self.tiles**2} tiles, {self.boxes} boxes each"


class Runs:
    """Runs of `segment_volume` on synthetic volumes."""

    def __init__(self, models: Models, combination: Combination, arguments: argparse.Namespace, folder: Path) -> None:
        self.models, self.combination, self.folder = models, combination, folder
        self.repeats, self.threads = arguments.repeats, arguments.threads

    def side_px(self, tiles: int) -> int:
        """Return the side of a slice that takes so many tiles."""
        preprocessing = self.models.bundle.manifest.preprocessing
        return tiles * preprocessing.tile_size_px - (tiles - 1) * preprocessing.overlap_px

    def measure(self, what: str, point: Point, table: Table) -> tuple[int, float, float]:
        """Return size, fastest time in s and peak memory in MB of runs that differ in nothing."""
        path = self._volume(point.slices, self.side_px(point.tiles))
        engine, device, precision = self.combination
        setup = BenchSetup(
            bundle=str(self.models.bundle.path),
            engine=engine,
            device=device,
            precision=precision,
            threads=self.threads,
            volume=str(path),
            slices=(0, point.slices),
            voxel_size_nm=None,
            zoom=1.0,
            boxes=point.boxes,
            workspace=str(self.folder),
        )
        with Worker(setup) as worker:
            worker.take(Case("slice", "slice"), 0)  # warm-up
            samples = [worker.take(Case("volume", "volume", point.slices), turn) for turn in range(self.repeats)]
        path.unlink()
        times = [sample.total_ms for sample in samples]
        peak = max(sample.rss_mb or 0.0 for sample in samples)
        table.rows.append(
            {"work": f"segment, {what} vary", "by": point.words, "size": point.size}
            | {"median_ms": float(np.median(times)), "samples_ms": times, "peak_rss_mb": peak}
        )
        return point.size, min(times) / 1000, peak

    def _volume(self, slices: int, side_px: int) -> Path:
        """Write a volume of square slices."""
        planes = phantom_tiles(side_px)
        path = self.folder / "volume.tif"
        with create_labels(path, LabelVolumeSpec((slices, side_px, side_px), np.dtype(np.uint8), None)) as writer:
            for z in range(slices):
                writer.write(z, np.roll(planes[z % len(planes)], z))
        return path


def fit(points: Sequence[tuple[int, float, float]]) -> dict[str, Any]:
    """Describe how time and memory depend on size."""
    sizes, seconds, memory = (np.array(column, float) for column in zip(*points, strict=True))
    slope, start = np.polyfit(sizes, seconds, 1)
    misfit = np.abs(start + slope * sizes - seconds) / seconds
    return {
        "sizes": sizes.tolist(),
        "seconds": seconds.tolist(),
        "exponent": float(np.log(seconds[-1] / seconds[0]) / np.log(sizes[-1] / sizes[0])),
        "seconds_per_unit": float(slope),
        "seconds_at_zero": float(start),
        "linear_misfit": float(misfit.max()),
        "memory_mb": memory.tolist(),
        "memory_ratio": float(memory[-1] / memory[0]),
    }


def fastest_combination(models: Models, arguments: argparse.Namespace) -> Combination:
    """Return the preferred combination that works here."""
    options = BenchmarkOptions(tuple(arguments.engine), ("cpu",), tuple(arguments.precision), threads=arguments.threads)
    return choose_combinations(models.bundle, options)[0][0]


def numbers(text: str) -> list[int]:
    """Read whole numbers, in ascending order, separated by commas."""
    return sorted(int(word) for word in text.split(","))


if __name__ == "__main__":
    main()
