"""What the comparisons share: models made on the spot, contestants that take turns, results as JSON.

Method. All contestants of a comparison do the same work in one process, one after the other, round after round; the
order rotates from round to round. Each is called once before the rounds begin, and that call is kept apart. A sample
is the wall time of a call that returns when its result is there. Every round has another input. Ratios are those of
medians, with an interval that holds them in 95 of 100 cases, by resampling the raw samples, which are all kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.durable import write_text
from dendsam_deploy.errors import DendsamError
from dendsam_deploy.evaluate.latency_plan import BenchmarkOptions, choose_combinations
from dendsam_deploy.evaluate.latency_statistics import ratio_interval, summarise
from dendsam_deploy.host import cpu_cores, examine_host
from dendsam_deploy.models.architectures import MODEL_TYPES, default_image_size
from dendsam_deploy.models.sam import build_sam, initialise
from dendsam_deploy.models.weights import TrainingRecord, load_sam, save_sam
from dendsam_deploy.runtimes.choice import Choice
from dendsam_deploy.runtimes.session import Session, SessionOptions, session_on
from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from segment_anything.modeling import Sam

    from dendsam_deploy.bundle.parity import Combination

VARIANTS = 4
"""Inputs that take turns."""

_PHANTOM_PX = 256


@dataclass(frozen=True, slots=True)
class Contestant:
    """Someone who can do the work: takes the number of the round, returns when it is done."""

    name: str
    work: Callable[[int], object]


@dataclass(slots=True)
class Table:
    """Samples of all contestants in all kinds of work, and what was found besides.

    Parameters
    ----------
    rows : list of dict
        One for each contestant in each kind of work.
    ratios : list of dict
        Speed of contestants over one of them.
    missing : dict
        Contestants that could not take part, and why.
    facts : dict
        Whatever else the comparison found.
    host : dict
        The machine before anything was measured.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=lambda: examine_host().to_document())

    def compete(self, work: str, contestants: Sequence[Contestant], repeats: int, over: Sequence[str]) -> None:
        """Let contestants take turns with a kind of work, and compare each with those before it in `over`."""
        first: dict[str, float] = {}
        for contestant in contestants:
            print(f"{work}: warming up {contestant.name}", file=sys.stderr)
            first[contestant.name] = milliseconds(contestant.work, 0)
        samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        for turn in range(repeats):
            print(f"{work}: round {turn + 1} of {repeats}", file=sys.stderr)
            for place in range(len(contestants)):
                contestant = contestants[(turn + place) % len(contestants)]
                samples[contestant.name].append(milliseconds(contestant.work, turn + 1))
        for name, times in samples.items():
            summary = summarise(times)
            self.rows.append(
                {"work": work, "by": name, "median_ms": summary.median_ms, "mad_ms": summary.mad_ms}
                | {"p90_ms": summary.p90_ms, "first_ms": first[name], "samples_ms": times}
            )
            for base in over[: over.index(name)] if name in over else over:
                if base in samples:
                    low, high = ratio_interval(samples[base], times)
                    value = summarise(samples[base]).median_ms / summary.median_ms
                    self.ratios.append(
                        {"work": work, "by": name, "over": base, "value": value, "low": low, "high": high}
                    )

    def __str__(self) -> str:
        lines = [f"{row['median_ms']:12.1f} ms  {row['work']}, {row['by']}" for row in self.rows]
        lines += [
            f"{ratio['value']:8.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})  {ratio['work']}, {ratio['by']} over "
            f"{ratio['over']}"
            for ratio in self.ratios
        ]
        return "\n".join([*lines, *(f"missing: {name}: {reason}" for name, reason in self.missing.items())])


def milliseconds(work: Callable[[int], object], turn: int) -> float:
    """Return how long a call took."""
    started = time.perf_counter()
    work(turn)
    return (time.perf_counter() - started) * 1000


def parser_for(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every comparison has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-type", default="vit_b", choices=MODEL_TYPES, help="made with random weights")
    parser.add_argument("--image-size", type=int, help="px  [default: that of the type]")
    parser.add_argument("--sam", type=Path, help="checkpoint in place of random weights")
    parser.add_argument("--bundle", type=Path, help="bundle that was exported from --sam")
    parser.add_argument("--engine", action="append", default=[], help="of ours; repeatable  [default: all here]")
    parser.add_argument("--precision", action="append", default=[], help="of ours; repeatable  [default: all]")
    parser.add_argument("--boxes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cpu_cores(), help="of one operator, for everybody alike")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent / "results" / out)
    return parser


@dataclass(frozen=True, slots=True)
class Models:
    """The same weights as segment_anything's modules and as a bundle."""

    checkpoint: Path
    sam: Sam
    bundle: Bundle

    @property
    def size_px(self) -> int:
        """Side of a tile."""
        return self.bundle.manifest.preprocessing.tile_size_px


def prepare_models(arguments: argparse.Namespace, workspace: Path, detector: Path | None = None) -> Models:
    """Make a SAM, or take the one that was given, and export it where no bundle was given."""
    torch.set_num_threads(arguments.threads)
    checkpoint = arguments.sam or workspace / "sam.pt"
    if arguments.sam is None:
        size = arguments.image_size or default_image_size(arguments.model_type)
        sam = build_sam(arguments.model_type, size)
        initialise(sam, torch.Generator().manual_seed(0))
        save_sam(checkpoint, sam.state_dict(), TrainingRecord(arguments.model_type, size, None, 1.0))
    bundle = arguments.bundle
    if bundle is None:
        bundle = workspace / "bundle"
        words = ["export", "--sam", str(checkpoint), "-o", str(bundle), "--no-verify"]
        words += ["--detector", str(detector)] if detector else []
        words += [
            word for precision in arguments.precision if precision != "fp32" for word in ("--precision", precision)
        ]
        subprocess.run([sys.executable, "-m", "dendsam_deploy", *words], check=True)
    opened = Bundle.open(bundle)
    return Models(checkpoint, load_sam(checkpoint, opened.manifest.preprocessing.tile_size_px).sam, opened)


@contextmanager
def our_sessions(models: Models, arguments: argparse.Namespace, table: Table) -> Iterator[dict[str, Session]]:
    """Hold the bundle open on every combination that works; what does not is noted as missing."""
    options = BenchmarkOptions(
        engines=tuple(arguments.engine),
        devices=("cpu",),
        precisions=tuple(arguments.precision),
        threads=arguments.threads,
    )
    wanted, left_out = choose_combinations(models.bundle, options)
    for row in left_out:
        table.missing[f"ours, {row.engine} {row.precision or ''}".strip()] = row.reason
    with ExitStack() as stack:
        sessions = {}
        for combination in wanted:
            session = _session(models.bundle, combination, arguments.threads)
            try:
                sessions[f"ours, {combination.engine} {combination.precision}"] = stack.enter_context(session)
            except DendsamError as error:
                reason = str(error).replace(str(models.bundle.path), models.bundle.path.name)
                table.missing[f"ours, {combination.engine} {combination.precision}"] = reason
        yield sessions


def _session(bundle: Bundle, combination: Combination, threads: int | None) -> Session:
    """Return a session on a combination."""
    proven = bundle.parity is not None and bundle.parity.proves(*combination)
    return session_on(bundle, Choice(combination, proven), SessionOptions(threads=threads))


def phantom_tiles(size_px: int) -> list[NDArray[np.uint8]]:
    """Return square slices of synthetic tissue: a small phantom, mirrored out and shifted."""
    side = max(64, min(size_px, _PHANTOM_PX))
    raw = make_phantom(PhantomOptions((1, side, side), seed=1)).raw[0]
    cell = np.pad(raw, ((0, side), (0, side)), mode="symmetric")
    wide = np.tile(cell, (size_px // (2 * side) + 2,) * 2)
    return [np.ascontiguousarray(wide[9 * k : 9 * k + size_px, 5 * k : 5 * k + size_px]) for k in range(VARIANTS)]


def write_results(arguments: argparse.Namespace, method: str | None, table: Table, models: Models) -> None:
    """Write the results as JSON, without a name or a path of the machine, and print them."""
    document = {
        "method": " ".join((method or "").split()),
        "command": [Path(word).name for word in sys.argv],
        "host": table.host,
        "settings": {
            "model_type": models.bundle.manifest.model_type,
            "image_size_px": models.size_px,
            "weights": "random" if arguments.sam is None else arguments.sam.name,
            "boxes": arguments.boxes,
            "repeats": arguments.repeats,
            "threads": arguments.threads,
            "torch": torch.__version__,
        },
        "rows": table.rows,
        "ratios": table.ratios,
        "missing": table.missing,
        **table.facts,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, json.dumps(document, indent=2) + "\n")
    print(table)
