"""Compiled engines on the disk: found again only by exactly the machine and graph that they were compiled for.

Loading a compiled engine runs native code that it brings along. An engine is therefore loaded only where it carries the
seal of this user: a keyed digest whose key lies in the user's own folder of state, outside every bundle. A bundle that
comes with engines from elsewhere is refused, whatever it says about them.

    BUNDLE/engines/KEY/engine.plan    the engine; written first
    BUNDLE/engines/KEY/record.json    what it is, its SHA-256 and the seal; written last, so that half a build is none
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import json
import os
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dendsam_deploy.durable import published, storage_errors, sync, write_text
from dendsam_deploy.errors import InvalidArgumentError, StorageError, UnsafeFileError
from dendsam_deploy.runtimes.private_folder import check_private, locked, make_private, read_regular, state_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ENGINES_FOLDER = "engines"
ENGINE_FILE = "engine.plan"
RECORD_FILE = "record.json"
_KEY_FILE = "engine-seal.key"
_TIMING_FILE = "timing-{}.cache"

_SCHEMA_VERSION = 1
_KEY_BYTES = 32
_LARGEST_RECORD_BYTES = 2**20
_LARGEST_TIMING_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Everything that decides whether a compiled engine may be used.

    Parameters
    ----------
    role, precision : str
        Of the graph.
    graph_sha256 : tuple of str
        Digests of the graph's files.
    gpu : str
        Name of the GPU.
    compute_capability : str
        Such as ``9.0``.
    driver : str
        Version of its driver.
    compiler : str
        Name and version of what compiled it, such as ``tensorrt 11.4.0.106``.
    profiles : str
        The shapes it is compiled for, as JSON.
    host : str
        System and processor, whose code a compiled engine holds as well.
    settings : str
        Whatever else decided what was compiled.
    """

    role: str
    precision: str
    graph_sha256: tuple[str, ...]
    gpu: str
    compute_capability: str
    driver: str
    compiler: str
    profiles: str
    host: str
    settings: str

    @property
    def key(self) -> str:
        """Name of the engine's folder: readable, and another one whenever any part of the identity is another one."""
        digest = hashlib.sha256(_canonical(dataclasses.asdict(self))).hexdigest()
        parts = (self.role, self.precision, self.gpu, f"sm{self.compute_capability}", self.compiler)
        return "-".join([*(_slug(part) for part in parts), digest[:20]])


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """What a compiler returned.

    Parameters
    ----------
    plan : bytes
        The engine.
    attention_layers, fused_attention_layers : int
        Attentions in the graph, and kernels of the engine that compute a whole one.
    """

    plan: bytes
    attention_layers: int = 0
    fused_attention_layers: int = 0


@dataclass(frozen=True, slots=True)
class StoredEngine:
    """An engine that may be loaded.

    Parameters
    ----------
    built : BuiltEngine
        The engine.
    sha256 : str
        Digest of the bytes in `built`, which were checked and not read again.
    is_new : bool
        Whether it was compiled just now.
    """

    built: BuiltEngine
    sha256: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class EngineCache:
    """The compiled engines of one bundle.

    Parameters
    ----------
    bundle : Path
        Folder of the bundle.
    trusted : tuple of str
        SHA-256 of engines that may be loaded without this user's seal.
    state : Path
        The user's private folder; see `state_folder`.
    lock_limit_s : float
        How long to wait for another process that compiles the same engine.

    Raises
    ------
    InvalidArgumentError
        Where a trusted digest is none.
    """

    bundle: Path
    trusted: tuple[str, ...] = ()
    state: Path = dataclasses.field(default_factory=state_folder)
    lock_limit_s: float = 7200.0

    def __post_init__(self) -> None:
        for digest in self.trusted:
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise InvalidArgumentError(f"{digest!r} is no SHA-256 of an engine, expected 64 hexadecimal digits")

    def obtain(self, identity: EngineIdentity, build: Callable[[], BuiltEngine]) -> StoredEngine:
        """Return the stored engine of an identity, or compile and store it.

        Of several processes that need the same engine one compiles it; the others wait for it.

        Parameters
        ----------
        identity : EngineIdentity
            What is needed.
        build : callable
            Compiles it.

        Raises
        ------
        UnsafeFileError
            Where an engine lies there that was altered, was made elsewhere, or can be written by others.
        StorageError
            Where the file system refuses.
        MissingCapabilityError
            Where another process does not finish compiling it.
        """
        found = self.find(identity)
        if found is not None:
            return found
        folder = self.folder(identity)
        make_private(folder.parent)
        make_private(folder)
        with locked(folder, self.lock_limit_s):
            return self.find(identity) or self._store(identity, build())

    def find(self, identity: EngineIdentity) -> StoredEngine | None:
        """Return the stored engine of an identity, or None where there is none, or only one of another identity.

        Raises
        ------
        UnsafeFileError
            As for `obtain`.
        """
        folder = self.folder(identity)
        for place in (folder.parent, folder):
            if not os.path.lexists(place):
                return None
            check_private(place)
        text = read_regular(folder / RECORD_FILE, _LARGEST_RECORD_BYTES)
        record = None if text is None else _record_from_json(text)
        if record is None or record["identity"] != _plain(identity):
            return None
        plan = read_regular(folder / ENGINE_FILE, None)
        if plan is None:
            return None
        digest = hashlib.sha256(plan).hexdigest()
        if digest not in self.trusted:
            self._check_seal(folder, record, digest)
        built = BuiltEngine(plan, record["attention_layers"], record["fused_attention_layers"])
        return StoredEngine(built, digest, is_new=False)

    def folder(self, identity: EngineIdentity) -> Path:
        """Return the folder of an identity, whether it exists or not."""
        return self.bundle / ENGINES_FOLDER / identity.key

    def timing_data(self, identity: EngineIdentity) -> bytes:
        """Return what was measured when engines were compiled for the same machine, or nothing."""
        path = self._timing_file(identity)
        if not os.path.lexists(self.state):
            return b""
        check_private(self.state)
        return read_regular(path, _LARGEST_TIMING_BYTES) or b""

    def keep_timing_data(self, identity: EngineIdentity, data: bytes) -> None:
        """Store what was measured, for the next engine."""
        make_private(self.state)
        with published(self._timing_file(identity)) as stream:
            stream.write(data)

    def _store(self, identity: EngineIdentity, built: BuiltEngine) -> StoredEngine:
        """Write an engine, and when it is safely there its record."""
        folder = self.folder(identity)
        digest = hashlib.sha256(built.plan).hexdigest()
        record: dict[str, Any] = {
            "schema_version": _SCHEMA_VERSION,
            "identity": _plain(identity),
            "sha256": digest,
            "attention_layers": built.attention_layers,
            "fused_attention_layers": built.fused_attention_layers,
            "built_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        record["seal"] = self._seal(record)
        with storage_errors(folder):
            (folder / RECORD_FILE).unlink(missing_ok=True)  # an old record must never meet the new engine
            sync(folder)
        with published(folder / ENGINE_FILE) as stream:
            stream.write(built.plan)
        write_text(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        return StoredEngine(built, digest, is_new=True)

    def _check_seal(self, folder: Path, record: Mapping[str, Any], digest: str) -> None:
        """Raise unless a record is this user's and the engine is the one that it is about."""
        remedy = f"delete {folder} to have it compiled again"
        if not hmac.compare_digest(str(record["seal"]), self._seal(record)):
            raise UnsafeFileError(
                f"{folder / ENGINE_FILE}: was not compiled by you on this machine (no valid seal), and loading it "
                f"would run code that it brings along; {remedy}, or pass --trust-engine {digest}"
            )
        if digest != record["sha256"]:
            raise UnsafeFileError(
                f"{folder / ENGINE_FILE}: altered since it was compiled (SHA-256 {digest[:12]}..., recorded "
                f"{str(record['sha256'])[:12]}...); {remedy}"
            )

    def _seal(self, record: Mapping[str, Any]) -> str:
        """Return the keyed digest of a record without its seal."""
        content = {name: value for name, value in record.items() if name != "seal"}
        return hmac.new(self._secret(), _canonical(content), hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        """Return this user's key; it is made when it is needed first."""
        make_private(self.state)
        path = self.state / _KEY_FILE
        with locked(self.state, limit_s=60.0):
            key = read_regular(path, _KEY_BYTES)
            if key is None:
                key = secrets.token_bytes(_KEY_BYTES)
                with published(path) as stream:
                    stream.write(key)
        if len(key) != _KEY_BYTES:
            raise StorageError(f"{path}: has {len(key)} bytes, expected {_KEY_BYTES}; delete it and run again")
        return key

    def _timing_file(self, identity: EngineIdentity) -> Path:
        """Return the file of timings: TensorRT takes them only on the same GPU and version."""
        machine = (identity.gpu, identity.compute_capability, identity.driver, identity.compiler)
        return self.state / _TIMING_FILE.format(hashlib.sha256(_canonical(machine)).hexdigest()[:20])


def _plain(identity: EngineIdentity) -> dict[str, Any]:
    """Return an identity as JSON values."""
    return dataclasses.asdict(identity) | {"graph_sha256": list(identity.graph_sha256)}


def _record_from_json(text: bytes) -> dict[str, Any] | None:
    """Read a record; None where it is torn, of another version, or not what `EngineCache` writes."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {
        "identity": dict,
        "sha256": str,
        "attention_layers": int,
        "fused_attention_layers": int,
        "seal": str,
    }
    is_record = isinstance(record, dict) and record.get("schema_version") == _SCHEMA_VERSION
    return record if is_record and all(type(record.get(name)) is kind for name, kind in kinds.items()) else None


def _canonical(value: object) -> bytes:
    """Write a value the same way every time."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _slug(text: str) -> str:
    """Return text that any file system takes as part of a name."""
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_.")[:32]
