"""What Python's bookkeeping of memory does not cover: memory of others as arrays, addresses, and what never ends."""

from __future__ import annotations

import ctypes
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray


class _Span:
    """Memory, described to numpy; whoever owns it lives as long as its views."""

    def __init__(self, owner: object, address: int, nbytes: int) -> None:
        self.owner = owner
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def view_of_memory(owner: object, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic]:
    """Return host memory as an array.

    Parameters
    ----------
    owner : object
        Kept alive by the array.
    address : int
        Of the first byte.
    shape, dtype
        Of the array.
    """
    kind: np.dtype[np.generic] = np.dtype(dtype)
    nbytes = prod(shape) * kind.itemsize
    if nbytes == 0:
        return np.empty(shape, kind)
    view: NDArray[np.generic] = np.asarray(_Span(owner, address, nbytes)).view(kind).reshape(shape)
    return view


def address_of(array: NDArray[np.generic]) -> int:
    """Return where a contiguous array begins."""
    if not array.flags.c_contiguous:
        raise ValueError(f"an array with the strides {array.strides} has no one place in memory")
    return int(array.__array_interface__["data"][0])


def keep_for_ever(thing: object) -> None:
    """See to it that an object is never destroyed, nor what it refers to: to destroy it would never end."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
