"""Right graphs that are fed or read wrongly: frames, indices, regions, padding, numbers that are none."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from sabotage import Tensors, failures, judged, sabotaged, with_inputs, with_outputs

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dendsam_deploy.runtimes.session import Session

SIZE = 128


def test_the_graphs_themselves_pass(session, truth):
    assert failures(session, truth) == set()


@pytest.mark.parametrize(
    ("place", "metric"),
    [
        ("encoder:patches.weight", "padded_tile_relative_max"),
        ("encoder:position", "embedding_relative_max"),
        ("encoder:blocks.3.norm1.weight", "embedding_relative_max"),
        ("decoder:no_mask_embed.weight", "logits_max_over_std"),
        ("decoder:positional_encoding_gaussian_matrix", "logits_max_over_std"),
        ("decoder:output_hypernetworks_mlps.0.layers.2.weight", "logits_max_over_std"),
        ("decoder:iou_prediction_head.layers.2.weight", "predicted_iou_max_difference"),
    ],
)
def test_a_weight_that_is_one_percent_off_is_found(exported, session, truth, place, metric):
    role, _, name_end = place.partition(":")
    model = onnx.load(exported.bundle / f"{role}.onnx")
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith(name_end))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    graph = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in graph.get_outputs()]

    def run_forged(inputs: Tensors, _: Callable) -> Tensors:
        return dict(zip(names, graph.run(names, inputs), strict=True))

    found = failures(sabotaged(session, role, run_forged), truth)
    assert metric in found
    if role == "encoder":
        assert "end_to_end_logits_max_over_std" in found
        assert "logits_max_over_std" not in found, "the decoder is judged by itself"


def half_a_pixel(inputs: Tensors) -> Tensors:
    return {"boxes": inputs["boxes"] + np.float32(0.5)}


def half_a_pixel_down(inputs: Tensors) -> Tensors:
    return {"boxes": inputs["boxes"] + np.array([0, 0.5, 0, 0.5], np.float32)}


def corner_and_size(inputs: Tensors) -> Tensors:
    boxes = inputs["boxes"]
    return {"boxes": np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)}


def swapped_axes(inputs: Tensors) -> Tensors:
    return {"boxes": np.ascontiguousarray(inputs["boxes"][:, [1, 0, 3, 2]])}


def normalised(inputs: Tensors) -> Tensors:
    return {"boxes": inputs["boxes"] / np.float32(SIZE)}


def clipped_boxes(inputs: Tensors) -> Tensors:
    return {"boxes": np.clip(inputs["boxes"], 0, SIZE - 1)}


def rounded_boxes(inputs: Tensors) -> Tensors:
    return {"boxes": np.round(inputs["boxes"])}


def first_tile_only(inputs: Tensors) -> Tensors:
    return {"tile_index": np.zeros_like(inputs["tile_index"])}


def next_tile(inputs: Tensors) -> Tensors:
    return {"tile_index": (inputs["tile_index"] + 1) % len(inputs["embeddings"])}


def transposed_embeddings(inputs: Tensors) -> Tensors:
    return {"embeddings": np.ascontiguousarray(inputs["embeddings"].transpose(0, 1, 3, 2))}


WRONG_INPUTS = [
    half_a_pixel,
    half_a_pixel_down,
    corner_and_size,
    swapped_axes,
    normalised,
    clipped_boxes,
    rounded_boxes,
    first_tile_only,
    next_tile,
    transposed_embeddings,
]


@pytest.mark.parametrize("change", WRONG_INPUTS)
def test_a_decoder_that_reads_wrongly_is_found(session, truth, change):
    assert "logits_max_over_std" in failures(with_inputs(session, "decoder", change), truth)


def shifted_logits(outputs: Tensors) -> Tensors:
    logits = outputs["logits"]
    return {"logits": np.roll(logits, 1, axis=2)}


def shifted_by_half_a_pixel(outputs: Tensors) -> Tensors:
    """An eighth of a cell: what is left when a resampling aligns corners and not edges."""
    logits = outputs["logits"]
    return {"logits": (0.875 * logits + 0.125 * np.roll(logits, 1, axis=1)).astype(np.float32)}


def transposed_logits(outputs: Tensors) -> Tensors:
    return {"logits": np.ascontiguousarray(outputs["logits"].transpose(0, 2, 1))}


def raised_threshold(outputs: Tensors) -> Tensors:
    logits = outputs["logits"]
    return {"logits": logits + np.float32(0.01 * logits.std()) if logits.size else logits}


def probabilities(outputs: Tensors) -> Tensors:
    return {"logits": 1 / (1 + np.exp(-outputs["logits"]))}


def turned_round(outputs: Tensors) -> Tensors:
    return {"logits": -outputs["logits"]}


def mixed_up_boxes(outputs: Tensors) -> Tensors:
    return {"logits": np.ascontiguousarray(outputs["logits"][::-1]), "iou": outputs["iou"][::-1].copy()}


@pytest.mark.parametrize(
    "change",
    [
        shifted_logits,
        shifted_by_half_a_pixel,
        transposed_logits,
        raised_threshold,
        probabilities,
        turned_round,
        mixed_up_boxes,
    ],
)
def test_a_decoder_that_writes_wrongly_is_found(session, truth, change):
    found = failures(with_outputs(session, "decoder", change), truth)
    assert {"logits_max_over_std", "logits_rms_over_std"} <= found


def test_a_predicted_iou_that_is_off_is_found(session, truth):
    wrong = with_outputs(session, "decoder", lambda outputs: {"iou": outputs["iou"] + np.float32(1e-3)})
    assert failures(wrong, truth) == {"predicted_iou_max_difference"}


def small_regions(session: Session) -> Session:
    manifest = session.manifest
    decoding = dataclasses.replace(manifest.decoding, region_sizes=(3, 8), margin_fraction=0.0, margin_px=0.0)
    return dataclasses.replace(session, manifest=dataclasses.replace(manifest, decoding=decoding))


def test_a_region_at_the_wrong_place_is_found(session, truth):
    session = small_regions(session)
    assert failures(session, truth) == set()

    def move_claim(step: int) -> Callable[[Tensors], Tensors]:
        def move(outputs: Tensors) -> Tensors:
            limit = SIZE // 4 - outputs["logits"].shape[1]
            return {"origin": np.clip(outputs["origin"] + step, 0, limit)}

        return move

    for step in (1, 4, -4):
        found = failures(with_outputs(session, "decoder", move_claim(step)), truth)
        assert {"origins_differing", "logits_max_over_std"} <= found


def test_a_region_that_is_not_filled_is_found(session, truth):
    def crop(outputs: Tensors) -> Tensors:
        logits = outputs["logits"].copy()
        logits[:, :, -1] = logits.min(initial=0)
        return {"logits": logits}

    assert "logits_max_over_std" in failures(with_outputs(small_regions(session), "decoder", crop), truth)


def test_a_region_that_is_too_small_is_found(session, truth):
    def smaller(inputs: Tensors) -> Tensors:
        return {"region": np.maximum(inputs["region"] - 1, 1)}

    assert "wrong_shapes" in failures(with_inputs(session, "decoder", smaller), truth)


def disc_logits(radius_cells: float, x: int = 16) -> np.ndarray:
    rows, columns = np.mgrid[0:32, 0:32]
    return (radius_cells - np.hypot(rows - 16, columns - x)).astype(np.float32)


def test_a_region_that_cuts_objects_is_found(session, truth):
    """The masks of random weights are shapeless, so a clean one is put in place of both sides."""
    disc = disc_logits(11.0)
    count = len(truth.inputs.boxes)
    boxes = np.tile(np.array([18, 18, 110, 110], np.float32), (count, 1))
    truth = dataclasses.replace(
        truth,
        inputs=dataclasses.replace(truth.inputs, boxes=boxes),
        sam=dataclasses.replace(truth.sam, logits=np.repeat(disc[None], count, axis=0)),
        detected=None,
    )

    def draw(inputs: Tensors, run: Callable) -> Tensors:
        outputs = run(inputs)
        side = outputs["logits"].shape[1]
        cut = [disc[y : y + side, x : x + side] for y, x in outputs["origin"].tolist()]
        return {**outputs, "logits": np.array(cut, np.float32).reshape(outputs["logits"].shape)}

    drawn = sabotaged(session, "decoder", draw)
    wide = {row.metric: row for row in judged(drawn, truth).rows}["cut_by_region"]
    assert (wide.value, wide.passed) == (0, True)
    tight = dataclasses.replace(
        drawn.manifest, decoding=dataclasses.replace(drawn.manifest.decoding, region_sizes=(4,))
    )
    assert "cut_by_region" in failures(dataclasses.replace(drawn, manifest=tight), truth)


def test_padding_before_normalisation_is_found(session, truth):
    """Zeros that go through the normalisation are not zeros: only the padded tile can tell."""
    wrong = with_inputs(session, "encoder", lambda inputs: {"sizes": np.full_like(inputs["sizes"], SIZE)})
    found = failures(wrong, truth)
    assert "padded_tile_relative_max" in found
    assert "embedding_relative_max" not in found


def test_sizes_of_the_wrong_order_are_found(session, truth):
    wrong = with_inputs(session, "encoder", lambda inputs: {"sizes": np.ascontiguousarray(inputs["sizes"][:, ::-1])})
    assert "padded_tile_relative_max" in failures(wrong, truth)


def test_tiles_of_a_batch_mixed_up_are_found(session, truth):
    """The pipeline encodes one tile after the other on a processor, but several at once on a GPU."""
    wrong = with_outputs(
        session, "encoder", lambda outputs: {"embeddings": np.ascontiguousarray(outputs["embeddings"][::-1])}
    )
    report = judged(wrong, truth)
    found = {row.metric for row in report.failures}
    assert "embedding_relative_max:batch=2" in found
    assert not any(metric.endswith("batch=1") for metric in found)
    wrong = with_outputs(
        session, "detector", lambda outputs: {name: np.ascontiguousarray(a[::-1]) for name, a in outputs.items()}
    )
    assert "box_iou_min" in failures(wrong, truth)


def test_sizes_of_the_first_tile_for_all_are_found(session, truth):
    wrong = with_inputs(
        session, "encoder", lambda inputs: {"sizes": np.repeat(inputs["sizes"][:1], len(inputs["sizes"]), axis=0)}
    )
    assert "padded_tile_relative_max" in failures(wrong, truth)


@pytest.mark.parametrize(
    ("role", "output"),
    [
        ("encoder", "embeddings"),
        ("decoder", "logits"),
        ("decoder", "iou"),
        ("detector", "boxes"),
        ("detector", "scores"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_single_nan_is_found(session, truth, role, output, value):
    def spoil(outputs: Tensors) -> Tensors:
        array = outputs[output].copy()
        if array.size:
            array.flat[-1] = value
        return {output: array}

    metric = "boxes_invalid" if role == "detector" else "not_finite"
    assert metric in failures(with_outputs(session, role, spoil), truth)


def test_a_graph_of_another_shape_is_found(session, truth):
    wrong = with_outputs(session, "encoder", lambda outputs: {"embeddings": outputs["embeddings"][..., ::2, ::2]})
    assert "wrong_shapes" in failures(wrong, truth)


def test_a_graph_that_refuses_no_boxes_is_found(session, truth):
    def refuse(inputs: Tensors, run: Callable) -> Tensors:
        if not len(inputs["boxes"]):
            raise InvalidArgumentError("no boxes, no masks")
        return run(inputs)

    assert failures(sabotaged(session, "decoder", refuse), truth) == {"calls_refused"}


def test_a_hole_deep_in_a_mask_is_found(session, truth):
    """The masks of random weights are shapeless, so clean ones are put in place of both sides."""
    disc = disc_logits(9.0)
    clean = np.repeat(disc[None], len(truth.inputs.boxes), axis=0)
    truth = dataclasses.replace(truth, sam=dataclasses.replace(truth.sam, logits=clean), detected=None)

    def drawn(mask: np.ndarray) -> Session:
        return with_outputs(
            session, "decoder", lambda outputs: {"logits": np.repeat(mask[None], len(outputs["iou"]), axis=0)}
        )

    assert failures(drawn(disc), truth) == set()
    pierced = disc.copy()
    pierced[15:18, 15:18] = -9
    assert {"flipped_deep_px", "mask_iou_mean", "mask_iou_min"} <= failures(drawn(pierced), truth)
    values = {row.metric: row.value for row in judged(drawn(disc - np.float32(0.2)), truth).rows if row.level == 4}
    assert values["flipped_px:distance<=1"] > 0
    assert values["flipped_deep_px"] == 0


def test_pixels_on_the_threshold_are_nobodys_fault(session, truth):
    """Rounding flips them; in a small mask a single one would break the limit of the IoU."""
    steep = np.full((32, 32), -9, np.float32)
    steep[8:12, 8:12] = 9
    steep[20:22, 20:22] = 1e-6
    masks = np.repeat(steep[None], len(truth.inputs.boxes), axis=0)
    truth = dataclasses.replace(truth, sam=dataclasses.replace(truth.sam, logits=masks), detected=None)
    wrong = with_outputs(
        session, "decoder", lambda outputs: {"logits": masks[: len(outputs["iou"])] - np.float32(2e-6)}
    )
    assert not {metric for metric in failures(wrong, truth) if metric.startswith("mask")}


@pytest.mark.parametrize(("role", "output"), [("encoder", "embeddings"), ("decoder", "iou"), ("detector", "scores")])
def test_half_precision_at_the_door_is_found(session, truth, role, output):
    wrong = with_outputs(session, role, lambda outputs: {output: outputs[output].astype(np.float16)})
    assert "calls_refused" in failures(wrong, truth)


def test_boxes_beyond_the_first_group_are_looked_at(session, whole_truth):
    def forget_the_rest(outputs: Tensors) -> Tensors:
        logits = outputs["logits"].copy()
        logits[16:] = logits[:1]
        return {"logits": logits}

    wrong = with_outputs(session, "decoder", forget_the_rest)
    found = {row.metric for row in judged(wrong, whole_truth, (1, 3, 17, 64)).failures}
    assert {"logits_max_over_std:boxes=17", "logits_max_over_std:boxes=64"} <= found
    assert "logits_max_over_std:boxes=3" not in found


def test_outputs_that_the_next_call_overwrites_unannounced_are_found(session, whole_truth):
    """An engine that says that its outputs are the caller's: what was read of the first boxes is then lost."""
    rooms: dict[tuple[int, ...], np.ndarray] = {}

    def reuse(outputs: Tensors) -> Tensors:
        room = rooms.setdefault(outputs["logits"].shape, outputs["logits"].copy())
        room[...] = outputs["logits"]
        return {"logits": room}

    assert "mask_iou_mean" in failures(with_outputs(session, "decoder", reuse), whole_truth)
