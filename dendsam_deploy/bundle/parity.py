"""The proof that travels with a bundle: what `verify` measured, and by which limits it judged."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dendsam_deploy.bundle.manifest import PRECISIONS, Precision
from dendsam_deploy.errors import BundleError

if TYPE_CHECKING:
    from dendsam_deploy.bundle.manifest import Manifest

Reference = Literal["torch", "stored"]
"""Where the right answers came from: the original modules run now, or their outputs kept in the bundle."""


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One judgement, with the number by which it passed or failed.

    Parameters
    ----------
    level : int
        1 preprocessing, 2 tensors, 3 boxes, 4 masks.
    graph : str
        What was measured: ``detector``, ``encoder``, ``decoder``, ``preprocessing`` or ``chain``.
    engine, device : str
        What executed it.
    precision : str
        Precision of the graph.
    metric : str
        Name of the number; its definition stands in `evaluate.limits`.
    value : float
        What was measured. NaN never passes.
    limit : float or None
        What was allowed; None for numbers that are reported without being judged.
    passed : bool
        The judgement.
    reference : str
        ``torch`` or ``stored``.
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


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All judgements about one bundle."""

    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether anything was judged and nothing failed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[ParityRow, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if not row.passed)

    def proves(self, engine: str, device: str, precision: Precision) -> bool:
        """Tell whether a combination was judged and every one of its rows passed."""
        rows = [row for row in self.rows if (row.engine, row.device, row.precision) == (engine, device, precision)]
        return bool(rows) and all(row.passed for row in rows)

    def merged_into(self, earlier: ParityReport) -> ParityReport:
        """Return the earlier report with the combinations that this one judged replaced by its rows."""
        judged = {(row.engine, row.device, row.precision) for row in self.rows}
        kept = tuple(row for row in earlier.rows if (row.engine, row.device, row.precision) not in judged)
        return ParityReport(kept + self.rows)

    def to_document(self) -> dict[str, Any]:
        """Return the report as JSON values: ``passed`` and ``rows``. A number that is not finite becomes null."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            row["value"] = row["value"] if math.isfinite(row["value"]) else None
        return {"passed": self.passed, "rows": rows}


def parity_to_json(report: ParityReport, manifest: Manifest) -> str:
    """Return the text of ``parity.json``: the report, bound to the graphs that it is about by their digests."""
    return json.dumps({"graphs": _graph_digests(manifest), **report.to_document()}, indent=2) + "\n"


def parity_from_json(text: str, manifest: Manifest, source: str) -> ParityReport | None:
    """Read ``parity.json``; None where it is about other graphs than the manifest's.

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
    remedy = "delete it and run `dendsam-deploy verify`"
    try:
        document = json.loads(text)
        rows = tuple(_row_from_json(row) for row in document["rows"])
        digests = document["graphs"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise BundleError(f"{source}: not a parity report ({type(error).__name__}: {detail}); {remedy}") from error
    return ParityReport(rows) if digests == _graph_digests(manifest) else None


def _graph_digests(manifest: Manifest) -> dict[str, str]:
    """Return file -> SHA-256 of every file of every graph."""
    return {file.file: file.sha256 for graph in manifest.graphs for file in graph.files}


def _row_from_json(row: dict[str, Any]) -> ParityRow:
    """Build one row; a missing value becomes NaN, and a row without a finite value cannot have passed."""
    value = math.nan if row["value"] is None else float(row["value"])
    limit = None if row["limit"] is None else float(row["limit"])
    result = ParityRow(**{**row, "value": value, "limit": limit})
    if result.precision not in PRECISIONS or result.reference not in typing.get_args(Reference):
        raise ValueError(f"unknown precision or reference in {row}")
    if not isinstance(result.passed, bool) or (result.passed and not math.isfinite(value)):
        raise ValueError(f"a row cannot have passed with the value {value}")
    return result
