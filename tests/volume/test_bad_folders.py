"""PNG images and folders of slices that are no volume."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

RNG = np.random.default_rng(7)
STACK = RNG.integers(1, 200, (4, 40, 30), np.uint8)


def cut(path, keep: float):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def png_rgb(folder):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "v.png")
    return folder / "v.png"


def png_palette(folder):
    Image.fromarray(STACK[0]).convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "v.png")
    return folder / "v.png"


def png_cut(folder):
    Image.fromarray(STACK[0]).save(folder / "v.png")
    return cut(folder / "v.png", 0.6)


def png_header_only(folder):
    (folder / "v.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder / "v.png"


def png_bomb(folder):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**30, 2**30, 8, 0, 0, 0, 0))
    body = header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (folder / "v.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return folder / "v.png"


def slices(folder, names: list[str], images: dict[str, np.ndarray] | None = None):
    for name in names:
        image = (images or {}).get(name, STACK[0])
        if name.endswith("png"):
            Image.fromarray(image).save(folder / name)
        else:
            tifffile.imwrite(folder / name, image, photometric="minisblack")
    return folder


def folder_empty(folder):
    return folder


def folder_of_other_files(folder):
    (folder / "notes.txt").write_text("x")
    (folder / "._s1.tif").write_bytes(b"\0")
    return folder


def folder_mixed_kinds(folder):
    return slices(folder, ["s1.png", "s2.tif"])


def folder_mixed_sizes(folder):
    return slices(folder, ["s1.png", "s2.png", "s3.png"], {"s3.png": STACK[0, :20]})


def folder_mixed_types(folder):
    return slices(folder, ["s1.tif", "s2.tif"], {"s2.tif": STACK[0].astype(np.uint16)})


def folder_gap(folder):
    return slices(folder, ["s08.png", "s09.png", "s11.png"])


def folder_gap_beside_a_position(folder):
    return slices(folder, ["s1_z0.png", "s2_z15.png", "s4_z45.png"])


def folder_gap_of_tens(folder):
    return slices(folder, ["s0.png", "s10.png", "s20.png", "s40.png"])


def folder_doubled_number(folder):
    return slices(folder, ["s1.png", "s01.png", "s2.png"])


def folder_stray(folder):
    return slices(folder, ["s1.png", "s2.png", "s3.png", "overview.png"])


def folder_cut_slice(folder):
    slices(folder, ["s1.png", "s2.png"])
    cut(folder / "s2.png", 0.5)
    return folder


def folder_empty_slice(folder):
    slices(folder, ["s1.tif", "s2.tif"])
    (folder / "s2.tif").write_bytes(b"")
    return folder


def folder_text_slice(folder):
    slices(folder, ["s1.tif"])
    (folder / "s2.tif").write_text("oops, not an image at all")
    return folder


def folder_of_stacks(folder):
    return slices(folder, ["s1.tif", "s2.tif"], {"s1.tif": STACK, "s2.tif": STACK})


def folder_nan(folder):
    image = np.full((5, 5), np.nan, np.float32)
    return slices(folder, ["s1.tif", "s2.tif"], {"s1.tif": np.zeros_like(image), "s2.tif": image})


BAD = {
    png_rgb: ["in colour", "RGB"],
    png_palette: ["in colour"],
    png_cut: ["truncated"],
    png_header_only: ["PNG"],
    png_bomb: ["claims the shape"],
    folder_empty: ["holds no slices"],
    folder_of_other_files: ["holds no slices"],
    folder_mixed_kinds: ["1 PNG and 1 TIFF"],
    folder_mixed_sizes: ["s3.png", "20 x 30", "40 x 30"],
    folder_mixed_types: ["s2.tif", "uint16", "uint8"],
    folder_gap: ["number 10 is missing", "s09.png", "s11.png"],
    folder_gap_beside_a_position: ["number 3 is missing", "s2_z15.png", "s4_z45.png"],
    folder_gap_of_tens: ["number 30 is missing"],
    folder_doubled_number: ["same number"],
    folder_stray: ["overview.png", "does not fit"],
    folder_cut_slice: ["s2.png"],
    folder_empty_slice: ["s2.tif", "is empty"],
    folder_text_slice: ["s2.tif"],
    folder_of_stacks: ["s1.tif", "holds 4 slices"],
    folder_nan: ["slice 1", "NaN"],
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_folder_is_refused_in_one_line_that_names_it(make, tmp_path, assert_refused):
    assert_refused(make(tmp_path), BAD[make])
