"""How the packaged weights do on phantoms that neither their training nor the choice of their settings has seen.

    python benchmarks/demo_seeds.py -o benchmarks/results/demo_seeds.json

Exports the packaged weights, segments whole phantoms of the demonstration's kind, and writes the mean scores per slice
of each seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.export.bundle import export_bundle
from dendsam_deploy.export.options import ExportOptions
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.summary import ObjectScores, score_objects
from dendsam_deploy.pipeline.segment import SliceOptions, segment_slice
from dendsam_deploy.runtimes.session import Session, SessionOptions, open_session
from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom
from dendsam_deploy.weights import PACKAGED_DETECTOR, PACKAGED_SAM

SEEDS = (101, 102, 103, 104, 105, 106, 107, 108, 109, 110)
SHAPE_ZYX = (6, 512, 512)


def main() -> None:
    """Export, score every seed, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bundle = export_bundle(ExportOptions(PACKAGED_SAM, Path(name) / "bundle", PACKAGED_DETECTOR))
        with open_session(Bundle.open(bundle), SessionOptions()) as session:
            rows = [{"seed": seed} | scores_of(seed, session) for seed in SEEDS]
    names = [field.name for field in dataclasses.fields(ObjectScores)]
    summary = {
        name: {"mean": float(np.mean(of)), "least": min(of), "most": max(of)}
        for name in names
        for of in [[row[name] for row in rows]]
    }
    arguments.out.write_text(json.dumps({"shape_zyx": SHAPE_ZYX, "summary": summary, "seeds": rows}, indent=2) + "\n")
    for name in ("pq", "sq", "dq", "oce"):
        print(f"{name}: mean {summary[name]['mean']:.3f}, {summary[name]['least']:.3f} to {summary[name]['most']:.3f}")


def scores_of(seed: int, session: Session) -> dict[str, float]:
    """Return the means over the slices of one phantom."""
    phantom = make_phantom(PhantomOptions(SHAPE_ZYX, seed))
    options = SliceOptions(voxel_size_nm=phantom.voxel_size_nm)
    scores = [
        dataclasses.asdict(
            score_objects(ContingencyTable.from_labels(truth, segment_slice(raw, session, None, options)[0]))
        )
        for raw, truth in zip(phantom.raw, phantom.labels, strict=True)
    ]
    return {name: float(np.mean([row[name] for row in scores])) for name in scores[0]}


if __name__ == "__main__":
    main()
