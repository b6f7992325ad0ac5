"""Fixtures shared by all tests."""

from dataclasses import dataclass
from pathlib import Path

import pytest

LONGEST_FILES = ("test_readme.py", "test_detector_training.py", "test_command_rounds.py", "test_rounds.py")
"""Minutes each; begun first, so that no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; otherwise keep the order."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder.name}/ beside the repository")
    return folder


@dataclass(frozen=True)
class Exported:
    """A bundle of random weights, small enough for tests, and the checkpoints that it was exported from."""

    bundle: Path
    sam: Path
    detector: Path


SMALL_YOLO = """
nc: 1
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, Conv, [16, 3, 2]]
  - [[2, 3], 1, Detect, [nc]]
"""


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Export a `tiny` SAM of 128 px and a YOLO of five layers, once for all tests; do not write into the bundle."""
    torch = pytest.importorskip("torch")
    from dendsam_deploy.export.bundle import export_bundle  # noqa: PLC0415 - most tests need no torch
    from dendsam_deploy.export.options import ExportOptions  # noqa: PLC0415
    from dendsam_deploy.models.detector import DetectorRecord, load_detector, save_detector  # noqa: PLC0415
    from dendsam_deploy.models.sam import build_sam  # noqa: PLC0415
    from dendsam_deploy.models.weights import TrainingRecord, save_sam  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("exported")
    sam, detector = folder / "sam.pt", folder / "detector.pt"
    torch.manual_seed(0)
    record = TrainingRecord("tiny", 128, model_pixel_size_nm=15.0, zoom=0.5, summary={"volume": "phantom 3"})
    weights = build_sam("tiny", 128)
    for parameter in weights.parameters():
        if parameter.numel() > 1 and parameter.std() == 0:  # what is left at zero by all could be forgotten unnoticed
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_sam(sam, weights.state_dict(), record)

    (folder / "small.yaml").write_text(SMALL_YOLO)
    network = load_detector(folder / "small.yaml").network
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    # Untrained, but its signals vary as much as those of a trained network, and so do its scores.
    network.train()(torch.rand(4, 3, 128, 128))
    for branch in network.model[-1].cv3:
        branch[-1].weight.normal_(std=0.5)
        branch[-1].bias.zero_()
    save_detector(detector, network.eval(), DetectorRecord(128, model_pixel_size_nm=15.0, zoom=0.5))
    out = export_bundle(ExportOptions(sam, folder / "exports" / "toy", detector, licence="CC0-1.0"))
    return Exported(out, sam, detector)
