"""PNG in and out, and resampling."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.volume.raster import decode_png, encode_png, png_header, resize_bilinear

RNG = np.random.default_rng(4)


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3)])
def test_encoded_png_holds_the_image(shape):
    image = RNG.integers(0, 255, shape, np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image)))), image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_round_trip(dtype, tmp_path):
    image = RNG.integers(0, np.iinfo(dtype).max, (20, 30), dtype)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert png_header(tmp_path / "a.png") == ((20, 30), np.dtype(dtype))
    decoded = decode_png(tmp_path / "a.png")
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, image)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_damaged_png_never_escapes_as_another_exception(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.png"
    raw = bytearray(encode_png(RNG.integers(0, 255, (20, 30), np.uint8)))
    for _ in range(data.draw(st.integers(1, 3))):
        low = data.draw(st.sampled_from([0, 0, 40, len(raw) - 20]))
        raw[data.draw(st.integers(low, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    refusal = ""
    try:
        assert decode_png(path).shape == png_header(path)[0]
    except VolumeError as error:
        refusal = str(error)
    assert refusal == "" or (refusal.startswith(str(path)) and "\n" not in refusal)


def test_resizing_equals_that_of_segment_anything():
    """SAM resizes through torchvision's PIL path, that is Pillow's antialiased bilinear filter."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = RNG.integers(0, 255, (50, 80), np.uint8)
    for shape_hw in ((100, 160), (25, 40), (33, 7)):
        expected = np.asarray(functional.resize(functional.to_pil_image(image), list(shape_hw)))
        np.testing.assert_array_equal(resize_bilinear(image, shape_hw), expected)


def test_resizing_to_the_same_shape_is_free():
    image = RNG.integers(0, 255, (5, 8), np.uint8)
    assert resize_bilinear(image, (5, 8)) is image
