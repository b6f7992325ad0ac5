"""Grey values to 8 bits, against micro-sam's own lines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.volume.intensity import to_uint8


def micro_sam(image):
    """``_to_image`` of micro_sam/util.py for a 2-D input that is not uint8."""
    image = image.astype("float32") - image.min()
    image = image / image.max()
    return (image * 255).astype("uint8")


@given(
    hnp.arrays(
        st.sampled_from([np.dtype(kind) for kind in ("u2", "i2", "u4", "i4", "i8", "f4", "f2")]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
    )
)
@settings(deadline=None, max_examples=200)
def test_equals_micro_sam(image):
    with np.errstate(all="ignore"):
        values = image.astype(np.float32)
        usable = np.isfinite(values).all() and 0 < float((values - image.min()).max()) < np.inf
    if usable:
        np.testing.assert_array_equal(to_uint8(image), micro_sam(image))


def test_worked_example():
    image = np.array([[100, 150], [200, 300]], np.uint16)
    np.testing.assert_array_equal(to_uint8(image), [[0, 63], [127, 255]])


def test_uint8_is_untouched():
    image = np.array([[10, 20]], np.uint8)
    assert to_uint8(image) is image


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_constant_slice_becomes_zeros(dtype):
    np.testing.assert_array_equal(to_uint8(np.full((3, 4), 7, dtype)), np.zeros((3, 4), np.uint8))


def test_bilevel_slice_is_stretched():
    np.testing.assert_array_equal(to_uint8(np.array([[True, False]])), [[255, 0]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_without_a_grey_are_refused(value):
    with pytest.raises(VolumeError, match=r"stack\.tif: slice 3 holds NaN, infinite or too large"):
        to_uint8(np.array([[0.0, value]]), "stack.tif: slice 3")


def test_complex_values_are_refused():
    with pytest.raises(VolumeError, match="complex"):
        to_uint8(np.array([[1j]]))
