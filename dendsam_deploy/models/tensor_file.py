"""Reads the files that ``torch.save`` writes, in its present and its older format, without torch and as data.

What the pickle says is read by `models.inert_pickle`; tensors appear in it as `StoredTensor`, a place in the file, and
are read one by one on request. Every place is checked against the file before memory is taken for it.

References
----------
``torch.serialization`` of PyTorch: a zip archive with ``data.pkl`` and ``data/KEY``, or, before version 1.6, a sequence
of pickles followed by the storages.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

import numpy as np

from dendsam_deploy.errors import CheckpointError
from dendsam_deploy.models.inert_pickle import (
    LARGEST_PICKLE_BYTES,
    BoundedStream,
    PickleError,
    Unpickled,
    read_pickle,
)
from dendsam_deploy.models.pickled_names import check_names
from dendsam_deploy.models.stored_tensor import ITEM_BYTES, REBUILD, Storage, StoredTensor, stored_storage, view

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC, _PICKLE_PROTOCOLS = 0x80, range(2, 6)
_CHUNK_BYTES = 1 << 22


class Records(Protocol):
    """Where storages are read from."""

    def read(self, key: str, size: int) -> NDArray[np.uint8]:
        """Read the first `size` bytes of a storage."""


@dataclass(slots=True)
class TensorFile:
    """An open checkpoint.

    Parameters
    ----------
    path : Path
        Where it is.
    pickled : Unpickled
        What its pickle says.
    is_torch : bool
        Whether torch wrote it. A bare pickle is read for the names in it only.
    records : Records
        Where its storages are.
    """

    path: Path
    pickled: Unpickled
    is_torch: bool
    records: Records
    _read: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def array(self, tensor: StoredTensor) -> NDArray[Any]:
        """Read a tensor.

        Returns
        -------
        ndarray, the tensor's shape
            A view of what was read of its storage; bfloat16, which NumPy lacks, as float32.

        Raises
        ------
        CheckpointError
            Where the storage is missing, shorter than the tensor says, or damaged.
        """
        storage = tensor.storage
        with _damage(self.path):
            if storage.key not in self._read:
                needed = storage.size * ITEM_BYTES[storage.dtype]
                # Storages that overlap in the file could ask for far more memory than it has bytes.
                if sum(map(len, self._read.values())) + needed > self.path.stat().st_size:
                    raise PickleError("its tensors are larger than the file")
                self._read[storage.key] = self.records.read(storage.key, needed)
            return view(self._read[storage.key], tensor)


@contextmanager
def open_tensor_file(path: Path) -> Iterator[TensorFile]:
    """Open a checkpoint and read what its pickle says; nothing that it names is imported or called.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, cut off, damaged, or no pickle at all.
    UnsafeFileError
        If it is damaged, and names what no weights need before it breaks off.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: {found}; give the path of a checkpoint (.pt or .pth)")
    with ExitStack() as closing:
        try:
            file = closing.enter_context(path.open("rb"))
            size = path.stat().st_size
            is_archive = file.read(4) == _ZIP_MAGIC
            file.seek(0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        if size == 0:
            raise CheckpointError(f"{path}: the file is empty; download or copy it again")
        if is_archive:
            seen: set[str] = set()
            with _damage(path, seen):
                archive = _Archive(closing.enter_context(zipfile.ZipFile(file)), size, seen)
                opened = TensorFile(path, archive.pickled(), is_torch=True, records=archive)
        else:
            opened = _sequence(path, file, size)
        yield opened


def looks_like_checkpoint(path: Path) -> bool:
    """Tell from its first bytes and its list of contents whether a file is one of torch's, or a pickle."""
    try:
        with path.open("rb") as file:
            first = file.read(4)
        if first == _ZIP_MAGIC:
            with zipfile.ZipFile(path) as archive:
                return any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
    return len(first) > 1 and first[0] == _PICKLE_MAGIC and first[1] in _PICKLE_PROTOCOLS


def pickled_names(path: Path) -> frozenset[str]:
    """Return every ``module.name`` that unpickling a checkpoint would look up.

    Parameters
    ----------
    path : Path
        A file of ``torch.save``, in its present or its older format, or a bare pickle.

    Returns
    -------
    frozenset of str
        Modules and names of Python 2 under their present names. What the pickle would take from the extension registry
        appears as ``copyreg.extension_CODE``, what it would look up in another object as ``module.name.attribute``.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, cut off or no pickle at all.
    """
    with open_tensor_file(path) as file:
        return file.pickled.names


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Archive:
    """The zip archive that torch writes since 1.6."""

    def __init__(self, archive: zipfile.ZipFile, size: int, seen: set[str]) -> None:
        self._archive = archive
        self._size = size
        self._seen = seen
        found = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1:
            raise PickleError(f"an archive with {len(found)} files data.pkl")
        self._root = found[0].removesuffix("data.pkl")

    def pickled(self) -> Unpickled:
        """Read the pickle."""
        order = f"{self._root}byteorder"
        if order in self._archive.namelist():
            _check_byte_order(self._content(order, 16) == b"little")
        member = self._member(f"{self._root}data.pkl", LARGEST_PICKLE_BYTES)
        with self._archive.open(member) as file:
            stream = BoundedStream(cast("BinaryIO", file), member.file_size)
            found = read_pickle(stream, REBUILD, stored_storage, self._seen)
            while file.read(_CHUNK_BYTES):  # to the end, where the checksum is compared
                pass
        return found

    def read(self, key: str, size: int) -> NDArray[np.uint8]:
        """Read the first `size` bytes of a storage, which are all, and compare their checksum."""
        member = self._member(f"{self._root}data/{key}", self._size)
        if member.file_size < size:
            raise PickleError(f"the storage {key} has {member.file_size:,} bytes, expected {size:,}")
        data, filled = np.empty(member.file_size, np.uint8), 0
        with self._archive.open(member) as file:
            while chunk := file.read(_CHUNK_BYTES):
                data[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
                filled += len(chunk)
        if filled < len(data):
            raise PickleError(f"the storage {key} ends early")
        return data[:size]

    def _content(self, name: str, largest: int) -> bytes:
        return self._archive.read(self._member(name, largest))

    def _member(self, name: str, largest: int) -> zipfile.ZipInfo:
        member = self._archive.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise PickleError(f"{name} is compressed, which torch never does")
        if member.file_size > min(largest, self._size):
            raise PickleError(f"{name} has {member.file_size:,} bytes")
        return member


@dataclass(frozen=True, slots=True)
class _Sequence:
    """The storages behind the pickles of the older format: their first byte, and how many they have."""

    file: BinaryIO
    places: dict[str, tuple[int, int]]

    def read(self, key: str, size: int) -> NDArray[np.uint8]:
        """Read the first `size` bytes of a storage, which are all."""
        start, available = self.places[key]
        if available != size:
            raise PickleError(f"the storage {key} has {available:,} bytes, expected {size:,}")
        self.file.seek(start)
        return np.frombuffer(bytearray(self.file.read(size)), np.uint8)


def _sequence(path: Path, file: BinaryIO, size: int) -> TensorFile:
    """Read the older format, or a bare pickle, of which the names are all that counts."""
    seen: set[str] = set()
    try:
        first = read_pickle(BoundedStream(file, min(size, LARGEST_PICKLE_BYTES)), REBUILD, stored_storage, seen)
    except PickleError as error:
        check_names(path, seen)
        raise CheckpointError(f"{path}: not a torch checkpoint ({error}); give a .pt or .pth file") from error
    if first.value != _LEGACY_MAGIC:
        return TensorFile(path, first, is_torch=False, records=_Sequence(file, {}))
    known: dict[str, Storage] = {}

    def remember(identifier: object) -> object:
        found = stored_storage(identifier)
        if isinstance(found, Storage):
            known[found.key] = found
        return found

    with _damage(path, seen):
        parts = [read_pickle(BoundedStream(file, LARGEST_PICKLE_BYTES), REBUILD, remember, seen) for _ in range(4)]
        _, system, content, keys = parts
        if isinstance(system.value, dict):
            _check_byte_order(system.value.get("little_endian") is True)
        calls = frozenset[str]().union(*(part.calls for part in (first, *parts)))
        records = _Sequence(file, _places(file, [known[key] for key in cast("list[str]", keys.value)], size))
    return TensorFile(path, Unpickled(content.value, frozenset(seen), calls), True, records)


def _places(file: BinaryIO, storages: list[Storage], size: int) -> dict[str, tuple[int, int]]:
    """Return the first byte of every storage and its length in bytes; each is led by its number of elements."""
    places = {}
    for storage in storages:
        (count,) = struct.unpack("<q", file.read(8))
        start, length = file.tell(), count * ITEM_BYTES[storage.dtype]
        if count < 0 or start + length > size:
            raise PickleError(f"the storage {storage.key} has {count:,} numbers")
        places[storage.key] = (start, length)
        file.seek(start + length)
    return places


def _check_byte_order(is_little: bool) -> None:
    if is_little != (sys.byteorder == "little"):
        raise PickleError("its numbers are in the byte order of another machine")


@contextmanager
def _damage(path: Path, seen: Iterable[str] = ()) -> Iterator[None]:
    """Turn everything that a damaged file leads to into one sentence, unless it named something worse before."""
    try:
        yield
    # The first line: what this file and zipfile raise on purpose; the second: what damaged numbers lead to.
    except (
        *(PickleError, zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError, OSError),
        *(ValueError, TypeError, ArithmeticError, MemoryError, struct.error, UnicodeDecodeError),
    ) as error:
        check_names(path, seen)
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: the checkpoint is cut off or damaged ({path.stat().st_size:,} bytes); "
            f"download or copy it again ({reason})"
        ) from error
