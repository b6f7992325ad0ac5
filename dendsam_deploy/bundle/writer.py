"""Writing a bundle: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.bundle import MANIFEST_FILE, PARITY_FILE, Bundle, digest_file
from dendsam_deploy.bundle.parity import parity_to_json
from dendsam_deploy.durable import storage_errors, sync, write_text
from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from dendsam_deploy.bundle.manifest import FileDigest, Manifest
    from dendsam_deploy.bundle.parity import ParityReport


class BundleWriter:
    """A bundle under construction; a context manager that gives it its name on a clean exit only.

    The files are made in a hidden folder beside the final one. On a clean exit the folder is opened as a bundle, which
    checks it, flushed to disk and renamed; after an exception it is removed, so that nobody ever meets half a bundle.

    Parameters
    ----------
    out : Path
        The bundle's folder. Missing parents are made.
    overwrite : bool
        Whether an existing bundle at `out` may be replaced. Nothing but a bundle is ever replaced.

    Raises
    ------
    InvalidArgumentError
        Where `out` exists and may not be replaced.
    StorageError
        Where the file system refuses a write.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        if out.exists() and not (out / MANIFEST_FILE).is_file() and not _is_empty_folder(out):
            raise InvalidArgumentError(f"{out}: exists and is no bundle; choose another name")
        if (out / MANIFEST_FILE).is_file() and not overwrite:
            raise InvalidArgumentError(f"{out}: a bundle of that name exists; choose another name or pass --overwrite")
        self.out = out
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))

    def digest(self, *names: str) -> tuple[FileDigest, ...]:
        """Return the digests of files that were made in `folder`, named relative to it."""
        return tuple(digest_file(self.folder, name) for name in names)

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest; everything that it lists must be in `folder` already."""
        write_text(self.folder / MANIFEST_FILE, manifest.to_json())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                Bundle.open(self.folder)
                with storage_errors(self.out):
                    self._publish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _publish(self) -> None:
        """Flush every file, then exchange the old bundle, if there is one, for the new."""
        # A temporary folder is private to its owner; a bundle has the permissions that any new folder would get.
        umask = os.umask(0)
        os.umask(umask)
        self.folder.chmod(0o777 & ~umask)
        for path in sorted(self.folder.rglob("*")):
            sync(path)
        sync(self.folder)
        if self.out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.replaced-", dir=self.out.parent))
            self.out.rename(old / self.out.name)
            try:
                self.folder.rename(self.out)
            except OSError:
                (old / self.out.name).rename(self.out)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            self.folder.rename(self.out)
        sync(self.out.parent)


def write_parity(bundle: Bundle, report: ParityReport) -> Path:
    """Add a report to what is known about a bundle; it replaces findings on the same engine, device and precision.

    Returns
    -------
    Path
        The bundle's ``parity.json``.
    """
    path = bundle.path / PARITY_FILE
    whole = report.merged_into(bundle.parity) if bundle.parity else report
    write_text(path, parity_to_json(whole, bundle.manifest))
    return path


def _is_empty_folder(path: Path) -> bool:
    """Tell whether a path is a folder without entries, which a bundle may take over."""
    return path.is_dir() and not any(path.iterdir())
