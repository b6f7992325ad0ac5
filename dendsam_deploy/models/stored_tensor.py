"""Tensors as a checkpoint's pickle describes them: where their numbers are in the file, and in which shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.models.inert_pickle import PickleError, Rebuild
from dendsam_deploy.models.inert_values import Name, Placeholder

if TYPE_CHECKING:
    from numpy.typing import NDArray

ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
    "complex128": 16,
}
"""Bytes of one element, by torch's name of its type."""

_STORAGE_TYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}
_DTYPES = {f"torch.{name}": name for name in ITEM_BYTES} | {
    "torch.float": "float32",
    "torch.double": "float64",
    "torch.half": "float16",
    "torch.long": "int64",
}
_MOST_AXES = 32

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Ends of the names of tensors that normalisation layers keep and no training adjusts."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers in the file, which one or more tensors show.

    Parameters
    ----------
    key : str
        Its name in the file.
    dtype : str
        torch's name of the type of its elements.
    size : int
        Elements.
    """

    key: str
    dtype: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Parameters
    ----------
    storage : Storage
        What it shows.
    dtype : str
        torch's name of the type of its elements.
    offset : int
        Its first element in the storage.
    shape, stride : tuple of int
        Length of each axis, and its step, in elements.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def view(stored: NDArray[np.uint8], tensor: StoredTensor) -> NDArray[Any]:
    """Return a tensor as a view of the bytes of its storage; bfloat16, which NumPy lacks, as float32.

    Raises
    ------
    PickleError
        Where it reaches beyond them.
    """
    width = ITEM_BYTES[tensor.dtype]
    count = len(stored) // width
    is_bfloat16 = tensor.dtype == "bfloat16"
    kind = np.dtype("uint16" if is_bfloat16 else tensor.dtype)
    if tensor.size == 0:
        return np.empty(tensor.shape, np.float32 if is_bfloat16 else kind)
    last = tensor.offset + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=True))
    if last >= count:
        raise PickleError(f"a tensor of shape {tensor.shape} reaches beyond the {count} numbers of its storage")
    numbers = stored[: count * width].view(kind)[tensor.offset :]
    found = np.lib.stride_tricks.as_strided(numbers, tensor.shape, tuple(step * width for step in tensor.stride))
    # It is the upper half of a float32.
    return (found.astype(np.uint32) << 16).view(np.float32) if is_bfloat16 else found


def stored_storage(identifier: object) -> object:
    """Return the storage that a persistent identifier names; a placeholder for anything else."""
    if isinstance(identifier, tuple) and len(identifier) >= 5 and identifier[0] == "storage":
        _, kind, key, _, size = identifier[:5]
        dtype = _STORAGE_TYPES.get(kind.dotted) if isinstance(kind, Name) else None
        if dtype is not None and isinstance(key, str) and _is_count(size):
            return Storage(key, dtype, size)
    return Placeholder("persistent", identifier)


def _tensor(storage: object, offset: object, shape: object, stride: object, *rest: object) -> object:
    """Do as ``torch._utils._rebuild_tensor_v2``."""
    if not isinstance(storage, Storage):
        return Placeholder("torch.Tensor", (storage, offset, shape, stride, *rest))
    return _checked(storage, storage.dtype, (offset, shape, stride))


def _typed_tensor(*arguments: object) -> object:
    """Do as ``torch._utils._rebuild_tensor_v3``, whose storage has no type of its own."""
    storage, offset, shape, stride, _, _, dtype, *_ = arguments
    known = _DTYPES.get(dtype.dotted) if isinstance(dtype, Name) else None
    if not isinstance(storage, Storage) or known is None:
        return Placeholder("torch.Tensor", arguments)
    return _checked(storage, known, (offset, shape, stride))


def _checked(storage: Storage, dtype: str, layout: tuple[object, object, object]) -> StoredTensor:
    offset, shape, stride = layout
    if (
        isinstance(offset, int)
        and _is_count(offset)
        and isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride) <= _MOST_AXES
        and all(map(_is_count, (*shape, *stride)))
    ):
        return StoredTensor(storage, dtype, offset, shape, stride)
    raise PickleError("a tensor of impossible shape")


def _first(value: object, *rest: object) -> object:
    """Take the tensor out of a parameter; what else it has belongs to training."""
    return value


def _of_type(function: object, kind: object, arguments: object, *rest: object) -> object:
    """Do as ``torch._tensor._rebuild_from_type_v2``, which wraps tensors that bear attributes."""
    make = REBUILD.get(function.dotted) if isinstance(function, Name) else None
    if make is None or make is _of_type or not isinstance(arguments, tuple):
        return Placeholder("torch.Tensor", arguments)
    return make(*arguments)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


REBUILD: Rebuild = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _first,
    "torch.device": _first,
}
"""What a checkpoint calls to put its tensors together, and what is done instead."""
