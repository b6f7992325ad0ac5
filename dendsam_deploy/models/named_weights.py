"""Weights that are known by a name: where they come from, and the file of this machine that holds them.

A path that exists is always itself; nothing is looked up or fetched then. A name is an entry of
``weights/registry.json``: packaged with this program, or fetched once into a cache and checked against its digest.

Environment
-----------
``DENDSAM_CACHE``
    Folder of what was fetched, in place of the user's cache.
``DENDSAM_WEIGHTS_URL``
    A mirror: every file is fetched from there, by its name in the registry.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dendsam_deploy import weights
from dendsam_deploy.errors import CheckpointError, MissingCapabilityError
from dendsam_deploy.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dendsam_deploy.progress import ProgressCallback

CACHE_VARIABLE, MIRROR_VARIABLE = "DENDSAM_CACHE", "DENDSAM_WEIGHTS_URL"
_FOLDER = Path(weights.__file__).parent


@dataclass(frozen=True, slots=True)
class KnownWeights:
    """An entry of the registry.

    Parameters
    ----------
    name : str
        What users call it.
    role : str
        ``sam`` or ``detector``.
    architecture : str
        Such as ``vit_b``.
    licence : str
        Of the weights.
    source : str
        Who publishes them, and where.
    file : str
        Its name in the cache and on mirrors.
    packaged : str
        Its name among the weights that come with this program; empty for those that are fetched.
    url : str
        Where it is fetched; empty where a Zenodo record tells.
    zenodo_record : int or None
        The record that has the file.
    zenodo_pattern : str
        Which of the record's files it is: a regular expression for its name.
    digest : str
        ``ALGORITHM:HEX`` as published; empty where nobody has published one. What was fetched first is then noted and
        must not change.
    size_bytes : int or None
        Where known.
    citation, note : str
        What to cite, and what else to know.
    aliases : tuple of str
        Other names that users know it by.
    """

    name: str
    role: Literal["sam", "detector"]
    architecture: str
    licence: str
    source: str
    file: str = ""
    packaged: str = ""
    url: str = ""
    zenodo_record: int | None = None
    zenodo_pattern: str = ""
    digest: str = ""
    size_bytes: int | None = None
    citation: str = ""
    note: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """Where the file is on this machine, or will be once it is fetched."""
        return _FOLDER / self.packaged if self.packaged else cache_folder() / self.file


def known_weights() -> dict[str, KnownWeights]:
    """Return the registry, by name and by alias."""
    entries = json.loads((_FOLDER / "registry.json").read_text(encoding="utf-8"))
    known: dict[str, KnownWeights] = {}
    for name, values in entries.items():
        entry = KnownWeights(name, **values | {"aliases": tuple(values.get("aliases", ()))})
        known |= dict.fromkeys((name, *entry.aliases), entry)
    return known


def cache_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Return the folder of fetched weights."""
    if chosen := environment.get(CACHE_VARIABLE):
        return Path(chosen).expanduser() / "weights"
    if platform == "win32" and (local := environment.get("LOCALAPPDATA")):
        base = Path(local)
    elif platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        named = Path(environment.get("XDG_CACHE_HOME", ""))
        base = named if named.is_absolute() else Path.home() / ".cache"
    return base / "dendsam-deploy" / "weights"


def resolve(
    name_or_path: str | Path,
    tell: Callable[[str], None] = lambda sentence: None,
    progress: ProgressCallback = no_progress,
) -> Path:
    """Return the file that a path or the name of known weights means, fetching it where that is needed.

    Parameters
    ----------
    name_or_path : str or Path
        A path that exists is returned as it is; so is one that looks like a path, for its reader to complain about.
    tell : callable
        Is told what is fetched from where, under which licence, and which digest was noted.
    progress : callable
        Is shown how far the transfer is.

    Raises
    ------
    CheckpointError
        If it is neither a file nor a known name, is no longer where it was published, or differs from its digest.
    IncompleteRunError
        If the transfer broke off; what has arrived is kept for the next attempt.
    MissingCapabilityError
        If the source cannot be reached, or the package that fetches is not installed.
    StorageError
        If the cache cannot be written.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    known = known_weights()
    entry = known.get(str(name_or_path))
    if entry is None:
        if path.suffix or len(path.parts) > 1:
            return path
        raise unknown_name(str(name_or_path), known)
    if entry.packaged:
        return entry.place
    try:
        # requests and pooch are imported where something is to be fetched, and nowhere else.
        from dendsam_deploy.models.weights_download import DownloadOptions, fetch  # noqa: PLC0415 - see above
    except ModuleNotFoundError as error:
        raise MissingCapabilityError(
            f"fetching {entry.name} needs the package {error.name!r}, which is not installed here; run: "
            "pip install 'dendsam-deploy[train]', or give the path of the file"
        ) from error
    options = DownloadOptions(mirror=os.environ.get(MIRROR_VARIABLE, ""), tell=tell, progress=progress)
    return fetch(entry, cache_folder(), options)


def unknown_name(name: str, known: Mapping[str, KnownWeights]) -> CheckpointError:
    """Return the error for a word that is neither a file nor a name, with the names that there are."""
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    names = ", ".join(dict.fromkeys(entry.name for entry in known.values()))
    return CheckpointError(f"{name}: no such file, and no known weights of that name{hint} Known: {names}")
