"""Folders and files that are this user's alone, and their refusal where they are not."""

from __future__ import annotations

import os
import stat
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dendsam_deploy.durable import exclusive, storage_errors, sync
from dendsam_deploy.errors import MissingCapabilityError, UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LOCK_POLL_S = 0.2

# A link is not followed, and a pipe is not waited for; Windows has none of these flags but the last.
_PLAIN_READ = os.O_RDONLY
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
    _PLAIN_READ |= getattr(os, _flag, 0)


def state_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Return the user's folder for state of this program: outside of every bundle, on a cluster the same everywhere."""
    if platform == "win32" and (local := environment.get("LOCALAPPDATA")):
        return Path(local) / "dendsam-deploy"
    base = environment.get("XDG_STATE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state") / "dendsam-deploy"


def make_private(folder: Path) -> None:
    """Make a folder that is nobody else's, with its parents, or check the one that is there.

    Raises
    ------
    UnsafeFileError
        As `check_private`.
    StorageError
        Where it cannot be made.
    """
    if not os.path.lexists(folder):
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            sync(folder.parent)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Check that a path is a real folder which belongs to this user and which nobody else may enter.

    Raises
    ------
    UnsafeFileError
        Where it is a link, another user's, or open to others.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeFileError(f"{folder}: is a link or a file, expected a folder; delete it")
    _check_owner(folder, found)
    if os.name != "nt" and found.st_mode & 0o077:
        raise UnsafeFileError(
            f"{folder}: others may enter it (mode {stat.S_IMODE(found.st_mode):04o}, expected 0700), and compiled "
            f"engines run as code; run `chmod 700 {folder}` if nobody else could have written there, else delete it"
        )


def _check_owner(path: Path, found: os.stat_result) -> None:
    """Raise where a file is another user's."""
    if os.name != "nt" and found.st_uid != os.geteuid():
        raise UnsafeFileError(
            f"{path}: belongs to the user {found.st_uid}, not to you ({os.geteuid()}); compiled engines run as code: "
            "copy the bundle without its folder engines/"
        )


def read_regular(path: Path, largest: int | None) -> bytes | None:
    """Read a plain file of this user's without following a link; None where there is none, or one that is too large.

    Raises
    ------
    UnsafeFileError
        Where it is a link, a pipe, a folder, or another user's.
    """
    try:
        descriptor = os.open(path, _PLAIN_READ)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnsafeFileError(f"{path}: cannot be opened as a plain file ({error.strerror}); delete it") from error
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UnsafeFileError(f"{path}: is no plain file; delete it")
        _check_owner(path, found)
        return None if largest is not None and found.st_size > largest else stream.read()


@contextmanager
def locked(folder: Path, limit_s: float) -> Iterator[None]:
    """Hold a folder against other processes; wait for one that has it.

    Raises
    ------
    MissingCapabilityError
        Where it still has it after `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while True:
        with exclusive(folder) as is_alone:
            if is_alone:
                yield
                return
        if time.monotonic() > deadline:
            raise MissingCapabilityError(
                f"{folder}: another process has been working there for {limit_s:.0f} s; wait for it or end it, "
                "then run again"
            )
        time.sleep(_LOCK_POLL_S)
