"""``export``: weights become a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.options import PATH, Settings, command, extra, json_option, output_option
from dendsam_deploy.cli.weights import weights_file, with_weights

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.bundle.manifest import Precision
    from dendsam_deploy.bundle.parity import ParityReport
    from dendsam_deploy.cli.console import Console

SETTINGS = Settings("dendsam_deploy.export.options:ExportOptions")

PRECISIONS = click.Choice(["fp32", "fp16", "bf16", "int8"])
FORMS = click.Choice(["added", "widened"])


@command("export", "export --sam ca1-sam.pt --detector ca1-yolo.pt -o exports/ca1")
@click.option("--sam", type=PATH, required=True, help="SAM checkpoint, or a name such as sam_vit_b.")
@SETTINGS.option("--detector", "detector", PATH, "YOLO checkpoint, description (.yaml), ONNX file or name.")
@output_option("Folder of the bundle, such as exports/NAME.", required=True)
@SETTINGS.option("--name", "name", str, "Name of the bundle.  [default: that of its folder]")
@SETTINGS.option("--image-size", "image_size_px", int, "Side of the tiles, px.  [default: that of the weights]")
@SETTINGS.option("--overlap", "overlap_px", int, "Least overlap of tiles, px.  [default: 128, or a third]")
@SETTINGS.option("--pixel-size", "model_pixel_size_nm", float, "Pixel size in training, nm, where SAM's file lacks it.")
@SETTINGS.option("--zoom", "zoom", float, "Model px per slice px in training, where SAM's file lacks it.")
@SETTINGS.option("--precision", "precisions", [PRECISIONS], "Precision besides fp32. Repeatable.")
@SETTINGS.option(
    "--attention", "attention", FORMS, "Form of relative position at fp32.  [default: the faster one here]"
)
@SETTINGS.option("--reference", "reference_volume", PATH, "Volume to compare graphs on.  [default: a phantom]")
@SETTINGS.option("--licence", "licence", str, "Licence of the weights.")
@SETTINGS.flag("--no-points", "points", "Leave out the decoder for points, which only compare uses.")
@SETTINGS.flag("--overwrite", "overwrite", "Replace a bundle of that name.")
@click.option("--no-verify", is_flag=True, help="Publish the bundle without comparing it with the weights: unproven.")
@json_option
@click.pass_context
def export(context: click.Context, sam: Path, out: Path, no_verify: bool, json_file: Path | None) -> None:
    """Turn weights into a bundle that runs without torch.

    The graphs are compared with the weights before the bundle gets its name. A precision that fails is not published:
    the next one down the ladder (fp16, bf16, fp32) is tried. Without --detector, boxes come from elsewhere: segment
    --boxes.
    """
    with extra("train"):
        from dendsam_deploy.export.bundle import Judges, export_bundle

    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
    from dendsam_deploy.evaluate.stopwatch import time_encoder
    from dendsam_deploy.export.options import ExportOptions
    from dendsam_deploy.runtimes.session import SessionOptions

    def gate(folder: Path, precision: Precision) -> ParityReport:
        return verify_bundle(folder, VerifyOptions(session=SessionOptions(precision=precision)))

    console: Console = context.obj
    given = with_weights(console, SETTINGS.given(context), "detector")
    options = ExportOptions(sam=weights_file(console, sam), out=out, **given)
    with console.progress() as progress:
        judges = Judges(None if no_verify else gate, time_encoder)
        bundle = Bundle.open(export_bundle(options, judges, progress, console.note))
    graphs = ", ".join(graph.files[0].file.removesuffix(".onnx") for graph in bundle.manifest.graphs)
    passed = 0 if bundle.parity is None else sum(row.passed for row in bundle.parity.rows)
    proof = "unproven" if bundle.parity is None else f"{passed} comparisons with the weights passed"
    document = {
        "bundle": str(bundle.path),
        "name": bundle.manifest.name,
        "graphs": [graph.files[0].file for graph in bundle.manifest.graphs],
        "proven": bundle.parity is not None,
    }
    console.result(f"{bundle.path}: {graphs}; {proof}", document, json_file)
