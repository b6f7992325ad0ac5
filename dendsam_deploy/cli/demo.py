"""``demo``: the whole chain on a phantom, without any download."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dendsam_deploy.cli.console import CheckFailedError
from dendsam_deploy.cli.options import command, extra, json_option, output_option
from dendsam_deploy.cli.phantom import write_phantom

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.progress import ProgressCallback

DEMO_SHAPE_ZYX = (12, 512, 512)
DEMO_SEED = 7
"""Not among the seeds of the phantoms that the packaged weights were trained on."""


@command("demo", "demo -o demo")
@output_option("Folder of everything that is made.  [default: demo]")
@json_option
@click.pass_context
def demo(context: click.Context, out: Path | None, json_file: Path | None) -> None:
    """Run the whole chain on an embedded example.

    A phantom volume is made, the packaged weights are exported to a bundle, the bundle is verified, the volume is
    segmented and the result is evaluated. The folder keeps all of it.
    """
    with extra("train"):
        from dendsam_deploy.export.bundle import export_bundle

    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.evaluate.parity import verify_bundle
    from dendsam_deploy.evaluate.scores import evaluate_labels
    from dendsam_deploy.export.options import ExportOptions
    from dendsam_deploy.pipeline.job import SegmentOptions
    from dendsam_deploy.pipeline.run import segment_volume
    from dendsam_deploy.report.run_folder import report_from_run
    from dendsam_deploy.report.scores_report import write_scores_report
    from dendsam_deploy.runtimes.session import SessionOptions, open_session
    from dendsam_deploy.volume.open import open_volume
    from dendsam_deploy.volume.phantom import PhantomOptions, make_phantom
    from dendsam_deploy.weights import PACKAGED_DETECTOR, PACKAGED_SAM

    folder = out or Path("demo")
    steps = Steps(context.obj)
    with steps.step("phantom"):
        files = write_phantom(make_phantom(PhantomOptions(DEMO_SHAPE_ZYX, DEMO_SEED)), folder)
    with steps.step("export") as progress:
        export = ExportOptions(PACKAGED_SAM, folder / "bundle", PACKAGED_DETECTOR, overwrite=True)
        bundle = export_bundle(export, progress=progress)
    with steps.step("verify") as progress:
        parity = verify_bundle(bundle, progress=progress)
    with steps.step("segment") as progress, open_session(Bundle.open(bundle), SessionOptions()) as session:
        segment = SegmentOptions(folder / "result", restart=True)
        result = segment_volume(files["raw"], session, segment, progress)
    with steps.step("evaluate") as progress:
        scores = evaluate_labels(result.out, files["labels"], progress=progress)
    with steps.step("report"), open_volume(files["raw"]) as raw:
        report_from_run(result.out, raw)
        write_scores_report(folder / "scores.html", scores)
    document = {
        "out": str(folder),
        "seconds": steps.seconds,
        "total_seconds": sum(steps.seconds.values()),
        "verify": parity.to_document(),
        "segment": result.to_document(),
        "evaluate": scores.to_document(),
        "reports": [str(result.out / "report.html"), str(folder / "scores.html")],
    }
    steps.console.result(story(document), document, json_file)
    if not parity.passed:
        raise CheckFailedError(f"{bundle}: the graphs differ from the weights by more than the limits allow")


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of the chain, each announced, timed and shown."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[ProgressCallback]:
        """Run one step."""
        started = time.perf_counter()
        with self.console.progress() as progress:
            yield progress
        self.seconds[name] = round(time.perf_counter() - started, 2)
        self.console.note(f"{name:<10}{self.seconds[name]:6.1f} s")


def story(document: dict[str, Any]) -> str:
    """Tell what the chain did in a few lines.

    Parameters
    ----------
    document : dict
        What ``demo --json`` writes.
    """
    parity, result, scores = document["verify"], document["segment"], document["evaluate"]
    return "\n".join(
        [
            f"bundle     {document['out']}/bundle: {len(parity['rows'])} comparisons with the weights, "
            f"{'all within their limits' if parity['passed'] else 'NOT all within their limits'}",
            f"segmented  {result['objects_3d']} objects in {result['slices']} slices ({result['objects_2d']} profiles)",
            f"per slice  PQ {scores['slices']['pq']:.3f}, OCE {scores['slices']['oce']:.3f} (mean)",
            f"in 3-D     PQ {scores['volume']['pq']:.3f}, adapted Rand error {scores['volume']['arand_error']:.3f}",
            f"reports    {', '.join(document['reports'])}",
            f"in all     {document['total_seconds']:.0f} s",
        ]
    )
