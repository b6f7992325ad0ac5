"""The proof that travels with a bundle: what `verify` measured, and by which limits it judged."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dendsam_deploy.bundle.manifest import Precision, Role  # noqa: TC001  the fields' types are read when a file is
from dendsam_deploy.bundle.records import RecordError, object_from_json, record_from_json
from dendsam_deploy.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dendsam_deploy.bundle.manifest import Manifest

Reference = Literal["torch", "stored", "fp32"]
"""Where the right answers came from: the original modules run now, their outputs kept in the bundle, or the bundle's
own fp32 graphs."""


class Combination(NamedTuple):
    """What a bundle runs on: an engine, a device such as ``cpu`` or ``cuda:0``, and a precision."""

    engine: str
    device: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.engine} on {self.device} at {self.precision}"


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One judgement, with the number by which it passed or failed.

    Parameters
    ----------
    level : int
        1 preprocessing, 2 tensors, 3 boxes, 4 masks, 5 instances.
    graph : str
        What was measured: ``detector``, ``encoder``, ``decoder``, ``points``, ``preprocessing`` or ``chain``.
    engine, device, precision : str
        What the bundle ran on. A graph that it does not have at that precision ran at fp32, and is held to the limit
        of fp32.
    metric : str
        Name of the number; its definition stands in `evaluate.limits`.
    value : float
        What was measured. NaN never passes.
    limit : float or None
        What was allowed; None for numbers that are reported without being judged.
    passed : bool
        The judgement.
    reference : str
        ``torch``, ``stored`` or ``fp32``.
    machine : str
        What computed: the instruction sets of the processor, or the GPU. Empty where it is not recorded.
    """

    level: int
    graph: str
    engine: str
    device: str
    precision: Precision
    metric: str
    value: float
    limit: float | None
    passed: bool
    reference: Reference
    machine: str = ""

    @property
    def combination(self) -> Combination:
        """What the bundle ran on."""
        return Combination(self.engine, self.device, self.precision)


@dataclass(frozen=True, slots=True)
class NotJudged:
    """A combination that could not be judged because an engine that works here cannot run these graphs.

    Parameters
    ----------
    engine, device, precision : str
        The combination.
    reason : str
        What the engine said.
    """

    engine: str
    device: str
    precision: Precision
    reason: str

    @property
    def combination(self) -> Combination:
        """What the bundle was to run on."""
        return Combination(self.engine, self.device, self.precision)


@dataclass(frozen=True, slots=True)
class CompiledGraph:
    """The compiled engine that a judgement was made with. To compile a graph again gives another engine.

    Parameters
    ----------
    engine, device, precision : str
        The combination.
    role : str
        The graph.
    sha256 : str
        Digest of the engine.
    """

    engine: str
    device: str
    precision: Precision
    role: Role
    sha256: str

    @property
    def combination(self) -> Combination:
        """What the bundle ran on."""
        return Combination(self.engine, self.device, self.precision)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All judgements about one bundle.

    Parameters
    ----------
    rows : tuple of ParityRow
        What was measured.
    not_judged : tuple of NotJudged
        What could not be.
    compiled : tuple of CompiledGraph
        What was judged of engines that compile graphs and keep the result.
    """

    rows: tuple[ParityRow, ...]
    not_judged: tuple[NotJudged, ...] = ()
    compiled: tuple[CompiledGraph, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether anything was judged and nothing failed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[ParityRow, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """What was judged, in the order in which it was."""
        return tuple(dict.fromkeys(row.combination for row in self.rows))

    @property
    def proven(self) -> tuple[Combination, ...]:
        """The combinations that were judged and of which every row passed."""
        failed = {row.combination for row in self.failures}
        return tuple(combination for combination in self.combinations if combination not in failed)

    def proven_on(self, machine_of: Callable[[str], str]) -> tuple[Combination, ...]:
        """Return the combinations whose proof holds on a machine.

        Every processor computes fp32 alike. At half precision and in 8 bits results depend on its instructions: one
        that has none for bf16 computes in fp32 instead, and sums of 8-bit products saturate on some. A GPU gets
        kernels of its own at every precision, some of which have been wrong, and so only its own proof counts.

        Parameters
        ----------
        machine_of : callable
            Takes a device and returns what `ParityRow.machine` would say about it.
        """
        machines = {row.combination: row.machine for row in self.rows}
        return tuple(
            c
            for c in self.proven
            if (c.device == "cpu" and c.precision == "fp32") or machines[c] in ("", machine_of(c.device))
        )

    def failures_of(
        self, engine: str | None = None, device: str | None = None, precision: Precision | None = None
    ) -> tuple[ParityRow, ...]:
        """Return the rows that failed on an engine, a device and at a precision; None stands for any."""
        wanted = (engine, device, precision)
        return tuple(
            row
            for row in self.failures
            if all(wish in (None, have) for wish, have in zip(wanted, row.combination, strict=True))
        )

    def proves(self, engine: str, device: str, precision: Precision) -> bool:
        """Tell whether a combination was judged and every one of its rows passed."""
        return Combination(engine, device, precision) in self.proven

    def compiled_of(self, combination: Combination) -> dict[Role, str]:
        """Return the SHA-256 of the compiled engines that a combination was judged with, by graph."""
        return {graph.role: graph.sha256 for graph in self.compiled if graph.combination == combination}

    def merged_into(self, earlier: ParityReport) -> ParityReport:
        """Return the earlier report with what this one says about a combination in place of what that one said."""
        told = {*self.combinations, *(row.combination for row in self.not_judged)}
        return ParityReport(
            tuple(row for row in earlier.rows if row.combination not in told) + self.rows,
            tuple(row for row in earlier.not_judged if row.combination not in told) + self.not_judged,
            tuple(graph for graph in earlier.compiled if graph.combination not in told) + self.compiled,
        )

    def to_document(self) -> dict[str, Any]:
        """Return the report as JSON values: ``passed``, ``rows``, ``not_judged``. What is not finite becomes null."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            row["value"] = row["value"] if math.isfinite(row["value"]) else None
        return {
            "passed": self.passed,
            "rows": rows,
            "not_judged": [dataclasses.asdict(row) for row in self.not_judged],
            "compiled": [dataclasses.asdict(graph) for graph in self.compiled],
        }


def parity_to_json(report: ParityReport, manifest: Manifest) -> str:
    """Return the text of ``parity.json``: the report, bound to the graphs and the regions that it is about."""
    return json.dumps({**_subject(manifest), **report.to_document()}, indent=2) + "\n"


def parity_from_json(text: str, manifest: Manifest, source: str) -> ParityReport | None:
    """Read ``parity.json``; None where it is about other graphs or regions than the manifest's.

    Parameters
    ----------
    text : str
        Content of the file.
    manifest : Manifest
        The bundle's manifest.
    source : str
        Path of the file, for messages.

    Raises
    ------
    BundleError
        Where the file is not what `parity_to_json` writes.
    """
    try:
        document = object_from_json(text)
        found = record_from_json(_File, document, "report", is_strict=False)
        rows = tuple(_row_from_json(row, f"report.rows[{index}]") for index, row in enumerate(found.rows))
    except RecordError as error:
        raise BundleError(
            f"{source}: not a parity report ({error}); delete it and run `dendsam-deploy verify`"
        ) from error
    if {"graphs": found.graphs, "decoding": found.decoding} != _subject(manifest):
        return None
    return ParityReport(rows, found.not_judged, found.compiled)


@dataclass(frozen=True, slots=True)
class _File:
    """What the file holds; of a row's value it knows that it may be missing."""

    graphs: dict[str, str]
    rows: tuple[dict[str, Any], ...]
    decoding: Any = None
    not_judged: tuple[NotJudged, ...] = ()
    compiled: tuple[CompiledGraph, ...] = ()


def _row_from_json(row: dict[str, Any], where: str) -> ParityRow:
    """Build one row; a value of null is one that was not finite, and a row without a value cannot have passed."""
    if row.get("value", math.nan) is not None:
        return record_from_json(ParityRow, row, where, is_strict=False)
    found = record_from_json(ParityRow, {**row, "value": 0.0}, where, is_strict=False)
    if found.passed:
        raise RecordError(f"{where} cannot have passed without a value")
    return dataclasses.replace(found, value=math.nan)


def _subject(manifest: Manifest) -> dict[str, Any]:
    """Return what a report is about: the SHA-256 of every file of every graph, and which regions are decoded."""
    decoding = dataclasses.asdict(manifest.decoding)
    return {
        "graphs": {file.file: file.sha256 for graph in manifest.graphs for file in graph.files},
        "decoding": decoding | {"region_sizes": list(decoding["region_sizes"])},
    }
