"""Fetches known weights into the cache: resumable, checked, one process at a time; home of ``pooch`` and ``requests``.

What has arrived of a file is kept beside it as ``.NAME.part`` until the file is whole, so that a broken transfer goes
on where it stopped, in the same call or in a later one. Pooch compares the digest and gives the file its name.

References
----------
RFC 9110, sections 13.1.5 (If-Range) and 14 (Range). Zenodo: developers.zenodo.org, the records' ``files``.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pooch
import requests

from dendsam_deploy.durable import exclusive, make_folder, storage_errors, write_text
from dendsam_deploy.errors import (
    CheckpointError,
    DendsamError,
    IncompleteRunError,
    MissingCapabilityError,
    StorageError,
)
from dendsam_deploy.models.tensor_file import looks_like_checkpoint, sha256_of
from dendsam_deploy.progress import Progress, no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dendsam_deploy.models.named_weights import KnownWeights
    from dendsam_deploy.progress import ProgressCallback

_CHUNK_BYTES = 1 << 18
_TIMEOUT_S = (15, 60)  # to connect, and between two packets
_LOCK_POLL_S = 0.5
_SUFFIXES = (".pt", ".pth")
_TRY_AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """How to fetch.

    Parameters
    ----------
    mirror : str
        Address of a folder that has the files by their names in the registry; empty for the published places.
    zenodo : str
        Address of Zenodo.
    pauses_s : tuple of float
        How long to wait before each further attempt after the transfer broke.
    tell : callable
        Is told what happens.
    progress : callable
        Is shown how far it is.
    """

    mirror: str = ""
    zenodo: str = "https://zenodo.org"
    pauses_s: tuple[float, ...] = (1, 2, 4, 8)
    tell: Callable[[str], None] = lambda sentence: None
    progress: ProgressCallback = no_progress


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file is fetched from, and the digest that it must have; empty where none is published."""

    url: str
    digest: str
    licence: str


def fetch(entry: KnownWeights, folder: Path, options: DownloadOptions) -> Path:
    """Return the file of known weights in a folder, fetching it where it is not there yet.

    A file that is there is compared with its digest and used without any connection.

    Raises
    ------
    CheckpointError, IncompleteRunError, MissingCapabilityError, StorageError
        As `models.named_weights.resolve`.
    """
    make_folder(folder)
    with storage_errors(folder), _alone(folder, options):
        target = folder / entry.file
        noted = _note_of(target)
        if target.is_file():
            if _is_intact(target, entry, noted):
                return target
            options.tell(f"{target} does not have its published digest and is fetched again")
        origin = _origin(entry, options)
        size = "" if entry.size_bytes is None else f", {entry.size_bytes / 1e6:,.0f} MB"
        options.tell(f"fetching {entry.name}{size} from {origin.url} (licence: {origin.licence}) into {target}")
        _pull(target, origin, noted, options)
        if not noted and not origin.digest:
            _require_checkpoint(target, origin)
        found = sha256_of(target)
        if not noted and not entry.digest.startswith("sha256:"):
            write_text(_note(target), f"{found}  {target.name}\n")
            options.tell(
                f"no SHA-256 of {entry.name} is published: noted {found} on first use; "
                "compare it with a colleague's before you rely on it"
            )
        return target


def _is_intact(target: Path, entry: KnownWeights, noted: str) -> bool:
    """Tell whether a cached file has its published digest.

    Raises
    ------
    CheckpointError
        If it differs from what was noted when it was fetched first.
    """
    if noted and sha256_of(target) != noted:
        raise CheckpointError(
            f"{target}: changed since it was fetched (expected SHA-256 {noted}); delete it, and {_note(target).name} "
            "beside it, to fetch it again"
        )
    if noted or not entry.digest:
        if not noted:  # a crash came between the file and the note
            write_text(_note(target), f"{sha256_of(target)}  {target.name}\n")
        return True
    return _has_digest(target, entry.digest)


def _origin(entry: KnownWeights, options: DownloadOptions) -> Origin:
    """Return where a file is to be fetched from."""
    if options.mirror:
        return Origin(f"{options.mirror.rstrip('/')}/{entry.file}", entry.digest, entry.licence)
    if entry.zenodo_record is None:
        return Origin(entry.url, entry.digest, entry.licence)
    page = f"{options.zenodo}/records/{entry.zenodo_record}"
    with _connection(f"{options.zenodo}/api/records/{entry.zenodo_record}", ""):
        answer = requests.get(f"{options.zenodo}/api/records/{entry.zenodo_record}", timeout=_TIMEOUT_S)
        _check_status(answer, page)
        record = answer.json()
    if not isinstance(record, dict):
        raise CheckpointError(f"{page}: the record cannot be read; download the file there and give its path")
    files = {str(file.get("key") or file.get("filename")): file for file in record.get("files", ())}
    fitting = [
        name for name in files if name.endswith(_SUFFIXES) and re.search(entry.zenodo_pattern, name, re.IGNORECASE)
    ]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{page}: {len(fitting)} of its files look like {entry.name} ({', '.join(files) or 'it lists none'}), "
            "expected one; download the one that you want and give its path"
        )
    checksum = str(files[fitting[0]].get("checksum", ""))
    digest = checksum if ":" in checksum or not checksum else f"md5:{checksum}"
    match record.get("metadata"):
        case {"license": {"id": str(licence)}}:
            pass
        case _:
            licence = entry.licence
    return Origin(f"{page}/files/{quote(fitting[0])}?download=1", digest, licence)


def _require_checkpoint(target: Path, origin: Origin) -> None:
    """Raise where no digest tells what arrived and it is no checkpoint: a page of a proxy, or a part of the file."""
    if not looks_like_checkpoint(target):
        size = target.stat().st_size
        target.unlink()
        raise CheckpointError(
            f"{origin.url}: what arrived ({size:,} bytes) is no checkpoint and was deleted; look at the address in a "
            "browser, and give the path of what you download there"
        )


def _pull(target: Path, origin: Origin, noted: str, options: DownloadOptions) -> None:
    """Let pooch fetch a file by our transfer, compare its digest, and give it its name."""
    pooch.get_logger().setLevel("CRITICAL")  # it would tell on stderr what `tell` tells
    wanted = f"sha256:{noted}" if noted else origin.digest
    kennel = pooch.create(
        path=target.parent, base_url="", registry={target.name: wanted or None}, urls={target.name: origin.url}
    )
    transfer = ResumingTransfer(target.with_name(f".{target.name}.part"), options)
    try:
        with _connection(origin.url, str(transfer.part)):
            kennel.fetch(target.name, downloader=transfer)
    except ValueError as error:  # pooch has deleted what arrived
        if "not available" in str(error):
            raise MissingCapabilityError(
                f"checking {target.name} needs the package 'xxhash', which is not installed here; run: "
                "pip install 'dendsam-deploy[train]'"
            ) from error
        raise CheckpointError(
            f"{origin.url}: what arrived does not have the digest {wanted} and was deleted: "
            "the source changed or something between altered it; do not use it from there"
        ) from error


@dataclass(slots=True)
class ResumingTransfer:
    """A downloader for pooch that goes on where an earlier transfer stopped.

    Parameters
    ----------
    part : Path
        What has arrived; beside it, ``NAME.json`` tells from where and of which version.
    options : DownloadOptions
        How long to wait, and whom to tell.
    """

    part: Path
    options: DownloadOptions
    _total: int | None = field(default=None)

    def __call__(self, url: str, output_file: str, pooch: object, check_only: bool = False) -> None:
        """Bring a file to `output_file`, as pooch asks."""
        failures = 0
        while True:
            before = self._size()
            try:
                self._transfer(url)
                break
            except (requests.RequestException, _BrokenTransferError) as error:
                if self._size() > before:  # it goes on, if slowly
                    failures = 0
                # Where nobody answers at all, waiting helps little: most likely this machine is offline.
                is_offline = isinstance(error, requests.ConnectionError) and not self._size()
                if failures >= (1 if is_offline else len(self.options.pauses_s)):
                    raise
                time.sleep(self.options.pauses_s[failures])
                failures += 1
        self.part.replace(output_file)
        self._notes().unlink(missing_ok=True)

    def _transfer(self, url: str) -> None:
        """Ask for what is missing and add it."""
        start, headers = self._request(url)
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
            if answer.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                if _total_of(answer) == start:
                    return
                self.part.unlink(missing_ok=True)
                raise _BrokenTransferError("the file at the source is shorter than what has arrived")
            _check_status(answer, url)
            if answer.status_code != HTTPStatus.PARTIAL_CONTENT or _start_of(answer) != start:
                if answer.status_code == HTTPStatus.PARTIAL_CONTENT:
                    self.part.unlink(missing_ok=True)
                    raise _BrokenTransferError("the source sent another part than the one that was asked for")
                start = 0
            self._total = _total_of(answer)
            self._check_space(start)
            version = answer.headers.get("ETag", "")
            version = answer.headers.get("Last-Modified", "") if version.startswith("W/") or not version else version
            write_text(self._notes(), json.dumps({"url": url, "version": version}))
            with self.part.open("ab" if start else "wb") as file:
                for chunk in answer.iter_content(_CHUNK_BYTES):
                    file.write(chunk)
                    self._show(file.tell())
        if self._total is not None and self._size() != self._total:
            raise _BrokenTransferError(f"{self._size():,} of {self._total:,} bytes arrived")

    def _request(self, url: str) -> tuple[int, dict[str, str]]:
        """Return how much has arrived already, and what to ask for."""
        headers = {"Accept-Encoding": "identity"}  # sizes and parts are those of the file itself
        try:
            notes = json.loads(self._notes().read_text(encoding="utf-8"))
        except (OSError, ValueError):
            notes = {}
        start = self._size()
        if not start or notes.get("url") != url or not notes.get("version"):
            return 0, headers
        return start, headers | {"Range": f"bytes={start}-", "If-Range": notes["version"]}

    def _check_space(self, start: int) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if self._total is not None and self._total - start > free:
            raise StorageError(
                f"{self.part.parent}: {free / 1e6:,.0f} MB are free, {(self._total - start) / 1e6:,.0f} MB are needed; "
                "free space there, or name another folder by DENDSAM_CACHE"
            )

    def _show(self, arrived: int) -> None:
        total = self._total or arrived
        self.options.progress(Progress("fetch", arrived, total, f"{arrived / 1e6:,.0f} of {total / 1e6:,.0f} MB"))

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _notes(self) -> Path:
        return self.part.with_name(f"{self.part.name}.json")


class _BrokenTransferError(OSError):
    """Less arrived than was announced."""


class _SourceError(requests.RequestException):
    """The source is there but cannot answer now."""


def _check_status(answer: requests.Response, url: str) -> None:
    """Raise where a source does not give the file.

    Raises
    ------
    CheckpointError
        Where asking again would not help.
    """
    if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR or answer.status_code in _TRY_AGAIN:
        raise _SourceError(f"it answers {answer.status_code}")
    if not answer.ok:
        raise CheckpointError(
            f"{url}: the source answers {answer.status_code} {answer.reason}; look for the file there, "
            "and give the path of what you download"
        )


@contextmanager
def _connection(url: str, part: str) -> Iterator[None]:
    """Turn what goes wrong between here and a source into a sentence."""
    try:
        yield
    except DendsamError:
        raise
    except (requests.RequestException, _BrokenTransferError) as error:
        reason = _innermost(error)
        if part and Path(part).is_file():
            raise IncompleteRunError(
                f"{url}: the transfer broke off ({reason}); {Path(part).stat().st_size / 1e6:,.1f} MB are kept: "
                "run the same command again to go on"
            ) from error
        raise MissingCapabilityError(
            f"{url} cannot be reached from here ({reason}); download it on another machine and give the path of it"
        ) from error


def _innermost(error: BaseException) -> str:
    """Return the most telling words of a chain of network errors."""
    text = str(error)
    known = (r"Failed to resolve '[^']*'", r"\[Errno [^]]*\] [^'\")]*", "timed out", r"Connection broken[^'\")]*")
    for pattern in known:
        if found := re.search(pattern, text):
            return found[0]
    return text[:120] or type(error).__name__


def _total_of(answer: requests.Response) -> int | None:
    """Return the size of the whole file as a source announces it."""
    announced: str = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if not announced and answer.status_code == HTTPStatus.OK:
        announced = answer.headers.get("Content-Length", "")
    return int(announced) if announced.isdecimal() else None


def _start_of(answer: requests.Response) -> int:
    """Return the first byte of the part that a source sends."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1


@contextmanager
def _alone(folder: Path, options: DownloadOptions) -> Iterator[None]:
    """Hold the cache against other processes; wait for one that is fetching."""
    has_told = False
    while True:
        with exclusive(folder) as is_alone:
            if is_alone:
                yield
                return
        if not has_told:
            options.tell(f"waiting for another process that fetches into {folder}")
            has_told = True
        time.sleep(_LOCK_POLL_S)


def _note(target: Path) -> Path:
    """Return the file that keeps the digest of what was fetched first, in the form of ``sha256sum``."""
    return target.with_name(f"{target.name}.sha256")


def _note_of(target: Path) -> str:
    try:
        return _note(target).read_text(encoding="utf-8").partition(" ")[0].strip()
    except FileNotFoundError:
        return ""


def _has_digest(path: Path, digest: str) -> bool:
    algorithm, _, expected = digest.partition(":")
    found: Any = pooch.file_hash(path, alg=algorithm)
    return bool(found == expected)
