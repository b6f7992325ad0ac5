"""The reference runners against the public interfaces of segment-anything and ultralytics themselves."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from segment_anything import SamPredictor  # noqa: E402 - after the check for torch
from ultralytics.utils import nms, ops  # noqa: E402

from dendsam_deploy.bundle.bundle import Bundle  # noqa: E402
from dendsam_deploy.errors import CheckpointError  # noqa: E402
from dendsam_deploy.models.detector import load_detector  # noqa: E402
from dendsam_deploy.models.reference import OriginalDetector  # noqa: E402
from dendsam_deploy.models.sam import build_sam  # noqa: E402
from dendsam_deploy.runtimes.torch_reference import (  # noqa: E402
    decoder_runner,
    detector_runner,
    encoder_runner,
    sam_runners,
)

SIZE = 128


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(4)
    return build_sam("tiny", SIZE)


def wavy_image(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return (127 + 120 * np.sin(rows / 5) * np.cos(columns / 9)).astype(np.uint8)


@pytest.mark.parametrize("shape_hw", [(SIZE, SIZE), (SIZE, 77), (40, SIZE)])
def test_the_encoder_is_that_of_a_predictor(sam, shape_hw):
    image = wavy_image(*shape_hw)
    predictor = SamPredictor(sam)
    predictor.set_image(np.repeat(image[..., None], 3, axis=2))
    tile = np.full((1, SIZE, SIZE), 200, np.uint8)  # what lies beyond the size must not matter
    tile[0, : shape_hw[0], : shape_hw[1]] = image
    embeddings = encoder_runner(sam).run({"tiles": tile, "sizes": np.array([shape_hw])})["embeddings"]
    np.testing.assert_array_equal(embeddings, predictor.features.numpy())


def test_the_decoder_is_that_of_a_predictor(sam):
    boxes = np.array([[10, 12, 60, 50], [0, 0, 128, 128], [100.5, 3, 127, 9]], np.float32)
    expected, embeddings = [], []
    for shift in range(2):
        predictor = SamPredictor(sam)
        predictor.set_image(np.repeat(np.roll(wavy_image(SIZE, SIZE), 11 * shift, 0)[..., None], 3, axis=2))
        _, iou, logits = predictor.predict_torch(None, None, torch.from_numpy(boxes), multimask_output=False)
        expected.append((logits[:, 0].numpy(), iou[:, 0].numpy()))
        embeddings.append(predictor.features.numpy())
    tile_index = np.array([1, 0, 1])
    inputs = {
        "embeddings": np.concatenate(embeddings),
        "boxes": boxes,
        "tile_index": tile_index,
        "region": np.array([SIZE // 16]),
    }
    whole = decoder_runner(sam).run(inputs)
    for row, tile in enumerate(tile_index):
        np.testing.assert_allclose(whole["logits"][row], expected[tile][0][row], atol=1e-6)
        np.testing.assert_allclose(whole["iou"][row], expected[tile][1][row], atol=1e-6)
    np.testing.assert_array_equal(whole["origin"], np.zeros((3, 2)))

    part = decoder_runner(sam).run({**inputs, "region": np.array([2])})
    for row, (y, x) in enumerate(part["origin"]):
        np.testing.assert_array_equal(part["logits"][row], whole["logits"][row, y : y + 8, x : x + 8])
    # The first box is centred at (31, 35) px, which is 1.94, 2.19 cells: a region of 2 cells begins at cell (1, 1).
    np.testing.assert_array_equal(part["origin"], [[4, 4], [12, 12], [0, 24]])


def test_no_boxes_are_no_masks(sam):
    outputs = decoder_runner(sam).run(
        {
            "embeddings": np.zeros((1, 256, 8, 8), np.float32),
            "boxes": np.zeros((0, 4), np.float32),
            "tile_index": np.zeros(0, np.int64),
            "region": np.array([4]),
        }
    )
    assert {name: array.shape for name, array in outputs.items()} == {
        "logits": (0, 16, 16),
        "origin": (0, 2),
        "iou": (0,),
    }


@pytest.mark.parametrize("architecture", ["yolov8n", "yolo26n"])
def test_the_detector_is_that_of_ultralytics(architecture):
    detector = load_detector(Path(f"{architecture}.yaml"), seed=1)
    tiles = torch.from_numpy(np.stack([wavy_image(SIZE, SIZE), wavy_image(SIZE, SIZE).T.copy()]))
    boxes, scores = OriginalDetector(detector.network, SIZE)(tiles)
    assert boxes.shape[:2] == scores.shape

    image = tiles[:, None].expand(-1, 3, -1, -1).float() / 255
    head = detector.network.model[-1]
    before, head.end2end = head.end2end, False
    with torch.no_grad():
        raw = detector.network(image)[0]
    head.end2end = before
    kept = nms.non_max_suppression(raw, conf_thres=float(scores.median()), iou_thres=1.0, agnostic=True)
    for tile in range(2):
        found = ops.clip_boxes(kept[tile][:, :4].clone(), (SIZE, SIZE))
        every = torch.cat([boxes[tile], scores[tile][:, None]], dim=1)
        wanted = torch.cat([found, kept[tile][:, 4:5]], dim=1)
        assert len(wanted)
        assert torch.cdist(wanted.double(), every.double()).amin(dim=1).max() < 1e-4


def test_the_detector_sees_tiles_at_its_own_size():
    detector = load_detector(Path("yolo11n.yaml"), seed=1)
    tile = torch.from_numpy(wavy_image(SIZE, SIZE))[None]
    own, _ = OriginalDetector(detector.network, SIZE)(tile)
    larger, _ = OriginalDetector(detector.network, 2 * SIZE)(tile)
    assert larger.shape[1] == 4 * own.shape[1]
    assert larger.min() >= 0
    assert larger.max() <= SIZE


def test_only_the_checkpoint_of_the_bundle_is_accepted(exported, tmp_path: Path):
    manifest = Bundle.open(exported.bundle).manifest
    encoder, decoder = sam_runners(exported.sam, manifest)
    assert (encoder.engine, encoder.device, decoder.spec.role) == ("torch", "cpu", "decoder")
    assert detector_runner(exported.detector, manifest).spec.role == "detector"
    torch.save(build_sam("tiny", SIZE).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: has the SHA-256 .* exported from sam\.pt"):
        sam_runners(tmp_path / "other.pt", manifest)
