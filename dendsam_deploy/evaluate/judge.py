"""One session beside the truth, level by level: every comparison is made, and every number judged."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.bundle.parity import CompiledGraph, ParityReport, ParityRow
from dendsam_deploy.errors import InvalidArgumentError, ParityError
from dendsam_deploy.evaluate.compare_boxes import candidates_missing, compare_boxes, detect
from dendsam_deploy.evaluate.compare_frames import compare_frames
from dendsam_deploy.evaluate.compare_instances import (
    compare_detections,
    compare_labels,
    descending_scores,
    in_the_stack,
    masks_of_reference,
    paint_stack,
)
from dendsam_deploy.evaluate.compare_masks import compare_masks, stacked_plan
from dendsam_deploy.evaluate.compare_points import compare_points
from dendsam_deploy.evaluate.compare_preprocessing import compare_preprocessing
from dendsam_deploy.evaluate.compare_tensors import compare_embeddings, compare_end_to_end, compare_logits, encode
from dendsam_deploy.evaluate.findings import Finding
from dendsam_deploy.evaluate.limits import METRICS
from dendsam_deploy.evaluate.truth import FP32
from dendsam_deploy.instances import Detections
from dendsam_deploy.pipeline.decode import (
    BoxDecoder,
    DecodeOptions,
    Embeddings,
    boxes_in_tiles,
    decode_masks,
    encode_tiles,
)
from dendsam_deploy.pipeline.detect import DetectOptions, detect_objects
from dendsam_deploy.pipeline.prepare import PreparedSlice
from dendsam_deploy.runtimes.choice import machine_of
from dendsam_deploy.runtimes.runner import share_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.truth import Truth
    from dendsam_deploy.instances import Masks
    from dendsam_deploy.runtimes.runner import Runner
    from dendsam_deploy.runtimes.session import Session

STEPS = ("preprocessing", "encoder", "detector", "decoder", "instances")
"""What is told of while a session is judged."""


@dataclass(frozen=True, slots=True)
class _Bench:
    """What lies on the bench: a session, what it should return, its tiles as one slice, and how graphs are opened."""

    session: Session
    truth: Truth
    box_counts: tuple[int, ...]
    prepared: PreparedSlice
    use: Callable[[Runner], AbstractContextManager[Runner]]
    tell: Callable[[str], None]


def compare_session(
    session: Session, truth: Truth, box_counts: tuple[int, ...], tell: Callable[[str], None] = lambda step: None
) -> ParityReport:
    """Judge a session without touching any file.

    Graphs on a CPU are opened one after the other, since together they take twice the memory; those that share a device
    are opened together, since tensors pass between them there.

    Parameters
    ----------
    session : Session
        The graphs, not open.
    truth : Truth
        What they should return.
    box_counts : tuple of int
        Numbers of boxes in one call of the decoder.
    tell : callable
        Told the name of each of `STEPS` when it begins.
    """
    inputs = truth.inputs
    if not all(1 <= count <= len(inputs.boxes) for count in box_counts):
        raise InvalidArgumentError(f"box counts {box_counts} do not fit the reference's {len(inputs.boxes)} boxes")
    findings: list[Finding] = []
    prepared = PreparedSlice(stacked_plan(inputs), inputs.tiles, inputs.sizes)
    with ExitStack() as stack:
        together = share_memory(session.encoder, session.decoder)
        if together:
            stack.enter_context(session)
        bench = _Bench(session, truth, box_counts, prepared, nullcontext if together else _entered, tell)
        try:
            findings.extend(_findings(bench))
        except InvalidArgumentError:  # a graph broke the contract
            findings.append(Finding(2, "chain", "calls_refused", 1))
    rows = judge(findings, session, truth)
    return ParityReport(tuple(sorted(rows, key=lambda row: row.level)), compiled=_compiled(session))


def _compiled(session: Session) -> tuple[CompiledGraph, ...]:
    """Return what engines of a session compiled and kept: the judgement is about exactly that."""
    place = (session.engine, session.device, session.precision)
    return tuple(CompiledGraph(*place, role, digest) for role, digest in session.compiled_engines.items())


def _entered(runner: Runner) -> Runner:
    """Return a runner, which is its own context manager."""
    return runner


def _findings(bench: _Bench) -> Iterator[Finding]:
    """Measure everything, level by level as far as graphs allow."""
    session, inputs, expected = bench.session, bench.truth.inputs, bench.truth.sam
    bench.tell("preprocessing")
    yield from compare_preprocessing(session.manifest.preprocessing, inputs)
    yield from compare_frames(session.manifest)
    bench.tell("encoder")
    with bench.use(session.encoder) as encoder:
        together, last = encode(encoder, inputs)
    yield from compare_embeddings(together, expected.embeddings, inputs, f"batch={len(together)}")
    yield from compare_embeddings(last, expected.embeddings, inputs, "batch=1")
    if together.shape != expected.embeddings.shape or last.shape != expected.embeddings[-1:].shape:
        return
    detections = None
    if session.detector is not None:
        bench.tell("detector")
        detections = yield from _compare_detector(session.detector, bench)
    bench.tell("decoder")
    embeddings = np.concatenate([together[:-1], last])
    with bench.use(session.decoder) as decoder:
        yield from compare_logits(decoder, inputs, expected, session.manifest.decoding, bench.box_counts)
        yield from compare_end_to_end(decoder, embeddings, inputs, expected)
        if session.points is not None and bench.truth.points is not None:
            with bench.use(session.points) as clicked:
                yield from compare_points(clicked, expected.embeddings, bench.truth.points)
        bench.tell("instances")
        yield from _compare_chain(decoder, embeddings, detections, bench)


def _compare_detector(runner: Runner, bench: _Bench) -> Generator[Finding, None, Detections | None]:
    """Compare a detector's candidates, and return what the pipeline makes of them."""
    session, truth = bench.session, bench.truth
    thresholds, size = session.manifest.thresholds, truth.inputs.tiles.shape[1]
    is_itself = truth.detector_from == "fp32" and (session.engine, session.device, session.precision) == FP32
    expected = None if is_itself else truth.detector
    with bench.use(runner) as detector:
        found = detect(detector, truth.inputs)
        yield from compare_boxes(found, expected, size, thresholds.detection_score, "batch=1")
        together = detect(detector, truth.inputs, together=True)
        detail = f"batch={len(together.scores)}"
        yield from compare_boxes(together, expected, size, thresholds.detection_score, detail)
        if truth.stored_detector is not None:
            yield candidates_missing(found, truth.stored_detector)
        if truth.detected is None:
            return None
        prompts = truth.detected.prompts
        try:
            detections = detect_objects(
                bench.prepared, detector, DetectOptions(prompts.least_score, thresholds.nms_iou)
            )
        except ParityError:  # NaN, which is among the invalid boxes
            yield Finding(3, "detector", "detections_unmatched", np.nan)
            return None
    expected_boxes = in_the_stack(prompts.detections.boxes_xyxy, prompts.tile_index, size)
    yield compare_detections(detections, Detections(expected_boxes, prompts.detections.scores))
    return detections


def _compare_chain(
    decoder: Runner, embeddings: NDArray[np.float32], detections: Detections | None, bench: _Bench
) -> Iterator[Finding]:
    """Compare masks and labels as the pipeline makes them of the deployed graphs."""
    inputs, expected, manifest = bench.truth.inputs, bench.truth.sam, bench.session.manifest
    try:
        encoded = _encoded(decoder, embeddings, bench)
        given = Detections(
            in_the_stack(inputs.boxes, inputs.tile_index, inputs.tiles.shape[1]), descending_scores(len(inputs.boxes))
        )
        masks = _masks(decoder, encoded, given, bench)
        yield from compare_masks(masks, inputs, expected, manifest.thresholds.mask_logit)
        known = masks_of_reference(inputs.boxes, inputs.tile_index, expected.logits, expected.iou, manifest.decoding)
        painted, wanted = (paint_stack(given, some, inputs, manifest.thresholds) for some in (masks, known))
        yield from compare_labels(painted, wanted, len(inputs.tiles), "instances")
        if detections is None or bench.truth.detected is None:
            return
        painted = paint_stack(detections, _masks(decoder, encoded, detections, bench), inputs, manifest.thresholds)
    except ParityError:  # NaN, which level 2 has counted
        yield Finding(4, "chain", "mask_iou_mean", np.nan)
        return
    truth = bench.truth.detected
    tile_index, boxes = truth.prompts.tile_index, truth.prompts.detections.boxes_xyxy
    known = masks_of_reference(boxes, tile_index, truth.logits, truth.iou, manifest.decoding)
    drawn = Detections(in_the_stack(boxes, tile_index, inputs.tiles.shape[1]), truth.prompts.detections.scores)
    wanted = paint_stack(drawn, known, inputs, manifest.thresholds)
    for finding in compare_labels(painted, wanted, len(inputs.tiles), "detected"):
        yield replace(finding, reference=truth.masks_from)


def _encoded(decoder: Runner, embeddings: NDArray[np.float32], bench: _Bench) -> Embeddings:
    """Return the embeddings as the pipeline hands them to the decoder: on a device they stay there."""
    tiles = np.arange(len(embeddings), dtype=np.int64)
    if share_memory(bench.session.encoder, decoder):
        return encode_tiles(bench.prepared, tiles, bench.session.encoder, decoder)
    return Embeddings(embeddings, tiles)


def _masks(decoder: Runner, embeddings: Embeddings, detections: Detections, bench: _Bench) -> Masks:
    """Decode boxes of the stack."""
    plan = bench.prepared.plan
    box_index, tile_index = plan.views(detections.boxes_xyxy)
    boxes = boxes_in_tiles(detections.boxes_xyxy[box_index], tile_index, plan)
    options = DecodeOptions(bench.session.manifest.decoding)
    return decode_masks(boxes, box_index, tile_index, embeddings, BoxDecoder(decoder, options))


def judge(findings: Iterable[Finding], session: Session, truth: Truth) -> tuple[ParityRow, ...]:
    """Judge findings by the limits of the precision at which their graphs ran."""
    precisions = {runner.spec.role: runner.spec.precision for runner in session.runners}
    machine = machine_of(session.device)
    rows = []
    for finding in findings:
        own = next((at for role, at in precisions.items() if role == finding.graph), session.precision)
        limit, passed = METRICS[finding.metric].judge(finding.value, own)
        row = ParityRow(
            level=finding.level,
            graph=finding.graph,
            engine=session.engine,
            device=session.device,
            precision=session.precision,
            metric=f"{finding.metric}:{finding.detail}" if finding.detail else finding.metric,
            value=float(finding.value),
            limit=limit,
            passed=passed,
            reference=finding.reference or (truth.detector_from if finding.graph == "detector" else truth.sam_from),
            machine=machine,
        )
        rows.append(row)
    return tuple(rows)
