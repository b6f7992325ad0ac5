"""Label volumes: written, read back by us and by the libraries that others read them with, and refused where wrong."""

from __future__ import annotations

import hashlib
import resource

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.errors import InvalidArgumentError, StorageError, VolumeError
from dendsam_deploy.volume.labels import LabelVolumeSpec, create_labels, smallest_label_dtype
from dendsam_deploy.volume.ngff_labels import halve_labels
from dendsam_deploy.volume.open import open_labels

FORMATS = ["tif", "ome-zarr"]


def write(path, labels, voxel_size_nm=None, kind="tif"):
    with create_labels(path, LabelVolumeSpec(labels.shape, labels.dtype, voxel_size_nm, kind)) as writer:
        for z, image in enumerate(labels):
            writer.write(z, image.astype(np.uint32))
    return path


def random_labels(shape, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def contents(folder):
    return sorted(file.name for file in folder.iterdir())


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    voxel_size_nm=st.none() | st.tuples(*[st.floats(0.01, 1e5)] * 3),
    kind=st.sampled_from(FORMATS),
)
@settings(deadline=None, max_examples=80)
def test_what_is_written_is_read_back(tmp_path_factory, shape, dtype, voxel_size_nm, kind):
    labels = np.random.default_rng(5).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    path = write(tmp_path_factory.mktemp("labels") / "labels", labels, voxel_size_nm, kind)
    with open_labels(path) as volume:
        assert volume.info.shape_zyx == shape
        assert volume.info.dtype == dtype
        # ImageJ keeps the size of pixels as a ratio of 32-bit integers.
        assert volume.info.voxel_size_nm == (voxel_size_nm and pytest.approx(voxel_size_nm, rel=1e-6))
        for z, expected in enumerate(labels):
            np.testing.assert_array_equal(volume.read(z), expected)


@pytest.mark.parametrize(("dtype", "flavour"), [(np.uint8, "imagej"), (np.uint16, "imagej"), (np.uint32, "ome")])
def test_tiff_is_what_other_programs_expect(dtype, flavour, tmp_path):
    labels = random_labels((5, 300, 200), dtype)
    path = write(tmp_path / "labels.tif", labels, (40.0, 15.0, 12.5))
    with tifffile.TiffFile(path) as file:
        assert [series.kind for series in file.series] == [flavour]
        assert file.series[0].axes == "ZYX"
        np.testing.assert_array_equal(file.asarray(), labels)
        if flavour == "imagej":
            assert file.imagej_metadata["spacing"] == 40
            assert file.imagej_metadata["unit"] == "nm"
            assert file.pages[0].tags["XResolution"].value == (2, 25)
            assert file.pages[0].tags["YResolution"].value == (1, 15)
        else:
            pixels = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
            assert (pixels["PhysicalSizeZ"], pixels["PhysicalSizeY"], pixels["PhysicalSizeX"]) == (40, 15, 12.5)
            assert {pixels[f"PhysicalSize{axis}Unit"] for axis in "XYZ"} == {"nm"}


def test_volume_above_four_gigabytes_becomes_a_bigtiff(tmp_path):
    """Only the first slice is written: the choice is made by the declared shape."""
    spec = LabelVolumeSpec((5000, 1000, 1000), np.dtype(np.uint8), (40.0, 10.0, 10.0))
    writer = create_labels(tmp_path / "labels.tif", spec)
    writer.write(0, np.zeros((1000, 1000), np.uint32))
    assert (tmp_path / "labels.tif.partial").read_bytes()[:4] == b"II+\0"
    writer.__exit__(RuntimeError, RuntimeError(), None)
    assert contents(tmp_path) == []


def test_ome_zarr_has_a_pyramid_of_exact_labels(tmp_path):
    labels = random_labels((2, 1500, 1100), np.uint32) * 70_000
    path = write(tmp_path / "labels.ome.zarr", labels, (40.0, 15.0, 12.0), "ome-zarr")
    group = zarr.open(path, mode="r")
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"
    assert "image-label" in ome
    (image,) = ome["multiscales"]
    assert [(axis["name"], axis["type"], axis["unit"]) for axis in image["axes"]] == [
        (name, "space", "nanometer") for name in "zyx"
    ]
    expected, centre = labels, 0.0
    for level, dataset in enumerate(image["datasets"]):
        array = group[dataset["path"]]
        np.testing.assert_array_equal(array[:], expected)
        scale, translation = dataset["coordinateTransformations"]
        assert scale["scale"] == [40.0, 15.0 * 2**level, 12.0 * 2**level]
        assert translation["translation"] == [0.0, 15.0 * centre, 12.0 * centre]
        assert array.metadata.dimension_names == ("z", "y", "x")
        assert set(np.unique(array[:])) <= set(np.unique(labels))
        expected = np.stack([halve_labels(slice_) for slice_ in expected])
        centre = centre * 2 + 0.5
    assert max(group[image["datasets"][-1]["path"]].shape[1:]) <= 256
    assert len(list((path / "0" / "c" / "0").rglob("*"))) == 2, "one folder and one file per slice: a shard"


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 200))
@settings(deadline=None, max_examples=60)
def test_halving_takes_the_most_frequent_label(height, width, seed):
    labels = np.random.default_rng(seed).integers(0, 3, (height, width), np.uint16)
    halved = halve_labels(labels)
    assert halved.shape == (-(-height // 2), -(-width // 2))
    assert halved.dtype == labels.dtype
    for y, x in np.ndindex(halved.shape):
        rows, columns = (np.minimum([2 * i, 2 * i + 1], n - 1) for i, n in ((y, height), (x, width)))
        four = labels[np.ix_(rows, columns)].ravel().tolist()
        assert halved[y, x] == max(four, key=lambda value: (four.count(value), -four.index(value)))


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_has_the_final_name_before_the_end(kind, tmp_path):
    labels = random_labels((3, 20, 20))
    path = tmp_path / "labels"
    with create_labels(path, LabelVolumeSpec(labels.shape, labels.dtype, None, kind)) as writer:
        for z, image in enumerate(labels):
            writer.write(z, image.astype(np.uint32))
            assert not path.exists()
    assert contents(tmp_path) == ["labels"]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_interrupted_write_leaves_the_old_volume(kind, tmp_path):
    path = write(tmp_path / "labels", random_labels((2, 9, 9), seed=1), None, kind)
    writer = create_labels(path, LabelVolumeSpec((2, 9, 9), np.dtype(np.uint16), None, kind))
    writer.write(0, np.zeros((9, 9), np.uint32))
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with open_labels(path) as volume:
        np.testing.assert_array_equal(volume.read(0), random_labels((2, 9, 9), seed=1)[0])
    assert contents(tmp_path) == ["labels"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_finished_volume_replaces_the_old_one_and_a_stale_partial_one(kind, tmp_path):
    path = write(tmp_path / "labels", random_labels((2, 9, 9), seed=1), None, kind)
    (tmp_path / "labels.partial").mkdir()
    (tmp_path / "labels.partial" / "junk").touch()
    write(path, random_labels((2, 9, 9), seed=2), None, kind)
    with open_labels(path) as volume:
        np.testing.assert_array_equal(volume.read(1), random_labels((2, 9, 9), seed=2)[1])
    assert contents(tmp_path) == ["labels"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(InvalidArgumentError, match="other content"):
        create_labels(tmp_path / "thesis", LabelVolumeSpec((1, 2, 2), np.dtype(np.uint8)))
    assert contents(tmp_path / "thesis") == ["chapter1.tex"]


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_labels_give_equal_bytes(kind, tmp_path):
    labels = random_labels((2, 30, 30), np.uint32)

    def digest(path):
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return [(str(file.relative_to(path)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]

    first = write(tmp_path / "a", labels, (40, 10, 10), kind)
    assert digest(first) == digest(write(tmp_path / "b", labels, (40, 10, 10), kind))


@pytest.mark.parametrize("kind", FORMATS)
def test_too_few_slices_publish_nothing(kind, tmp_path):
    writer = create_labels(tmp_path / "labels", LabelVolumeSpec((3, 4, 4), np.dtype(np.uint8), None, kind))
    writer.write(0, np.zeros((4, 4), np.uint32))
    with pytest.raises(InvalidArgumentError, match="1 of 3 slices"):
        writer.__exit__(None, None, None)
    assert contents(tmp_path) == []


WRONG_SLICES = {
    "out of order": (1, np.zeros((4, 4), np.uint32), "expected slice 0"),
    "wrong shape": (0, np.zeros((4, 5), np.uint32), r"shape \(4, 5\)"),
    "too large": (0, np.full((4, 4), 256, np.uint32), "expected 0 to 255"),
    "negative": (0, np.full((4, 4), -1, np.int32), "expected 0 to 255"),
}


@pytest.mark.parametrize("case", WRONG_SLICES)
def test_wrong_slices_are_refused(case, tmp_path):
    z, image, message = WRONG_SLICES[case]
    writer = create_labels(tmp_path / "labels.tif", LabelVolumeSpec((3, 4, 4), np.dtype(np.uint8)))
    with pytest.raises(InvalidArgumentError, match=message), writer:
        writer.write(z, image)
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LabelVolumeSpec((1, 2, 2), np.dtype(np.float32)), "float32"),
        (LabelVolumeSpec((1, 2, 2), np.dtype(np.int16)), "int16"),
        (LabelVolumeSpec((0, 2, 2), np.dtype(np.uint8)), r"\(0, 2, 2\)"),
    ],
)
def test_impossible_volumes_are_refused(spec, message, tmp_path):
    with pytest.raises(InvalidArgumentError, match=message):
        create_labels(tmp_path / "labels.tif", spec)


@pytest.mark.parametrize("kind", FORMATS)
def test_place_that_cannot_be_written_is_named(kind, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file.labels: cannot be written"):
        create_labels(tmp_path / "file" / "labels", LabelVolumeSpec((1, 2, 2), np.dtype(np.uint8), None, kind))


@pytest.mark.parametrize("kind", FORMATS)
def test_storage_that_runs_out_is_named_and_leaves_nothing(kind, tmp_path):
    """A limit on the size of files stands for a full disk: the operating system refuses the write."""
    noise = np.random.default_rng(0).integers(0, 2**32 - 1, (3, 300, 300), np.uint32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"labels: cannot be written \(File too large\)"):
            write(tmp_path / "labels", noise, None, kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    ("largest", "dtype"), [(0, "u1"), (255, "u1"), (256, "u2"), (65535, "u2"), (65536, "u4"), (2**32 - 1, "u4")]
)
def test_smallest_type_holds_the_largest_label(largest, dtype):
    assert smallest_label_dtype(largest) == np.dtype(dtype)


@pytest.mark.parametrize("label", [-1, 2**32])
def test_labels_beyond_32_bits_are_refused(label):
    with pytest.raises(InvalidArgumentError, match=str(label)):
        smallest_label_dtype(label)


@pytest.mark.parametrize("side", [40, 1500])
def test_a_deleted_piece_is_an_error_and_not_an_empty_slice(side, tmp_path):
    labels = np.zeros((3, side, side), np.uint8)
    path = write(tmp_path / "labels.ome.zarr", labels, None, "ome-zarr")
    (path / "0" / "c" / "1" / "0" / "0").unlink()
    with open_labels(path) as volume:
        assert not volume.read(0).any()
        with pytest.raises(VolumeError, match="slice 1 is incomplete"):
            volume.read(1)


BAD_LABELS = {
    "negative": (np.array([2, -3], np.int32), "slice 1 holds the negative value -3"),
    "fractional": (np.array([2, 1.5], np.float32), "slice 1 holds values that are no integers"),
    "nan": (np.array([2, np.nan], np.float32), "slice 1 holds values that are no integers"),
    "infinite": (np.array([2, np.inf], np.float64), "slice 1 holds the label inf"),
    "too large": (np.array([2, 2**32], np.float64), "slice 1 holds the label 4294967296"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_refused_by_slice(case, tmp_path):
    row, message = BAD_LABELS[case]
    tifffile.imwrite(tmp_path / "labels.tif", np.stack([np.ones_like(row), row])[:, None], photometric="minisblack")
    with open_labels(tmp_path / "labels.tif") as volume:
        np.testing.assert_array_equal(volume.read(0), [[1, 1]])
        with pytest.raises(VolumeError, match=f"labels.tif: {message}"):
            volume.read(1)
