"""A small bundle, what its weights return, and its graphs held open for all tests of this folder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.evaluate.truth import Originals, Truth, collect_truth
from dendsam_deploy.runtimes.runner import CallableRunner
from dendsam_deploy.runtimes.session import Session, SessionOptions, open_session

if TYPE_CHECKING:
    from collections.abc import Iterator

BOXES = 12


@pytest.fixture(scope="session")
def whole_truth(exported) -> Truth:
    """What is stored in the bundle."""
    return collect_truth(Bundle.open(exported.bundle), Originals(threads=1))


@pytest.fixture(scope="session")
def truth(whole_truth) -> Truth:
    """The same with few enough boxes for many tests."""
    inputs, sam, few = whole_truth.inputs, whole_truth.sam, slice(0, BOXES)
    return dataclasses.replace(
        whole_truth,
        inputs=dataclasses.replace(inputs, boxes=inputs.boxes[few], tile_index=inputs.tile_index[few]),
        sam=dataclasses.replace(sam, logits=sam.logits[few], iou=sam.iou[few]),
    )


@pytest.fixture(scope="session")
def session(exported) -> Iterator[Session]:
    """The bundle's graphs, loaded once: what is judged opens and closes nothing."""
    with open_session(Bundle.open(exported.bundle), SessionOptions("onnxruntime", "cpu", threads=1)) as opened:
        doubles = {runner.spec.role: CallableRunner(runner.spec, runner.run) for runner in opened.runners}
        yield dataclasses.replace(opened, **doubles)


@pytest.fixture(scope="session")
def sam(exported):
    """The weights behind the bundle; copy before changing anything."""
    pytest.importorskip("torch")
    from dendsam_deploy.models.weights import load_sam  # noqa: PLC0415 - behind the check for torch

    return load_sam(exported.sam).sam
