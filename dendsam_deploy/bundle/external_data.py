"""Which files an ONNX graph would open besides its own, found without any ONNX library.

An engine that loads a graph opens every file that the graph names as *external data*, wherever it lies. The names are
therefore read before an engine sees the file. Only the skeleton of the protocol buffer is walked; weights are skipped,
so that gigabytes take milliseconds.

References
----------
Field numbers: ``onnx/onnx.proto3`` in github.com/onnx/onnx. Wire format: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from dendsam_deploy.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Message -> field number -> message: every way by which a model can hold a tensor.
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}


def external_data_locations(onnx_file: Path) -> frozenset[str]:
    """Return the locations that a graph's tensors refer to, as written in the file.

    Parameters
    ----------
    onnx_file : Path
        The graph.

    Raises
    ------
    BundleError
        Where the file is not a well-formed protocol buffer.
    """
    try:
        with onnx_file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return frozenset(_locations(data))
    except (ValueError, IndexError) as error:
        raise BundleError(f"{onnx_file}: not an ONNX file ({error}); export the bundle again") from error


def _locations(data: mmap.mmap) -> Iterator[str]:
    """Yield the ``location`` entries of all tensors in a model."""
    pending = [("Model", 0, len(data))]
    while pending:
        message, start, end = pending.pop()
        for number, first, last in _fields(data, start, end):
            child = _CHILDREN[message].get(number)
            if child == "Entry":
                entry = {key: data[a:b] for key, a, b in _fields(data, first, last)}
                if entry.get(1) == b"location":
                    yield entry.get(2, b"").decode()
            elif child is not None:
                pending.append((child, first, last))


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(field number, start, end)`` of the length-delimited fields of one message; skip the others."""
    position = start
    while position < end:
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            _, position = _varint(data, position)
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        elif wire_type == 2:
            length, position = _varint(data, position)
            if position + length > end:
                raise ValueError(f"a field of {length} bytes reaches beyond its message")
            yield number, position, position + length
            position += length
        else:
            raise ValueError(f"unknown wire type {wire_type}")
    if position > end:
        raise ValueError("a number reaches beyond its message")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """Return a variable-length integer and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than ten bytes")
