"""TIFF files that are no volume, and files that are no TIFF although their name says so."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

RNG = np.random.default_rng(7)
STACK = RNG.integers(1, 200, (4, 40, 30), np.uint8)


def patch(path, position, data):
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)
    return path


def cut(path, keep: float):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def overwrite_tag(path, page: int, code: int, value: int):
    """Give a numeric tag that is stored inside the directory of a page another value."""
    with tifffile.TiffFile(path) as file:
        position = file.pages[page].tags[code].valueoffset
    return patch(path, position, struct.pack("<H", value) if value < 2**16 else struct.pack("<I", value))


def stack(path, data: np.ndarray = STACK, **options: object):
    tifffile.imwrite(path, data, photometric="minisblack", **options)
    return path


def missing(folder):
    return folder / "nothing.tif"


def empty_file(folder):
    (folder / "v.tif").touch()
    return folder / "v.tif"


def text_file(folder):
    (folder / "v.tif").write_text("z,y,x\n1,2,3\n")
    return folder / "v.tif"


def html_error_page(folder):
    (folder / "v.tif").write_text("<!DOCTYPE html><html><body>404</body></html>")
    return folder / "v.tif"


def binary_noise(folder):
    (folder / "v.tif").write_bytes(bytes(range(256)))
    return folder / "v.tif"


def jpeg(folder):
    Image.fromarray(STACK[0]).save(folder / "v.jpg")
    return folder / "v.jpg"


def hdf5(folder):
    (folder / "v.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    return folder / "v.h5"


def numpy_file(folder):
    np.save(folder / "v.npy", STACK)
    return folder / "v.npy"


def tiff_header_only(folder):
    (folder / "v.tif").write_bytes(b"II*\0\x08\0\0\0")
    return folder / "v.tif"


def tiff_four_bytes(folder):
    (folder / "v.tif").write_bytes(b"II*\0")
    return folder / "v.tif"


def tiff_no_pages(folder):
    (folder / "v.tif").write_bytes(b"II*\0" + bytes(20))
    return folder / "v.tif"


def tiff_cut_in_last_page(folder):
    return cut(stack(folder / "v.tif", metadata=None), 0.95)


def tiff_cut_in_middle(folder):
    return cut(stack(folder / "v.tif", metadata=None, contiguous=False), 0.5)


def tiff_cut_imagej(folder):
    return cut(stack(folder / "v.tif", imagej=True), 0.5)


def tiff_cut_shaped(folder):
    return cut(stack(folder / "v.tif", compression="zlib"), 0.6)


def tiff_cut_ome(folder):
    return cut(stack(folder / "v.ome.tif", compression="zlib"), 0.6)


def tiff_cut_bigtiff(folder):
    return cut(stack(folder / "v.tif", bigtiff=True, metadata=None), 0.7)


def tiff_cut_tiled(folder):
    return cut(stack(folder / "v.tif", tile=(16, 16), metadata=None), 0.8)


def tiff_data_beyond_end(folder):
    """The chain of directories is whole although data are missing, as in files whose directories come first."""
    path = stack(folder / "v.tif", metadata=None, contiguous=False)
    return overwrite_tag(path, 3, 273, path.stat().st_size - 10)


def tiff_fewer_pages_than_imagej_says(folder):
    path = folder / "v.tif"
    with tifffile.TiffWriter(path) as writer:
        for z in range(4):
            description = "ImageJ=1.53t\nimages=9\nslices=9\nunit=nm\n" if z == 0 else None
            writer.write(STACK[z], description=description, metadata=None, compression="zlib", contiguous=False)
    return path


def tiff_fewer_pages_than_shape_says(folder):
    path = folder / "v.tif"
    with tifffile.TiffWriter(path) as writer:
        for z in range(4):
            writer.write(
                STACK[z], description='{"shape": [7, 40, 30]}' if z == 0 else None, metadata=None, contiguous=False
            )
    return path


def tiff_circular(folder):
    path = stack(folder / "v.tif", metadata=None, contiguous=False)
    with tifffile.TiffFile(path) as file:
        first, last = file.pages[0].offset, file.pages[3].offset
    entries = struct.unpack("<H", path.read_bytes()[last : last + 2])[0]
    return patch(path, last + 2 + entries * 12, struct.pack("<I", first))


def tiff_rgb(folder):
    tifffile.imwrite(folder / "v.tif", np.zeros((4, 40, 30, 3), np.uint8), photometric="rgb")
    return folder / "v.tif"


def tiff_rgba(folder):
    tifffile.imwrite(folder / "v.tif", np.zeros((40, 30, 4), np.uint8), photometric="rgb", extrasamples=["unassalpha"])
    return folder / "v.tif"


def tiff_rgb_planar(folder):
    tifffile.imwrite(folder / "v.tif", np.zeros((3, 40, 30), np.uint8), photometric="rgb", planarconfig="separate")
    return folder / "v.tif"


def tiff_rgb_on_page_two(folder):
    with tifffile.TiffWriter(folder / "v.tif") as writer:
        writer.write(STACK[0], metadata=None)
        writer.write(np.zeros((40, 30, 3), np.uint8), photometric="rgb", metadata=None)
    return folder / "v.tif"


def tiff_channels(folder):
    return stack(folder / "v.tif", np.zeros((4, 3, 40, 30), np.uint8), imagej=True, metadata={"axes": "ZCYX"})


def tiff_composite(folder):
    return stack(folder / "v.tif", imagej=True, metadata={"axes": "CYX", "mode": "composite"})


def tiff_ome_named_channels(folder):
    return stack(folder / "v.ome.tif", metadata={"axes": "CYX", "Channel": {"Name": ["a", "b", "c", "d"]}})


def tiff_time_series(folder):
    return stack(folder / "v.tif", imagej=True, metadata={"axes": "TYX"})


def tiff_ome_channels(folder):
    return stack(folder / "v.ome.tif", np.zeros((2, 4, 40, 30), np.uint8), metadata={"axes": "CZYX"})


def tiff_ome_two_images(folder):
    with tifffile.TiffWriter(folder / "v.ome.tif") as writer:
        writer.write(STACK, photometric="minisblack", metadata={"axes": "ZYX"})
        writer.write(STACK[:2], photometric="minisblack", metadata={"axes": "ZYX"})
    return folder / "v.ome.tif"


def tiff_ome_missing_plane(folder):
    path = folder / "v.ome.tif"
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYZCT" Type="uint8" SizeX="30" SizeY="40" SizeZ="5" SizeC="1" SizeT="1">'
        '<Channel ID="Channel:0:0" SamplesPerPixel="1"/><TiffData IFD="0" FirstZ="0" PlaneCount="4"/>'
        "</Pixels></Image></OME>"
    )
    with tifffile.TiffWriter(path) as writer:
        for z in range(4):
            writer.write(STACK[z], description=xml if z == 0 else None, metadata=None, contiguous=False)
    return path


def tiff_ome_broken_xml(folder):
    path = stack(folder / "v.ome.tif")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"<Pixels", b"<Pix<ls"))
    return path


def tiff_mixed_sizes(folder):
    with tifffile.TiffWriter(folder / "v.tif") as writer:
        for z in range(3):
            writer.write(STACK[z], metadata=None)
        writer.write(STACK[3, :20], metadata=None)
    return folder / "v.tif"


def tiff_mixed_size_in_the_middle(folder):
    with tifffile.TiffWriter(folder / "v.tif") as writer:
        for z in range(30):
            writer.write(STACK[0, :, : 29 if z == 13 else 30], metadata=None)
    return folder / "v.tif"


def tiff_mixed_types(folder):
    with tifffile.TiffWriter(folder / "v.tif") as writer:
        writer.write(STACK[0])
        writer.write(STACK[1].astype(np.uint16))
    return folder / "v.tif"


def tiff_complex(folder):
    return stack(folder / "v.tif", STACK.astype(np.complex64))


def tiff_nan(folder):
    data = STACK.astype(np.float32)
    data[2, 5, 5] = np.nan
    return stack(folder / "v.tif", data)


def tiff_infinite(folder):
    data = STACK.astype(np.float64)
    data[3, 0, 0] = np.inf
    return stack(folder / "v.tif", data)


def tiff_unknown_compression(folder):
    return overwrite_tag(stack(folder / "v.tif", compression="zlib"), 0, 259, 9999)


def tiff_damaged_data(folder):
    path = stack(folder / "v.tif", compression="zlib", metadata=None)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[2].dataoffsets[0]
    return patch(path, offset + 5, bytes(60))


def tiff_damaged_lzw(folder):
    path = stack(folder / "v.tif", compression="lzw", metadata=None)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[1].dataoffsets[0]
    return patch(path, offset, b"\xff" * 100)


def tiff_zero_width(folder):
    return overwrite_tag(stack(folder / "v.tif", metadata=None), 0, 256, 0)


def tiff_absurd_size(folder):
    path = stack(folder / "v.tif", STACK[0], metadata=None, compression="zlib")
    overwrite_tag(path, 0, 256, 60000)
    return overwrite_tag(path, 0, 257, 60000)


def tiff_bomb(folder):
    """One strip that claims to be 60,000 rows of 60,000 pixels."""
    path = stack(folder / "v.tif", STACK[0], metadata=None, compression="zlib", rowsperstrip=40)
    for code in (256, 257, 278):
        overwrite_tag(path, 0, code, 60000)
    return path


def tiff_zero_strip_length(folder):
    return overwrite_tag(stack(folder / "v.tif", STACK[0], metadata=None, compression="zlib"), 0, 279, 0)


def tiff_strip_too_short(folder):
    return overwrite_tag(stack(folder / "v.tif", STACK[0], metadata=None), 0, 279, 100)


def tiff_imagej_pseudo_stack_cut(folder):
    path = stack(folder / "v.tif", STACK[0], metadata=None, description="ImageJ=1.53t\nimages=4\nslices=4\n")
    with path.open("ab") as file:
        file.write(STACK[1:3].tobytes())
    return path


BAD = {
    missing: ["does not exist"],
    empty_file: ["is empty"],
    text_file: ["is a text file", "expected a TIFF stack"],
    html_error_page: ["is a text file"],
    binary_noise: ["no image of a known kind"],
    jpeg: ["JPEG"],
    hdf5: ["HDF5"],
    numpy_file: ["numpy array"],
    tiff_header_only: ["is cut"],
    tiff_four_bytes: ["is cut"],
    tiff_no_pages: ["without pages"],
    tiff_cut_in_last_page: ["is cut"],
    tiff_cut_in_middle: ["is cut"],
    tiff_cut_imagej: ["cut"],
    tiff_cut_shaped: ["cut"],
    tiff_cut_ome: ["cut"],
    tiff_cut_bigtiff: ["cut"],
    tiff_cut_tiled: ["cut"],
    tiff_data_beyond_end: ["cut", "slice 3"],
    tiff_fewer_pages_than_imagej_says: ["speaks of 9 images", "holds 4"],
    tiff_fewer_pages_than_shape_says: ["speaks of 7 images", "holds 4"],
    tiff_circular: ["leads back"],
    tiff_rgb: ["3 samples per pixel", "RGB"],
    tiff_rgba: ["4 samples per pixel"],
    tiff_rgb_planar: ["3 samples per pixel"],
    tiff_rgb_on_page_two: ["3 samples per pixel"],
    tiff_channels: ["axes ZCYX", "one channel"],
    tiff_composite: ["axes CYX"],
    tiff_ome_named_channels: ["axes CYX"],
    tiff_time_series: ["axes TYX"],
    tiff_ome_channels: ["axes CZYX"],
    tiff_ome_two_images: ["holds 2 images", "4 x 40 x 30", "2 x 40 x 30"],
    tiff_ome_missing_plane: ["slice 4 of 5"],
    tiff_ome_broken_xml: ["OME-XML"],
    tiff_mixed_sizes: ["page 3 is 20 x 30", "40 x 30"],
    tiff_mixed_size_in_the_middle: ["page 13 is 40 x 29"],
    tiff_mixed_types: ["page 1", "uint16", "uint8"],
    tiff_complex: ["complex"],
    tiff_nan: ["slice 2", "NaN"],
    tiff_infinite: ["slice 3", "infinite"],
    tiff_unknown_compression: ["unknown compression 9999"],
    tiff_damaged_data: ["slice 2", "damaged"],
    tiff_damaged_lzw: ["slice 1", "damaged"],
    tiff_zero_width: [],
    tiff_absurd_size: [],
    tiff_bomb: ["stored bytes claim to hold"],
    tiff_zero_strip_length: [],
    tiff_strip_too_short: [],
    tiff_imagej_pseudo_stack_cut: ["cut"],
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_file_is_refused_in_one_line_that_names_it(make, tmp_path, assert_refused):
    assert_refused(make(tmp_path), BAD[make])
