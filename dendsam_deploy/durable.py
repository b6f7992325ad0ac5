"""Files that are either whole and on the disk or not there at all."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dendsam_deploy.errors import InvalidArgumentError, StorageError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name on a clean exit: flushed, renamed, and the folder flushed.

    Raises
    ------
    StorageError
        Where the file system refuses; nothing is left behind then, and an older file of that name stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        try:
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that readers, and a power failure, see either the old content or the new."""
    with published(path) as stream:
        stream.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk."""
    with storage_errors(path), path.open("ab") as stream:
        stream.write(line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def prepare_place(path: Path) -> None:
    """Find out before long work, not behind it, that a file cannot be written; missing parents are made.

    Raises
    ------
    InvalidArgumentError
        If the path is a folder.
    StorageError
        If its folder cannot be made.
    """
    if path.is_dir():
        raise InvalidArgumentError(f"{path}: is a folder; name the file to write")
    make_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, and its parents where they are missing, and flush its name to the disk."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        sync(path.parent)


@contextmanager
def exclusive(folder: Path) -> Iterator[bool]:
    """Try to lock a folder against other processes of this program; the lock ends with the process at the latest.

    Yields
    ------
    bool
        Whether the folder is ours now. True as well where the system or the file system knows no such locks.
    """
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        except OSError as error:
            is_alone = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        yield is_alone
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file, or a folder: the names in it, not the content of its files."""
    if os.name == "nt":  # where a folder cannot be opened, and a rename is durable by itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the refusal of a write into a `StorageError` that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "free space there or choose another place, then run the same command again"
        ) from error
