"""OME-Zarr and plain Zarr, against what the zarr library was given to write."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.errors import DendsamError, VolumeError
from dendsam_deploy.geometry import Window
from dendsam_deploy.volume.ngff import ZarrReader
from dendsam_deploy.volume.open import open_labels, open_volume

STACK = np.random.default_rng(2).integers(0, 60000, (7, 33, 21), np.uint16)


def ome_zarr(path, data, version="0.5", *, unit="nanometer", scale=None, **options):
    """Write an image of two levels; the second one is rubbish that must never be read."""
    scale = scale or [1.0] * data.ndim
    units = {} if unit is None else {"unit": unit}
    entries = [
        {"name": name, "type": "space", **units} if name in "zyx" else {"name": name} for name in "tczyx"[-data.ndim :]
    ]
    datasets = [
        {"path": name, "coordinateTransformations": [{"type": "scale", "scale": scale}]} for name in ("full", "half")
    ]
    multiscale = {"version": version, "axes": entries, "datasets": datasets}
    attributes = {"multiscales": [multiscale]}
    group = zarr.create_group(
        path,
        zarr_format=3 if version == "0.5" else 2,
        attributes={"ome": {"version": "0.5", **attributes}} if version == "0.5" else attributes,
    )
    chunks = options.pop("chunks", (1,) * (data.ndim - 2) + data.shape[-2:])
    group.create_array("full", data=data, chunks=chunks, **options)
    group.create_array("half", data=np.zeros_like(data[..., ::2, ::2]), chunks=chunks)
    return group


def assert_reads(path, expected, info_format):
    with open_volume(path) as volume:
        assert volume.info.shape_zyx == expected.shape
        assert volume.info.dtype == expected.dtype.newbyteorder("=")
        assert volume.info.format == info_format
        for z in (*range(len(expected)), 0, 3 % len(expected)):
            image = volume.read(z)
            np.testing.assert_array_equal(image, expected[z])
            image[:] = 0  # what a reader hands out is the caller's
            np.testing.assert_array_equal(volume.read(z, Window(5, 6, 7, 8)), expected[z, 5:12, 6:14])
            np.testing.assert_array_equal(volume.read(z), expected[z])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("leading", [0, 1, 2])
def test_level_zero_is_read_and_axes_of_length_one_are_dropped(version, leading, tmp_path):
    ome_zarr(tmp_path / "v.zarr", STACK[(None,) * leading], version)
    assert_reads(tmp_path / "v.zarr", STACK, "ome-zarr")


def test_image_of_two_axes_is_one_slice(tmp_path):
    ome_zarr(tmp_path / "v.zarr", STACK[0])
    assert_reads(tmp_path / "v.zarr", STACK[:1], "ome-zarr")


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", [">u2", "<u2", "u1", "f4", "i8", "?"])
def test_plain_array(zarr_format, dtype, tmp_path):
    data = (STACK % 2 if dtype == "?" else STACK % 200).astype(dtype)
    zarr.create_array(tmp_path / "v.zarr", data=data, chunks=(2, 16, 16), zarr_format=zarr_format)
    assert_reads(tmp_path / "v.zarr", data, "zarr")


@pytest.mark.parametrize("chunks", [(1, 33, 21), (4, 16, 16), (7, 33, 21), (3, 5, 21)])
def test_chunks_may_span_several_slices(chunks, tmp_path):
    ome_zarr(tmp_path / "v.zarr", STACK, chunks=chunks)
    assert_reads(tmp_path / "v.zarr", STACK, "ome-zarr")


def test_shards(tmp_path):
    ome_zarr(tmp_path / "v.zarr", STACK, chunks=(1, 11, 7), shards=(2, 33, 21))
    assert_reads(tmp_path / "v.zarr", STACK, "ome-zarr")


def test_group_with_one_array_is_that_array(tmp_path):
    zarr.create_group(tmp_path / "v.zarr").create_array("volumes/raw", data=STACK)
    assert_reads(tmp_path / "v.zarr/volumes", STACK, "zarr")


def test_inner_array_can_be_named(tmp_path):
    ome_zarr(tmp_path / "v.zarr", STACK)
    assert_reads(tmp_path / "v.zarr" / "full", STACK, "zarr")


def test_absent_chunks_of_foreign_arrays_are_the_fill_value(tmp_path):
    array = zarr.create_array(tmp_path / "v.zarr", shape=(3, 10, 10), chunks=(1, 10, 10), dtype="u1", fill_value=7)
    array[1] = 3
    with open_volume(tmp_path / "v.zarr") as volume:
        assert [volume.read(z).max() for z in range(3)] == [7, 3, 7]


def test_single_series_of_a_converted_microscope_file(tmp_path):
    root = zarr.create_group(tmp_path / "v.zarr", zarr_format=2, attributes={"bioformats2raw.layout": 3})
    root.create_group("OME")
    ome_zarr(tmp_path / "v.zarr" / "0", STACK[None, None], "0.4")
    assert_reads(tmp_path / "v.zarr", STACK, "ome-zarr")


@pytest.mark.parametrize(
    ("unit", "scale", "expected"),
    [
        ("nanometer", [40, 10, 8], (40, 10, 8)),
        ("micrometer", [0.04, 0.01, 0.008], (40, 10, 8)),
        ("angstrom", [400, 100, 80], (40, 10, 8)),
        (None, [40, 10, 8], None),
        ("pixel", [40, 10, 8], None),
        ("nanometer", [40, 0, 8], None),
    ],
)
def test_voxel_size_is_scale_times_unit(unit, scale, expected, tmp_path):
    ome_zarr(tmp_path / "v.zarr", STACK, unit=unit, scale=scale)
    with open_volume(tmp_path / "v.zarr") as volume:
        assert volume.info.voxel_size_nm == (expected and pytest.approx(expected))
    with open_volume(tmp_path / "v.zarr", (1, 2, 3)) as volume:
        assert volume.info.voxel_size_nm == (1, 2, 3)


def test_scale_of_the_whole_image_multiplies(tmp_path):
    group = ome_zarr(tmp_path / "v.zarr", STACK[None], scale=[1, 40, 10, 8])
    ome = dict(group.attrs["ome"])
    ome["multiscales"][0]["coordinateTransformations"] = [{"type": "scale", "scale": [0.1, 1, 2, 2]}]
    group.attrs["ome"] = ome
    with open_volume(tmp_path / "v.zarr") as volume:
        assert volume.info.voxel_size_nm == pytest.approx((40, 20, 16))


def test_labels_group_of_an_image_is_opened_as_labels(tmp_path):
    labels = STACK % 9
    image = ome_zarr(tmp_path / "v.zarr", STACK)
    image.create_group("labels", attributes={"ome": {"version": "0.5", "labels": ["dendrites"]}})
    ome_zarr(tmp_path / "v.zarr/labels/dendrites", labels)
    assert_reads(tmp_path / "v.zarr", STACK, "ome-zarr")
    with open_labels(tmp_path / "v.zarr") as volume:
        np.testing.assert_array_equal(volume.read(2), labels[2])
    image["labels"].attrs["ome"] = {"labels": ["dendrites", "axons"]}
    with pytest.raises(VolumeError, match=r"2 label images \['dendrites', 'axons'\]"):
        open_labels(tmp_path / "v.zarr")


def test_a_chunk_of_many_slices_is_decoded_once(tmp_path):
    ome_zarr(tmp_path / "v.zarr", STACK, chunks=(7, 33, 21))
    with ZarrReader(tmp_path / "v.zarr") as reader:
        for z in range(7):
            np.testing.assert_array_equal(reader.read(z), STACK[z])
            # From the second slice on the store is not needed any more.
            for chunk in (tmp_path / "v.zarr/full/c").rglob("0"):
                if chunk.is_file():
                    chunk.unlink()


@given(data=st.data(), target=st.sampled_from(["zarr.json", "full/zarr.json", "full/c/1/0/0"]))
@settings(deadline=None, max_examples=100)
def test_damaged_files_never_escape_as_another_exception(tmp_path_factory, data, target):
    """Flip or cut bytes, or exchange values in the metadata: a part is read in its own shape or refused in one line."""
    path = tmp_path_factory.mktemp("fuzz") / "v.zarr"
    ome_zarr(path, STACK[:2])
    file = path / target
    if target.endswith("json") and data.draw(st.booleans()):
        document = json.loads(file.read_text())
        for _ in range(data.draw(st.integers(1, 2))):
            _exchange_one_value(document, data)
        file.write_text(json.dumps(document))
    else:
        raw = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    refusal = ""
    try:
        with open_volume(path) as volume:
            assert volume.read(0).shape == volume.info.shape_zyx[1:]
            assert volume.read(volume.info.shape_zyx[0] - 1).shape == volume.info.shape_zyx[1:]
    except DendsamError as error:
        refusal = str(error)
    assert refusal == "" or (str(path) in refusal and "\n" not in refusal)


def _exchange_one_value(document, data):
    """Replace a random value of nested JSON by another kind of value."""
    while True:
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(document[key], (dict, list)) or not document[key] or data.draw(st.integers(0, 3)) == 0:
            document[key] = data.draw(st.sampled_from([None, -1, 0, 1e300, "x", "", [], {}, [1], True]))
            return
        document = document[key]
