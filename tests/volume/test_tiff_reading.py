"""TIFF stacks of every flavour, against what tifffile was given to write."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.errors import DendsamError, InvalidArgumentError, VolumeError
from dendsam_deploy.geometry import Window
from dendsam_deploy.volume.open import open_labels, open_volume

RNG = np.random.default_rng(3)
GREY8 = RNG.integers(0, 255, (5, 70, 50), np.uint8)
GREY16 = RNG.integers(0, 65535, (3, 70, 50), np.uint16)
REAL32 = RNG.normal(size=(3, 70, 50)).astype(np.float32)

FLAVOURS = {
    "plain": (GREY8, {}),
    "without metadata": (GREY8, {"metadata": None}),
    "imagej": (GREY8, {"imagej": True}),
    "imagej uint16": (GREY16, {"imagej": True}),
    "imagej float32": (REAL32, {"imagej": True}),
    "ome": (GREY16, {"ome": True}),
    "ome compressed": (GREY8, {"ome": True, "compression": "zlib"}),
    "bigtiff": (GREY16, {"bigtiff": True}),
    "bigtiff big endian": (GREY16, {"bigtiff": True, "byteorder": ">"}),
    "big endian compressed": (GREY16, {"byteorder": ">", "compression": "zlib"}),
    "tiled": (GREY8, {"tile": (32, 16)}),
    "tiled compressed": (GREY16, {"tile": (32, 32), "compression": "zstd", "metadata": None}),
    "short strips": (GREY8, {"rowsperstrip": 7}),
    "short strips compressed": (GREY8, {"rowsperstrip": 7, "compression": "lzw"}),
    "deflate with predictor": (GREY16, {"compression": "zlib", "predictor": True}),
    "floating-point predictor": (REAL32, {"compression": "zlib", "predictor": True}),
    "lzw": (GREY8, {"compression": "lzw"}),
    "packbits": (GREY8, {"compression": "packbits"}),
    "zstd": (GREY16, {"compression": "zstd"}),
    "lzma": (GREY8, {"compression": "lzma"}),
    "jpeg 2000 lossless": (GREY16, {"compression": "jpeg2000", "tile": (32, 32)}),
    "int16": (GREY16.astype(np.int16), {}),
    "int8": (GREY8.astype(np.int8), {}),
    "uint32": (GREY16.astype(np.uint32), {"compression": "zlib"}),
    "float16": (REAL32.astype(np.float16), {}),
    "float64": (REAL32.astype(np.float64), {}),
    "bilevel": (GREY8 > 100, {}),
    "minimum is white": (GREY8, {"photometric": "miniswhite"}),
    "one page": (GREY8[0], {}),
    "stack of one page": (GREY8[:1], {}),
    "one row": (GREY8[:, :1], {}),
    "one pixel": (GREY8[:, :1, :1], {"metadata": None}),
    "three pixels wide": (GREY8[:, :, :3], {"photometric": "minisblack", "metadata": {"axes": "ZYX"}}),
    "axes of length one": (GREY8[None, :, None], {"metadata": {"axes": "TZCYX"}, "ome": True}),
}


def assert_reads(path, expected: np.ndarray) -> None:
    """Every slice and a window of each must equal the array."""
    stack = np.asarray(expected).reshape(-1, *expected.shape[-2:])
    with open_volume(path) as volume:
        assert volume.info.shape_zyx == stack.shape
        assert volume.info.dtype == stack.dtype
        assert volume.info.source == str(path)
        height, width = stack.shape[1:]
        window = Window(height // 3, width // 4, (height + 1) // 2, (width + 1) // 2)
        for z in (*range(len(stack)), 0):
            image = volume.read(z)
            assert image.dtype == stack.dtype.newbyteorder("=")
            np.testing.assert_array_equal(image, stack[z])
            np.testing.assert_array_equal(volume.read(z, window), stack[z][window.slices])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_flavour_is_read_exactly(flavour, tmp_path):
    data, options = FLAVOURS[flavour]
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, data, **{"photometric": "minisblack"} | options)
    assert_reads(path, data if flavour != "axes of length one" else data[0, :, 0])


def test_twelve_bit_samples_become_uint16(tmp_path):
    data = GREY16 % 4096
    tifffile.imwrite(tmp_path / "stack.tif", data, bitspersample=12, photometric="minisblack")
    assert_reads(tmp_path / "stack.tif", data)


def test_lossy_jpeg_is_read_as_tifffile_reads_it(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", GREY8, compression="jpeg", tile=(32, 32), photometric="minisblack")
    assert_reads(tmp_path / "stack.tif", tifffile.imread(tmp_path / "stack.tif"))


def test_palette_of_a_label_stack_is_ignored(tmp_path):
    """ImageJ saves 8-bit labels shown in colours as indices with a palette; the indices are the labels."""
    colours = RNG.integers(0, 65535, (3, 256), np.uint16)
    with tifffile.TiffWriter(tmp_path / "stack.tif") as writer:
        for image in GREY8:
            writer.write(image, photometric="palette", colormap=colours, metadata=None)
    assert_reads(tmp_path / "stack.tif", GREY8)


def test_pages_written_one_by_one_are_one_stack(tmp_path):
    with tifffile.TiffWriter(tmp_path / "stack.tif") as writer:
        for image in GREY8:
            writer.write(image)
    assert_reads(tmp_path / "stack.tif", GREY8)


def test_thumbnails_and_pyramids_are_passed_over(tmp_path):
    with tifffile.TiffWriter(tmp_path / "thumbnails.tif") as writer:
        for image in GREY8:
            writer.write(image, metadata=None)
            writer.write(image[::4, ::4], subfiletype=1, metadata=None)
    assert_reads(tmp_path / "thumbnails.tif", GREY8)
    with tifffile.TiffWriter(tmp_path / "pyramid.ome.tif") as writer:
        writer.write(GREY8, subifds=1, tile=(16, 16), photometric="minisblack")
        writer.write(GREY8[:, ::2, ::2], subfiletype=1, tile=(16, 16), photometric="minisblack")
    assert_reads(tmp_path / "pyramid.ome.tif", GREY8)


def test_order_of_planes_is_that_of_the_ome_xml(tmp_path):
    planes = "".join(f'<TiffData IFD="{4 - z}" FirstZ="{z}" PlaneCount="1"/>' for z in range(5))
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYZCT" Type="uint8" SizeX="50" SizeY="70" SizeZ="5" SizeC="1" SizeT="1">'
        f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels></Image></OME>'
    )
    with tifffile.TiffWriter(tmp_path / "stack.ome.tif") as writer:
        for z, image in enumerate(GREY8):
            writer.write(image, description=xml if z == 0 else None, metadata=None, contiguous=False)
    assert_reads(tmp_path / "stack.ome.tif", GREY8[::-1])


def test_imagej_stack_above_four_gigabytes_has_one_directory(tmp_path):
    """ImageJ writes one directory and 4,500 planes of 1 MB after it. The file is sparse: only two planes are stored."""
    path = tmp_path / "stack.tif"
    side, count = 1000, 4500
    description = f"ImageJ=1.53t\nimages={count}\nslices={count}\nunit=nm\nspacing=40.0\n"
    tifffile.imwrite(
        path,
        np.zeros((side, side), np.uint8),
        byteorder=">",
        description=description,
        metadata=None,
        resolution=(0.1, 0.1),
    )
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[0]
    last = RNG.integers(0, 255, (side, side), np.uint8)
    with path.open("r+b") as file:
        file.seek(offset + (count - 1) * side * side)
        file.write(last.tobytes())
    assert path.stat().st_size > 2**32
    with open_volume(path) as volume:
        assert volume.info.shape_zyx == (count, side, side)
        assert volume.info.voxel_size_nm == pytest.approx((40, 10, 10))
        assert not volume.read(7).any()
        np.testing.assert_array_equal(volume.read(count - 1), last)
        np.testing.assert_array_equal(volume.read(count - 1, Window(10, 20, 30, 40)), last[10:40, 20:60])


@given(
    st.sampled_from(["zlib", None, "lzw"]),
    st.sampled_from([None, (16, 16), (32, 16)]),
    st.integers(1, 60),
    st.tuples(st.integers(0, 70), st.integers(0, 70), st.integers(0, 50), st.integers(0, 50)),
)
@settings(deadline=None, max_examples=60)
def test_any_window_equals_the_part_of_the_slice(tmp_path_factory, compression, tile, rows, corners):
    path = tmp_path_factory.mktemp("window") / "stack.tif"
    layout = {"tile": tile} if tile else {"rowsperstrip": rows}
    tifffile.imwrite(path, GREY16, photometric="minisblack", compression=compression, **layout)
    (y0, y1), (x0, x1) = sorted(corners[:2]), sorted(corners[2:])
    with open_volume(path) as volume:
        part = volume.read(2, Window(y0, x0, y1 - y0, x1 - x0))
    np.testing.assert_array_equal(part, GREY16[2, y0:y1, x0:x1])


@pytest.mark.parametrize("z", [-1, 5])
def test_slice_outside_the_volume_is_refused(z, tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", GREY8)
    with open_volume(tmp_path / "stack.tif") as volume, pytest.raises(InvalidArgumentError, match="0 to 4"):
        volume.read(z)


@pytest.mark.parametrize("window", [Window(0, 0, 71, 1), Window(-1, 0, 5, 5), Window(0, 40, 5, 11)])
def test_window_outside_the_slice_is_refused(window, tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", GREY8)
    with open_volume(tmp_path / "stack.tif") as volume, pytest.raises(InvalidArgumentError, match="70 x 50"):
        volume.read(0, window)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.uint32, np.int16, np.int64, np.float32])
def test_labels_of_any_type_are_read_as_uint32(dtype, tmp_path):
    labels = (GREY8 % 100).astype(dtype)
    tifffile.imwrite(tmp_path / "labels.tif", labels, photometric="minisblack", compression="zlib")
    with open_labels(tmp_path / "labels.tif") as volume:
        for z, expected in enumerate(labels):
            image = volume.read(z)
            assert image.dtype == np.uint32
            np.testing.assert_array_equal(image, expected.astype(np.uint32))


def test_memory_does_not_grow_with_the_number_of_slices(tmp_path):
    def peak_of(count: int) -> int:
        path = tmp_path / f"{count}.tif"
        with tifffile.TiffWriter(path) as writer:
            for _ in range(count):
                writer.write(np.zeros((256, 256), np.uint8), compression="zlib", metadata=None)
        tracemalloc.start()
        with open_volume(path) as volume:
            for z in range(count):
                volume.read(z)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_of(2)  # what is imported and cached once
    # A page costs its index and offsets, some 400 bytes, against the 65,536 of its pixels.
    assert peak_of(220) < peak_of(20) + 200 * 600


@given(data=st.data(), kind=st.sampled_from(["zlib", "tiled", "imagej", "ome"]))
@settings(deadline=None, max_examples=200)
def test_damaged_bytes_never_escape_as_another_exception(tmp_path_factory, data, kind):
    """Flip, overwrite or cut bytes anywhere: the file is either read in its own shape or refused in one line."""

    path = tmp_path_factory.mktemp("fuzz") / "stack.tif"
    options = {
        "zlib": {"compression": "zlib"},
        "tiled": {"tile": (16, 16), "compression": "lzw"},
        "imagej": {"imagej": True, "metadata": {"unit": "nm", "spacing": 40}},
        "ome": {"ome": True},
    }
    tifffile.imwrite(path, GREY8[:3], photometric="minisblack", **options[kind])
    raw = bytearray(path.read_bytes())
    # Most bytes are pixels; aim at header and directories half of the time.
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from(["anywhere", "start", "end"]))
        low, high = {"anywhere": (0, len(raw)), "start": (0, 600), "end": (len(raw) - 600, len(raw))}[near]
        raw[data.draw(st.integers(max(low, 0), min(high, len(raw)) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    path.write_bytes(raw)
    refusal = ""
    try:
        with open_volume(path) as volume:
            for z in range(min(volume.info.shape_zyx[0], 5)):
                assert volume.read(z).shape == volume.info.shape_zyx[1:]
    except DendsamError as error:
        refusal = str(error)
    assert refusal == "" or (str(path) in refusal and "\n" not in refusal)


def test_cyclic_chain_that_begins_late_ends(tmp_path):
    """tifffile looks for cycles at page 100 only."""
    path = tmp_path / "stack.tif"
    with tifffile.TiffWriter(path) as writer:
        for _ in range(130):
            writer.write(np.zeros((2, 2), np.uint8), metadata=None, contiguous=False)
    with tifffile.TiffFile(path) as file:
        target, last = file.pages[120].offset, file.pages[129].offset
    entries = struct.unpack("<H", path.read_bytes()[last : last + 2])[0]
    with path.open("r+b") as file:
        file.seek(last + 2 + entries * 12)
        file.write(struct.pack("<I", target))

    with pytest.raises(VolumeError, match="page 130 leads back"):
        open_volume(path)
