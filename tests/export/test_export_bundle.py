"""What an exported bundle holds, and what stops an export."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dendsam_deploy.bundle.bundle import Bundle  # noqa: E402 - after the check for torch
from dendsam_deploy.bundle.parity import ParityReport, ParityRow  # noqa: E402
from dendsam_deploy.bundle.reference import load_reference  # noqa: E402
from dendsam_deploy.errors import CheckpointError, InvalidArgumentError, ParityError, VolumeError  # noqa: E402
from dendsam_deploy.export.bundle import Judges, export_bundle  # noqa: E402
from dendsam_deploy.export.detector import export_detector  # noqa: E402
from dendsam_deploy.export.model_card import TrainingFacts, model_card  # noqa: E402
from dendsam_deploy.export.options import ExportOptions  # noqa: E402
from dendsam_deploy.export.reference import ReferenceOptions, reference_inputs  # noqa: E402
from dendsam_deploy.models.detector import DetectorRecord, load_detector  # noqa: E402
from dendsam_deploy.models.detector_scale import detector_input_size  # noqa: E402
from dendsam_deploy.models.reference import decode_boxes, encode_tiles  # noqa: E402
from dendsam_deploy.models.weights import load_sam  # noqa: E402

SIZE = 128


def test_the_manifest_tells_what_the_checkpoint_knows(exported):
    manifest = Bundle.open(exported.bundle).manifest
    assert (manifest.name, manifest.model_type, manifest.licence) == ("toy", "tiny", "CC0-1.0")
    assert manifest.preprocessing.tile_size_px == SIZE
    assert (manifest.preprocessing.model_pixel_size_nm, manifest.preprocessing.zoom) == (15.0, 0.5)
    assert manifest.decoding.region_sizes == (8,)
    sam, detector = manifest.sources
    assert (sam.role, sam.kind, sam.checkpoint.file) == ("sam", "tiny", "sam.pt")
    assert sam.checkpoint.sha256 == hashlib.sha256(exported.sam.read_bytes()).hexdigest()
    assert (detector.role, detector.kind, detector.checkpoint.file) == ("detector", "small", "detector.pt")
    assert detector.checkpoint.sha256 == hashlib.sha256(exported.detector.read_bytes()).hexdigest()
    assert {"torch", "onnx", "segment-anything", "ultralytics", "dendsam-deploy"} <= manifest.producers.keys()


def test_the_stored_reference_is_what_segment_anything_returns(exported):
    bundle = Bundle.open(exported.bundle)
    stored = load_reference(bundle.extra_path("reference.npz"), SIZE)
    sam = load_sam(exported.sam).sam
    inputs = {
        field.name: torch.tensor(getattr(stored.inputs, field.name)) for field in dataclasses.fields(stored.inputs)
    }
    embeddings = encode_tiles(sam, inputs["tiles"], inputs["sizes"])
    np.testing.assert_allclose(stored.sam.embeddings, embeddings.numpy(), atol=1e-5)
    logits, iou = decode_boxes(sam, embeddings, inputs["boxes"], inputs["tile_index"])
    np.testing.assert_allclose(stored.sam.logits, logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(stored.sam.iou, iou.numpy(), atol=1e-5)
    assert stored.detector is not None
    assert (np.diff(stored.detector.scores, axis=1) <= 0).all()


def test_the_model_card_names_sources_training_limits_and_licences(exported):
    bundle = Bundle.open(exported.bundle)
    card = (exported.bundle / "MODEL_CARD.md").read_text()
    for source in bundle.manifest.sources:
        assert f"| {source.role} | {source.kind} | {source.checkpoint.file} |" in card
    for words in (bundle.manifest.sources[0].checkpoint.sha256, "volume: phantom 3", "15 nm", "CC0-1.0", "AGPL-3.0"):
        assert words in card
    assert "Detector: the checkpoint records nothing about its training." in card


def test_the_model_card_says_what_is_unknown(exported):
    manifest = Bundle.open(exported.bundle).manifest
    preprocessing = dataclasses.replace(manifest.preprocessing, model_pixel_size_nm=None)
    manifest = dataclasses.replace(
        manifest, sources=manifest.sources[:1], graphs=manifest.graphs[:2], preprocessing=preprocessing
    )
    card = model_card(manifest, TrainingFacts({}, {}))
    assert "It has no detector" in card
    assert "AGPL" not in card
    assert "pixel size is not recorded" in card
    preprocessing = dataclasses.replace(preprocessing, zoom=None)
    card = model_card(dataclasses.replace(manifest, preprocessing=preprocessing), TrainingFacts({}, {}))
    assert "scale that it was trained at is not recorded" in card


def row(*, passed: bool) -> ParityRow:
    value = 1e-6 if passed else 0.5
    return ParityRow(
        2, "encoder", "onnxruntime", "cpu", "fp32", "embedding_relative_max", value, 1e-4, passed, "stored"
    )


@pytest.mark.slow
def test_a_bundle_that_fails_its_gate_is_not_published(exported, tmp_path: Path):
    seen: list[Path] = []
    steps = []

    def gate(folder: Path, precision: str) -> ParityReport:
        assert precision == "fp32"
        seen.append(folder)
        assert Bundle.open(folder).parity is None
        assert not (tmp_path / "exports" / "sam").exists()
        return ParityReport((row(passed=True), row(passed=False)))

    options = ExportOptions(exported.sam, tmp_path / "exports" / "sam", points=False)
    with pytest.raises(ParityError, match=r"1 of 2 checks: encoder embedding_relative_max 0\.5 \(limit 0\.0001\)"):
        export_bundle(options, Judges(gate), steps.append)
    assert len(seen) == 1
    assert list((tmp_path / "exports").iterdir()) == []
    assert [step.done for step in steps] == sorted(step.done for step in steps)


def test_bad_arguments_and_files_are_named_before_any_work(exported, tmp_path: Path):
    out = tmp_path / "bundle"
    with pytest.raises(CheckpointError, match=r"absent\.pt"):
        export_bundle(ExportOptions(tmp_path / "absent.pt", out))
    with pytest.raises(InvalidArgumentError, match="--overwrite"):
        export_bundle(ExportOptions(exported.sam, exported.bundle))
    with pytest.raises(InvalidArgumentError, match="overlap of 128 px"):
        export_bundle(ExportOptions(exported.sam, out, overlap_px=128))
    with pytest.raises(InvalidArgumentError, match="model_pixel_size_nm is -3"):
        export_bundle(ExportOptions(exported.sam, out, model_pixel_size_nm=-3.0))
    with pytest.raises(InvalidArgumentError, match="multiple"):
        export_bundle(ExportOptions(exported.sam, out, image_size_px=100))
    assert list(tmp_path.iterdir()) == []


def test_a_broken_download_is_named(shared_data: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"mobile_sam_truncated\.pt: .*cut off"):
        export_bundle(ExportOptions(shared_data / "sam" / "mobile_sam_truncated.pt", tmp_path / "bundle"))


def test_a_foreign_detector_is_its_own_original(shared_data: Path, exported, tmp_path: Path):
    bundle = Bundle.open(exported.bundle)
    inputs = load_reference(bundle.extra_path("reference.npz"), SIZE).inputs
    path = shared_data / "yolo" / "yolov8n_int8.onnx"
    detector = export_detector(path, tmp_path / "detector.onnx", bundle.manifest.preprocessing, inputs)
    assert (detector.source.kind, detector.source.checkpoint.file) == ("onnx", path.name)
    assert detector.source.checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert detector.outputs is None
    assert detector.graph.files[0].file == "detector.onnx"
    sources = (bundle.manifest.sources[0], detector.source)
    card = model_card(dataclasses.replace(bundle.manifest, sources=sources), TrainingFacts({}, {}))
    assert "If the detector was made with Ultralytics software" in card


def test_reference_tiles_are_structured_and_one_is_padded():
    inputs = reference_inputs(ReferenceOptions(256))
    assert inputs.tiles.shape == (2, 256, 256)
    np.testing.assert_array_equal(inputs.sizes, [[256, 256], [195, 165]])
    for tile, (height, width) in zip(inputs.tiles, inputs.sizes, strict=True):
        assert tile[:height, :width].std() > 20
        assert not tile[height:].any()
        assert not tile[:, width:].any()
    limit = inputs.sizes[inputs.tile_index][:, [1, 0]]
    assert (inputs.boxes[:, :2] >= 0).all()
    assert (inputs.boxes[:, 2:] <= limit).all()
    assert (inputs.boxes[:, 2:] > inputs.boxes[:, :2]).all()
    # The first boxes of any number already come from all tiles.
    assert set(inputs.tile_index[:3].tolist()) == {0, 1}
    np.testing.assert_array_equal(inputs.boxes[0], [0, 0, 256, 256])


def test_reference_inputs_are_reproducible():
    first, second = reference_inputs(ReferenceOptions(128)), reference_inputs(ReferenceOptions(128))
    np.testing.assert_array_equal(first.tiles, second.tiles)
    np.testing.assert_array_equal(first.boxes, second.boxes)


def test_reference_tiles_may_come_from_a_volume(shared_data: Path):
    path = shared_data / "em_fibsem_medulla" / "raw.tif"
    inputs = reference_inputs(ReferenceOptions(512, path))
    np.testing.assert_array_equal(inputs.sizes, [[250, 250], [250, 250]])
    assert (inputs.boxes <= 250).all()
    with pytest.raises(VolumeError, match="absent"):
        reference_inputs(ReferenceOptions(512, path.with_name("absent.tif")))


@pytest.mark.parametrize(
    ("sam", "detector", "expected"),
    [
        ((None, None), (None, None), 512),  # nothing known: the detector was trained on tiles like these
        ((15.0, None), (15.0, None), 512),
        ((15.0, None), (30.0, None), 256),  # it knows pixels of twice the size: half as many
        ((None, 2.0), (None, 1.0), 256),
        ((15.0, 1.0), (30.0, 1.0), 256),  # nanometres go before zoom
        ((15.0, None), (14.0, None), 544),  # rounded to its stride
    ],
)
def test_a_detector_sees_objects_as_large_as_in_training(exported, sam, detector, expected):
    loaded = load_detector(Path("yolo11n.yaml"))
    preprocessing = dataclasses.replace(
        Bundle.open(exported.bundle).manifest.preprocessing, tile_size_px=512, model_pixel_size_nm=sam[0], zoom=sam[1]
    )
    assert detector_input_size(loaded, preprocessing) is None
    trained = dataclasses.replace(loaded, record=DetectorRecord(640, *detector))
    assert detector_input_size(trained, preprocessing) == expected
