"""The stored reference survives the way to disk, and files that are not one are refused before they cost memory."""

import dataclasses
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dendsam_deploy.bundle.reference import (
    DetectorOutputs,
    PointAnswers,
    ReferenceInputs,
    SamOutputs,
    StoredReference,
    load_reference,
    save_reference,
)
from dendsam_deploy.errors import BundleError

SIZE = 64


def reference(*, with_detector: bool = True) -> StoredReference:
    rng = np.random.default_rng(1)
    inputs = ReferenceInputs(
        tiles=rng.integers(0, 255, (2, SIZE, SIZE), np.uint8),
        sizes=np.array([[SIZE, SIZE], [50, 41]]),
        boxes=rng.uniform(0, SIZE, (3, 4)).astype(np.float32),
        tile_index=np.array([0, 1, 1]),
    )
    sam = SamOutputs(
        embeddings=rng.normal(size=(2, 256, 4, 4)).astype(np.float32),
        logits=rng.normal(size=(3, 16, 16)).astype(np.float32),
        iou=rng.uniform(size=3).astype(np.float32),
    )
    boxes, scores = rng.uniform(size=(2, 5, 4)), rng.uniform(size=(2, 5))
    detector = DetectorOutputs(boxes.astype(np.float32), scores.astype(np.float32))
    return StoredReference(inputs, sam, detector if with_detector else None)


@pytest.mark.parametrize("with_detector", [True, False])
def test_a_reference_is_read_as_it_was_written(tmp_path: Path, with_detector: bool):
    written = reference(with_detector=with_detector)
    save_reference(tmp_path / "reference.npz", written)
    read = load_reference(tmp_path / "reference.npz", SIZE)
    assert (read.detector is None) == (not with_detector)
    for part in ("inputs", "sam", *(["detector"] if with_detector else [])):
        for field in dataclasses.fields(getattr(written, part)):
            expected, found = (getattr(getattr(r, part), field.name) for r in (written, read))
            np.testing.assert_array_equal(found, expected)


def write_archive(path: Path, arrays: dict[str, np.ndarray], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.save(stream, array, allow_pickle=True)
            archive.writestr(f"{name}.npy", stream.getvalue())


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    save_reference(path, reference(with_detector=False))
    with np.load(path) as archive:
        return dict(archive)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("logits"), "missing or unknown"),
        (lambda a: a.update(extra=np.zeros(1)), "missing or unknown"),
        (lambda a: a.update(tiles=a["tiles"].astype(np.int16)), "tiles is int16"),
        (lambda a: a.update(logits=a["logits"][:, :8]), r"logits is float32\(3, 8, 16\)"),
        (lambda a: a.update(detector_boxes=np.zeros((2, 5, 4), np.float32)), "missing or unknown"),
        (lambda a: a.update(tile_index=np.array([0, 1, 2])), "does not hold"),
        (lambda a: a.update(sizes=np.array([[64, 65], [1, 1]])), "does not hold"),
        (lambda a: a.update(boxes=np.zeros((0, 4), np.float32)), r"expected int64\(0,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, change, message: str):
    path = tmp_path / "reference.npz"
    arrays = arrays_of(path)
    change(arrays)
    write_archive(path, arrays)
    with pytest.raises(BundleError, match=message):
        load_reference(path, SIZE)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path):
    path = tmp_path / "reference.npz"
    write_archive(path, {"tiles": np.zeros(10**7, np.uint8)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(BundleError, match="compressed"):
        load_reference(path, SIZE)


def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path: Path):
    path = tmp_path / "reference.npz"
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 10**6)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiles.npy", stream.getvalue())
    with pytest.raises(BundleError, match="does not fit"):
        load_reference(path, SIZE)


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_inside_is_never_opened(tmp_path: Path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary works"
    canary.unlink()
    path = tmp_path / "reference.npz"
    write_archive(path, {"tiles": np.array([Canary(canary)], object)})
    with pytest.raises(BundleError, match="does not fit"):
        load_reference(path, SIZE)
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "reference.npz").write_bytes(content)
    with pytest.raises(BundleError, match=r"reference\.npz"):
        load_reference(tmp_path / "reference.npz", SIZE)


def with_clicks() -> StoredReference:
    rng = np.random.default_rng(2)
    clicks = PointAnswers(
        points=rng.uniform(0, SIZE, (4, 2, 2)).astype(np.float32),
        labels=rng.integers(-1, 2, (4, 2)),
        tile_index=np.array([0, 1, 1, 0]),
        logits=rng.normal(size=(4, 4, 16, 16)).astype(np.float32),
        iou=rng.uniform(size=(4, 4)).astype(np.float32),
    )
    return dataclasses.replace(reference(), points=clicks)


def test_clicks_are_read_as_they_were_written(tmp_path: Path):
    written = with_clicks()
    save_reference(tmp_path / "reference.npz", written)
    read = load_reference(tmp_path / "reference.npz", SIZE)
    assert read.points is not None
    for field in dataclasses.fields(PointAnswers):
        np.testing.assert_array_equal(getattr(read.points, field.name), getattr(written.points, field.name))
    assert read.detector is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("prompted_iou"), "missing or unknown"),
        (lambda a: a.update(prompted_more=np.zeros(1)), "missing or unknown"),
        (lambda a: a.update(prompted_labels=np.zeros(4, np.int64)), r"expected float32\(0, 0, 2\)"),
        (
            lambda a: a.update(prompted_logits=a["prompted_logits"][:, :2]),
            r"prompted_logits is float32\(4, 2, 16, 16\)",
        ),
        (lambda a: a.update(prompted_tile_index=np.array([0, 1, 1, 2])), "does not hold"),
    ],
)
def test_clicks_that_do_not_fit_are_refused(tmp_path: Path, change, message: str):
    save_reference(tmp_path / "right.npz", with_clicks())
    with np.load(tmp_path / "right.npz") as archive:
        arrays = dict(archive)
    change(arrays)
    write_archive(tmp_path / "reference.npz", arrays)
    with pytest.raises(BundleError, match=message):
        load_reference(tmp_path / "reference.npz", SIZE)
