"""Graphs that are wrong on purpose, behind the contract of the right ones."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.evaluate.judge import compare_session
from dendsam_deploy.runtimes.runner import CallableRunner

if TYPE_CHECKING:
    from dendsam_deploy.bundle.parity import ParityReport
    from dendsam_deploy.evaluate.truth import Truth
    from dendsam_deploy.runtimes.session import Session

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors, Callable[[Tensors], Tensors]], Tensors]
"""Takes the inputs of a graph and the graph itself; returns outputs."""


def judged(session: Session, truth: Truth, box_counts: tuple[int, ...] = (3,)) -> ParityReport:
    return compare_session(session, truth, box_counts)


def failures(session: Session, truth: Truth) -> set[str]:
    """Return the metrics that fail, without their details."""
    return {row.metric.partition(":")[0] for row in judged(session, truth).failures}


def sabotaged(session: Session, role: str, change: Change) -> Session:
    """Replace one graph by a function of its inputs and of the graph itself, which must be open."""
    runner = getattr(session, role)
    double = CallableRunner(runner.spec, lambda inputs: change(dict(inputs), runner.run))
    return dataclasses.replace(session, **{role: double})


def with_outputs(session: Session, role: str, change: Callable[[Tensors], Tensors]) -> Session:
    """Replace some outputs of a graph by a function of all of them."""
    return sabotaged(session, role, lambda inputs, run: (outputs := run(inputs)) | change(outputs))


def with_inputs(session: Session, role: str, change: Callable[[Tensors], Tensors]) -> Session:
    """Replace some inputs of a graph by a function of all of them."""
    return sabotaged(session, role, lambda inputs, run: run(inputs | change(inputs)))


def from_torch(
    session: Session, sam: Any, change: Callable[[Any], None], roles: tuple[str, ...] = ("encoder", "decoder")
) -> Session:
    """Replace graphs by segment_anything's own modules after a change of a copy of them."""
    from dendsam_deploy.runtimes.torch_reference import decoder_runner, encoder_runner  # noqa: PLC0415 - needs torch

    sam = copy.deepcopy(sam)
    change(sam)
    makers = {"encoder": encoder_runner, "decoder": decoder_runner}
    made = {role: CallableRunner(getattr(session, role).spec, makers[role](sam).run) for role in roles}
    return dataclasses.replace(session, **made)
