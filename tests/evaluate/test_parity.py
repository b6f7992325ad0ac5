"""`verify` passes what is right and fails what is wrong: one sabotage for every mistake that exporters make."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from dendsam_deploy.bundle.bundle import Bundle, digest_file
from dendsam_deploy.bundle.reference import load_reference, save_reference
from dendsam_deploy.errors import BundleError, CheckpointError, InvalidArgumentError
from dendsam_deploy.evaluate.limits import METRICS
from dendsam_deploy.evaluate.parity import Truth, VerifyOptions, compare_session, verify_bundle
from dendsam_deploy.runtimes.runner import CallableRunner
from dendsam_deploy.runtimes.session import Session, SessionOptions, open_session

torch = pytest.importorskip("torch")
from dendsam_deploy.models.weights import load_sam  # noqa: E402 - after the check for torch

Tensors = dict[str, np.ndarray]
SIZE = 128
ON_ONE_THREAD = SessionOptions("onnxruntime", "cpu", threads=1)


@pytest.fixture
def bundle(exported, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(exported.bundle, tmp_path / "toy"))


@pytest.fixture(scope="module")
def truth(exported) -> Truth:
    path = Bundle.open(exported.bundle).extra_path("reference.npz")
    assert path is not None
    stored = load_reference(path, SIZE)
    few = slice(0, 12)
    inputs = dataclasses.replace(
        stored.inputs, boxes=stored.inputs.boxes[few], tile_index=stored.inputs.tile_index[few]
    )
    sam = dataclasses.replace(stored.sam, logits=stored.sam.logits[few], iou=stored.sam.iou[few])
    return Truth(inputs, sam, stored.detector)


@pytest.fixture(scope="module")
def session(exported):
    with open_session(Bundle.open(exported.bundle), ON_ONE_THREAD) as session:
        yield session


def failures(session: Session, truth: Truth) -> set[str]:
    """Return the metrics that fail, without their details."""
    report = compare_session(session, truth, box_counts=(3,))
    return {row.metric.partition(":")[0] for row in report.failures}


def sabotaged(session: Session, role: str, change: Callable[[Tensors, Callable], Tensors]) -> Session:
    """Replace one graph by a function of its inputs and of the graph itself."""
    runner = getattr(session, role)
    double = CallableRunner(runner.spec, lambda inputs: change(dict(inputs), runner.run))
    return dataclasses.replace(session, **{role: double})


def test_a_faithful_bundle_is_proven(bundle: Path):
    assert Bundle.open(bundle).parity is None
    report = verify_bundle(bundle, VerifyOptions(session=ON_ONE_THREAD))
    assert report.passed, report.failures
    assert {row.level for row in report.rows} == {1, 2, 3, 4}
    assert {row.reference for row in report.rows} == {"stored"}
    assert {(row.engine, row.device, row.precision) for row in report.rows} == {("onnxruntime", "cpu", "fp32")}
    metrics = {row.metric for row in report.rows}
    assert {f"logits_max_over_std:boxes={count}" for count in (1, 3, 17, 64)} <= metrics
    reopened = Bundle.open(bundle)
    assert reopened.parity is not None
    assert reopened.parity.proves("onnxruntime", "cpu", "fp32")
    with open_session(reopened, ON_ONE_THREAD) as session:
        assert session.is_proven
    document = json.loads((bundle / "parity.json").read_text())
    assert document["passed"] is True
    assert {"level", "graph", "engine", "device", "precision", "metric", "value", "limit", "passed"} <= set(
        document["rows"][0]
    )


def test_the_original_modules_are_run_where_checkpoints_are_given(exported, bundle: Path):
    options = VerifyOptions(exported.sam, exported.detector, session=ON_ONE_THREAD, box_counts=(3,))
    report = verify_bundle(bundle, options)
    assert report.passed, report.failures
    assert {row.reference for row in report.rows} == {"torch"}


WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "onnx", "onnxscript", "segment_anything", "ultralytics"):
    sys.modules[name] = None  # importing it now raises ImportError
from pathlib import Path
from dendsam_deploy.errors import MissingCapabilityError
from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
bundle, sam = map(Path, sys.argv[1:])
assert verify_bundle(bundle, VerifyOptions(box_counts=(3,))).passed
try:
    verify_bundle(bundle, VerifyOptions(sam))
except MissingCapabilityError as error:
    print(error)
"""


def test_stored_outputs_are_enough_where_torch_is_not_installed(exported, bundle: Path):
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(bundle), str(exported.sam)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "install dendsam-deploy[train]" in result.stdout


def test_another_checkpoint_is_refused(exported, bundle: Path, tmp_path: Path):
    content = torch.load(exported.sam, weights_only=True)
    torch.save(content["model_state"], tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt"):
        verify_bundle(bundle, VerifyOptions(sam=tmp_path / "other.pt", session=ON_ONE_THREAD))
    with pytest.raises(InvalidArgumentError, match="no original to compare with"):
        verify_bundle(bundle, VerifyOptions(detector=tmp_path / "model.onnx", session=ON_ONE_THREAD))
    assert not (bundle / "parity.json").exists()


def test_a_bundle_without_a_reference_cannot_be_judged(bundle: Path):
    document = json.loads((bundle / "manifest.json").read_text())
    document["extra_files"] = []
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"no reference\.npz"):
        verify_bundle(bundle)


def test_more_boxes_than_stored_cannot_be_judged(session, truth):
    with pytest.raises(InvalidArgumentError, match="12 boxes"):
        compare_session(session, truth, box_counts=(13,))


@pytest.mark.parametrize(
    ("place", "metric"),
    [
        ("encoder:mean", "padded_tile_relative_max"),
        ("encoder:std", "embedding_relative_max"),
        ("encoder:patch_embed.proj.weight", "embedding_relative_max"),
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


def test_a_bundle_that_differs_is_not_proven(bundle: Path):
    path = bundle / "reference.npz"
    stored = load_reference(path, SIZE)
    save_reference(path, dataclasses.replace(stored, sam=dataclasses.replace(stored.sam, logits=stored.sam.logits * 2)))
    document = json.loads((bundle / "manifest.json").read_text())
    document["extra_files"] = [dataclasses.asdict(digest_file(bundle, "reference.npz"))]
    (bundle / "manifest.json").write_text(json.dumps(document))
    report = verify_bundle(bundle, VerifyOptions(session=ON_ONE_THREAD, box_counts=(3,)))
    assert not report.passed
    parity = Bundle.open(bundle).parity
    assert parity == report
    assert not parity.proves("onnxruntime", "cpu", "fp32")


def test_an_edited_file_is_refused_before_it_is_loaded(bundle: Path):
    path = bundle / "decoder.onnx"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.onnx: altered"):
        verify_bundle(bundle)


def decoder_with(exported, points: Callable[[Tensors], tuple | None], pick: int) -> Callable:
    """Segment-anything's decoder used wrongly: other prompts, or another of the four masks."""
    sam = load_sam(exported.sam).sam

    @torch.no_grad()
    def decode(inputs: Tensors, run: Callable) -> Tensors:
        outputs = run(inputs)
        for row, tile in enumerate(inputs["tile_index"]):
            box = torch.tensor(inputs["boxes"][row : row + 1])
            sparse, dense = sam.prompt_encoder(points=points({"boxes": box}), boxes=box, masks=None)
            if points({"boxes": box}) is not None:  # points precede boxes: keep the two corners and what follows
                sparse = torch.cat([sparse[:, 1:], sparse[:, :1]], dim=1)
            masks, iou = sam.mask_decoder.predict_masks(
                image_embeddings=torch.tensor(inputs["embeddings"][tile : tile + 1]),
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
            )
            y, x = outputs["origin"][row]
            side = outputs["logits"].shape[1]
            outputs["logits"][row] = masks[0, pick, y : y + side, x : x + side].numpy()
            outputs["iou"][row] = iou[0, pick].item()
        return outputs

    return decode


def test_the_wrong_mask_token_is_found(exported, session, truth):
    """The official ONNX export returns one of the multimask tokens for a box."""
    wrong = sabotaged(session, "decoder", decoder_with(exported, lambda _: None, pick=2))
    assert {"logits_max_over_std", "predicted_iou_max_difference", "mask_iou_mean"} <= failures(wrong, truth)
    right = sabotaged(session, "decoder", decoder_with(exported, lambda _: None, pick=0))
    assert failures(right, truth) == set()


def test_a_padding_point_is_found(exported, session, truth):
    """The usual mend of that export, which adds an embedding that the Python path does not use for boxes."""

    def padding(inputs: Tensors) -> tuple:
        return torch.zeros(len(inputs["boxes"]), 1, 2), -torch.ones(len(inputs["boxes"]), 1)

    assert "logits_max_over_std" in failures(
        sabotaged(session, "decoder", decoder_with(exported, padding, pick=0)), truth
    )


def test_half_a_pixel_is_found(session, truth):
    def shift(inputs: Tensors, run: Callable) -> Tensors:
        return run({**inputs, "boxes": inputs["boxes"] + np.float32(0.5)})

    assert "logits_max_over_std" in failures(sabotaged(session, "decoder", shift), truth)


def test_tiles_mixed_up_are_found(session, truth):
    def swap(inputs: Tensors, run: Callable) -> Tensors:
        return run({**inputs, "tile_index": np.zeros_like(inputs["tile_index"])})

    assert "logits_max_over_std" in failures(sabotaged(session, "decoder", swap), truth)


def test_a_region_at_the_wrong_place_is_found(session, truth):
    manifest = session.manifest
    decoding = dataclasses.replace(manifest.decoding, region_sizes=(3, 8), margin_fraction=0.0, margin_px=0.0)
    session = dataclasses.replace(session, manifest=dataclasses.replace(manifest, decoding=decoding))
    assert failures(session, truth) == set()

    def move_claim(inputs: Tensors, run: Callable) -> Tensors:
        outputs = run(inputs)
        limit = SIZE // 4 - outputs["logits"].shape[1]
        return {**outputs, "origin": np.clip(outputs["origin"] + 4, 0, limit)}

    assert {"origins_differing", "logits_max_over_std"} <= failures(sabotaged(session, "decoder", move_claim), truth)


def test_padding_before_normalisation_is_found(session, truth):
    """Zeros that go through the normalisation are not zeros: only the padded tile can tell."""

    def whole(inputs: Tensors, run: Callable) -> Tensors:
        return run({**inputs, "sizes": np.full_like(inputs["sizes"], SIZE)})

    found = failures(sabotaged(session, "encoder", whole), truth)
    assert "padded_tile_relative_max" in found
    assert "embedding_relative_max" not in found


@pytest.mark.parametrize(("role", "output"), [("encoder", "embeddings"), ("decoder", "logits"), ("decoder", "iou")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_single_nan_is_found(session, truth, role, output, value):
    def spoil(inputs: Tensors, run: Callable) -> Tensors:
        outputs = run(inputs)
        if outputs[output].size:
            outputs[output].flat[-1] = value
        return outputs

    assert "not_finite" in failures(sabotaged(session, role, spoil), truth)


def test_scaled_scores_are_found(session, truth):
    def scale(inputs: Tensors, run: Callable) -> Tensors:
        outputs = run(inputs)
        return {**outputs, "scores": outputs["scores"] * np.float32(0.9)}

    assert failures(sabotaged(session, "detector", scale), truth) == {"box_score_max_difference"}


def test_boxes_elsewhere_are_found(session, truth):
    def shift(inputs: Tensors, run: Callable) -> Tensors:
        outputs = run(inputs)
        return {**outputs, "boxes": np.clip(outputs["boxes"] + np.float32(0.5), 0, SIZE)}

    assert failures(sabotaged(session, "detector", shift), truth) == {"box_iou_min"}


def test_missing_boxes_are_found(session, truth):
    def lose(inputs: Tensors, run: Callable) -> Tensors:
        outputs = run(inputs)
        return {name: array[:, 5:] for name, array in outputs.items()}

    assert "box_iou_min" in failures(sabotaged(session, "detector", lose), truth)

    def lose_all_but_one(inputs: Tensors, run: Callable) -> Tensors:
        outputs = run(inputs)
        return {name: np.repeat(array[:, -1:], array.shape[1], axis=1) for name, array in outputs.items()}

    assert "boxes_unmatched" in failures(sabotaged(session, "detector", lose_all_but_one), truth)


def test_impossible_boxes_are_found_even_without_a_reference(session, truth):
    def invert(inputs: Tensors, run: Callable) -> Tensors:
        outputs = run(inputs)
        return {**outputs, "boxes": outputs["boxes"][..., [2, 3, 0, 1]]}

    without = dataclasses.replace(truth, detector=None)
    assert failures(session, without) == set()
    assert failures(sabotaged(session, "detector", invert), without) == {"boxes_invalid"}
    assert {"boxes_invalid", "boxes_unmatched"} <= failures(sabotaged(session, "detector", invert), truth)


def test_a_hole_deep_in_a_mask_is_found(session, truth):
    """The masks of random weights are shapeless, so clean ones are put in place of both sides."""
    rows, columns = np.mgrid[0:32, 0:32]
    disc = (9 - np.hypot(rows - 16, columns - 16)).astype(np.float32)
    clean = np.repeat(disc[None], len(truth.inputs.boxes), axis=0)
    truth = dataclasses.replace(truth, sam=dataclasses.replace(truth.sam, logits=clean))

    def drawn(mask: np.ndarray) -> Session:
        def draw(inputs: Tensors, run: Callable) -> Tensors:
            outputs = run(inputs)
            return {**outputs, "logits": np.repeat(mask[None], len(inputs["boxes"]), axis=0), "iou": outputs["iou"]}

        return sabotaged(session, "decoder", draw)

    assert failures(drawn(disc), truth) == set()
    pierced = disc.copy()
    pierced[15:18, 15:18] = -9
    assert {"flipped_deep_px", "mask_iou_mean", "mask_iou_min"} <= failures(drawn(pierced), truth)
    report = compare_session(drawn(disc - np.float32(0.2)), truth, box_counts=(3,))
    values = {row.metric: row.value for row in report.rows if row.level == 4}
    assert values["flipped_px:distance<=1"] > 0
    assert values["flipped_deep_px"] == 0


def test_every_metric_is_in_the_table_and_explained():
    for name, metric in METRICS.items():
        assert metric.meaning, name
        assert (metric.sense == "at least") == any(word in name for word in ("iou_mean", "_p1", "iou_min", "cosine"))


def test_limits_are_kept_or_broken():
    at_most, at_least = METRICS["embedding_relative_max"], METRICS["mask_iou_mean"]
    assert at_most.judge(1e-4, "fp32") == (1e-4, True)
    assert at_most.judge(1.1e-4, "fp32") == (1e-4, False)
    assert at_least.judge(0.9999, "fp32") == (0.9999, True)
    assert at_least.judge(0.9998, "fp32") == (0.9999, False)
    assert at_least.judge(0.996, "bf16") == at_least.judge(0.996, "fp16") == (0.995, True)
    assert at_least.judge(0.97, "int8") == (0.98, False)
    # What is not judged passes, unless it is no number at all.
    assert at_most.judge(7.0, "fp16") == (None, True)
    assert at_most.judge(math.nan, "fp16") == (None, False)
    assert at_least.judge(math.inf, "fp32") == (0.9999, False)


def test_pixels_on_the_threshold_are_nobodys_fault(session, truth):
    """Rounding flips them; in a small mask a single one would break the limit of the IoU."""
    steep = np.full((32, 32), -9, np.float32)
    steep[8:12, 8:12] = 9
    steep[20:22, 20:22] = 1e-6
    masks = np.repeat(steep[None], len(truth.inputs.boxes), axis=0)
    truth = dataclasses.replace(truth, sam=dataclasses.replace(truth.sam, logits=masks))

    def draw(inputs: Tensors, run: Callable) -> Tensors:
        return {**run(inputs), "logits": masks[: len(inputs["boxes"])] - np.float32(2e-6)}

    assert failures(sabotaged(session, "decoder", draw), truth) == set()
