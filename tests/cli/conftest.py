"""The program run as a user runs it, and small files to run it on."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
from command_outcome import Outcome

from dendsam_deploy.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run the program in this process with the given words; paths may be given as they are."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield call
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``raw.tif`` and ``labels.tif``: three bright discs that run through four slices of 64 x 80 px."""
    folder = tmp_path_factory.mktemp("discs")
    y, x = np.mgrid[:64, :80]
    labels = np.zeros((4, 64, 80), np.uint16)
    for label, (cy, cx) in enumerate([(16, 20), (40, 30), (30, 62)], start=1):
        for z in range(4):
            labels[z][(y - cy - z) ** 2 + (x - cx) ** 2 < 81] = label
    noise = np.random.default_rng(0).normal(0, 6, labels.shape)
    raw = np.clip(np.where(labels > 0, 170, 60) + noise, 0, 255).astype(np.uint8)
    for name, stack in (("raw", raw), ("labels", labels)):
        tifffile.imwrite(
            folder / f"{name}.tif",
            stack,
            imagej=True,
            resolution=(1 / 15, 1 / 15),
            metadata={"spacing": 40.0, "unit": "nm", "axes": "ZYX"},
        )
    return folder


@pytest.fixture(scope="session")
def random_sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny` SAM of 64 px with random weights."""
    torch = pytest.importorskip("torch", reason="needs the extra train")
    from dendsam_deploy.models.sam import build_sam, initialise  # noqa: PLC0415 - behind the check above
    from dendsam_deploy.models.weights import TrainingRecord, save_sam  # noqa: PLC0415 - as above

    sam = build_sam("tiny", 64)
    initialise(sam, torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("sam") / "random.pt"
    save_sam(path, sam.state_dict(), TrainingRecord("tiny", 64, 15.0, 1.0))
    return path


@pytest.fixture(scope="session")
def bundle(random_sam: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `random_sam`, exported as a user does it, without a detector and not verified."""
    path = tmp_path_factory.mktemp("exports") / "random"
    words = ["export", "--sam", str(random_sam), "-o", str(path), "--no-verify", "--pixel-size", "12"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    assert out.getvalue() == f"{path}: encoder, decoder, points; unproven\n"
    return path
