"""Memory that is not Python's: seen as arrays while its owner lives, and kept for ever where that is asked for."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from dendsam_deploy.runtimes.foreign_memory import address_of, keep_for_ever, view_of_memory


class Owner:
    """Of whom only the life is of interest."""


def test_memory_is_seen_as_an_array_that_keeps_its_owner_alive() -> None:
    memory = np.arange(12, dtype=np.float32)
    owner = Owner()
    alive = weakref.ref(owner)
    address = memory.__array_interface__["data"][0]
    view = view_of_memory(owner, address, (3, 4), np.float32)
    part = view[1:]
    view[2, 3] = 99
    assert memory[11] == 99
    assert (view.shape, view.dtype, view.flags.writeable, view.flags.c_contiguous) == ((3, 4), np.float32, True, True)
    del owner, view
    gc.collect()
    assert alive() is not None
    del part
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2)])
def test_an_empty_view_touches_no_memory(shape: tuple[int, ...]) -> None:
    assert view_of_memory(None, 0, shape, np.int64).shape == shape


def test_an_address_is_that_of_the_first_element() -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert address_of(array[1:]) - address_of(array) == 8
    with pytest.raises(ValueError, match="no one place in memory"):
        address_of(array[:, 1:])


def test_what_is_kept_for_ever_outlives_everybody_who_refers_to_it() -> None:
    lost, ordinary = Owner(), Owner()
    references = [weakref.ref(thing) for thing in (lost, ordinary)]
    keep_for_ever(lost)
    del lost, ordinary
    gc.collect()
    assert [reference() is None for reference in references] == [False, True]
