"""The whole chain on real tissue: fine-tune both models, export, verify, segment unseen sections, evaluate.

    python benchmarks/real_tissue.py raw.tif neurites.tif --train 0:130 --test 137:167 -o runs/medulla

Every step is a `dendsam-deploy` command in its own process, timed from outside. Besides the scores of the automatic
result, the masks that the *deployed* graphs make of exact ground-truth boxes are compared with the truth, next to two
answers that need no model: the filled box and the ellipse in it. Writes `results.json` and `overlay.png` (raw, truth,
result) into the folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.pipeline.segment import SliceOptions, decode_boxes
from dendsam_deploy.runtimes.session import Session, SessionOptions, open_session
from dendsam_deploy.training.boxes import boxes_from_labels, label_components
from dendsam_deploy.training.samples import MIN_OBJECT_PX
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.open import open_labels, open_volume

if TYPE_CHECKING:
    from numpy.typing import NDArray
from PIL import Image

LARGE_OBJECT_PX = 100


@dataclass(frozen=True, slots=True)
class Chain:
    """Where the chain reads and writes, and on what."""

    volume: Path
    labels: Path
    out: Path
    voxel_size: str | None
    background: tuple[int, ...]
    test: tuple[int, int]

    @property
    def bundle(self) -> Path:
        """The exported bundle."""
        return self.out / "bundle"

    @property
    def result(self) -> Path:
        """Output folder of `segment`."""
        return self.out / "segmented"


def main() -> None:
    """Run the chain and report."""
    arguments = _parse()
    chain = Chain(
        arguments.volume,
        arguments.labels,
        arguments.out,
        arguments.voxel_size,
        tuple(arguments.background_label),
        _range(arguments.test),
    )
    chain.out.mkdir(parents=True, exist_ok=True)
    seconds = _train(chain, arguments) if not arguments.keep_models else {}
    seconds |= _deploy(chain)
    results: dict[str, Any] = {
        "command": [Path(word).name for word in sys.argv],  # paths of a machine help nobody else
        "host": {"machine": platform.machine(), "processor": _processor(), "python": platform.python_version()},
        "seconds": seconds,
        "box_prompts": _box_prompts(chain),
        "automatic": json.loads((chain.out / "scores.json").read_text())["slices"],
    }
    (chain.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _write_overlay(chain)
    print(json.dumps({key: results[key] for key in ("seconds", "box_prompts", "automatic")}, indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--voxel-size", help="Z,Y,X in nm")
    parser.add_argument("--train", default="0:130", help="sections to train on, a part of them held out")
    parser.add_argument("--test", default="137:167", help="sections that training never sees")
    parser.add_argument("--background-label", type=int, action="append", default=[])
    parser.add_argument("--sam-minutes", type=float, default=30.0)
    parser.add_argument("--detector-minutes", type=float, default=20.0)
    parser.add_argument("--keep-models", action="store_true", help="use the checkpoints that an earlier run left")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def _train(chain: Chain, arguments: argparse.Namespace) -> dict[str, float]:
    """Fine-tune both models from the packaged weights."""
    common = ["--slices", arguments.train, *_voxel_size(chain)]
    common += [word for label in chain.background for word in ("--background-label", str(label))]
    data = [str(chain.volume), str(chain.labels)]
    detector = ["finetune", "detector", *data, "-o", str(chain.out / "detector.pt"), *common]
    sam = ["finetune", "sam", *data, "--model", "tiny", "-o", str(chain.out / "sam.pt"), *common]
    return {
        "finetune detector": _run([*detector, "--minutes", str(arguments.detector_minutes)]),
        "finetune sam": _run([*sam, "--minutes", str(arguments.sam_minutes)]),
    }


def _deploy(chain: Chain) -> dict[str, float]:
    """Export, verify, segment the unseen sections, evaluate."""
    sections = f"{chain.test[0]}:{chain.test[1]}"
    models = ["--sam", str(chain.out / "sam.pt"), "--detector", str(chain.out / "detector.pt")]
    ignored = [word for label in chain.background for word in ("--ignore-label", str(label))]
    scores = ["--json", str(chain.out / "scores.json")]
    segmented = [str(chain.volume), "-b", str(chain.bundle), "-o", str(chain.result), "--slices", sections, "--restart"]
    truth = [str(chain.result / "labels.tif"), str(chain.labels), "--slices", sections]
    return {
        "export": _run(["export", *models, "-o", str(chain.bundle), "--overwrite"]),
        "verify": _run(["verify", str(chain.bundle)]),
        "segment": _run(["segment", *segmented, *_voxel_size(chain)]),
        "evaluate": _run(["evaluate", *truth, *ignored, *scores]),
    }


def _run(arguments: list[str]) -> float:
    """Run one command of the program; return its wall time in seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dendsam_deploy", *arguments], check=True)
    return time.perf_counter() - started


def _box_prompts(chain: Chain) -> dict[str, float]:
    """Compare the deployed graphs' masks of exact boxes with the truth, object by object."""
    voxel_size = None if chain.voxel_size is None else _triple(chain.voxel_size)
    scores: list[tuple[int, float, float, float]] = []
    with (
        open_volume(chain.volume, voxel_size) as image,
        open_labels(chain.labels) as labels,
        open_session(Bundle.open(chain.bundle), SessionOptions()) as session,
    ):
        options = SliceOptions(voxel_size_nm=image.info.voxel_size_nm)
        for z in range(*chain.test):
            truth = labels.read(z).astype(np.uint32)
            truth[np.isin(truth, chain.background)] = 0
            scores += _slice_prompts(to_uint8(image.read(z)), truth, session, options)
    table = np.array(scores)
    large = table[:, 0] >= LARGE_OBJECT_PX
    return {
        "objects": len(table),
        "mean_iou": float(table[:, 1].mean()),
        "median_iou": float(np.median(table[:, 1])),
        "mean_iou_of_100_px_or_more": float(table[large, 1].mean()),
        "filled_box_mean_iou": float(table[:, 2].mean()),
        "ellipse_mean_iou": float(table[:, 3].mean()),
    }


def _slice_prompts(
    image: NDArray[np.uint8], truth: NDArray[np.uint32], session: Session, options: SliceOptions
) -> list[tuple[int, float, float, float]]:
    """Return (area, IoU of the mask, of the filled box, of the ellipse in the box) of each object of a slice."""
    components, _ = label_components(truth)
    objects = boxes_from_labels(truth, MIN_OBJECT_PX)
    numbers = np.nonzero(np.bincount(components.ravel())[1:] >= MIN_OBJECT_PX)[0] + 1
    rows = []
    for number, box, area, found in zip(
        numbers,
        objects.boxes_xyxy,
        objects.areas_px,
        decode_boxes(image, session, objects.boxes_xyxy, options),
        strict=True,
    ):
        inside = components[found.window.slices] == number
        overlap = int((inside & found.mask).sum())
        x0, y0, x1, y1 = box.astype(int)
        true = components[y0:y1, x0:x1] == number
        y = (np.arange(y1 - y0)[:, None] + 0.5) / (y1 - y0) * 2 - 1
        x = (np.arange(x1 - x0)[None] + 0.5) / (x1 - x0) * 2 - 1
        ellipse = y**2 + x**2 <= 1
        ellipse_iou = (true & ellipse).sum() / (true | ellipse).sum()
        rows.append((int(area), overlap / (int(area) + int(found.mask.sum()) - overlap), area / true.size, ellipse_iou))
    return rows


def _write_overlay(chain: Chain) -> None:
    """Write raw, truth and result of three unseen sections side by side."""
    first, end = chain.test
    panels = []
    with (
        open_volume(chain.volume) as image,
        open_labels(chain.labels) as labels,
        open_labels(chain.result / "labels.tif") as result,
    ):
        for z in (first, (first + end) // 2, end - 1):
            raw = to_uint8(image.read(z))
            truth = labels.read(z).astype(np.uint32)
            truth[np.isin(truth, chain.background)] = 0
            found = result.read(z - first).astype(np.uint32)
            panels.append(
                np.concatenate([_coloured(raw, shown) for shown in (np.zeros_like(truth), truth, found)], axis=1)
            )
    # Sixty-four colours are plenty, and a fifth of the bytes.
    picture = Image.fromarray(np.concatenate(panels)).quantize(64)
    picture.save(chain.out / "overlay.png", optimize=True)


def _coloured(raw: NDArray[np.uint8], labels: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Blend labels over a slice, each label in a colour of its own."""
    hue = (labels * np.uint32(2654435761)) >> np.uint32(8)
    colour = np.stack([(hue >> shift) % 206 + 50 for shift in (0, 5, 11)], axis=-1)
    grey = np.repeat(raw[..., None], 3, axis=2)
    return np.where(labels[..., None] > 0, 0.6 * grey + 0.4 * colour, grey).astype(np.uint8)


def _voxel_size(chain: Chain) -> list[str]:
    return [] if chain.voxel_size is None else ["--voxel-size", chain.voxel_size]


def _range(text: str) -> tuple[int, int]:
    first, end = text.split(":")
    return int(first), int(end)


def _triple(text: str) -> tuple[float, float, float]:
    z, y, x = (float(part) for part in text.split(","))
    return z, y, x


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
