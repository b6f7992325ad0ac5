"""A compiled engine runs code: it is loaded only under this user's seal, from folders that are this user's alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from engine_records import BUILT, IDENTITY, fill, must_not_build, needs_posix
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy.errors import InvalidArgumentError, StorageError, UnsafeFileError
from dendsam_deploy.runtimes.gpu_engine_cache import ENGINE_FILE, RECORD_FILE, BuiltEngine, EngineCache
from dendsam_deploy.runtimes.private_folder import state_folder


@needs_posix
def test_nobody_else_may_enter(cache: EngineCache) -> None:
    folder = fill(cache)
    for place in (folder, folder.parent, cache.state):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert folder.parent == cache.bundle / "engines"


def altered(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize("position", range(len(BUILT.plan)))
def test_an_altered_byte_is_refused(cache: EngineCache, position: int) -> None:
    engine = fill(cache) / ENGINE_FILE
    engine.write_bytes(altered(BUILT.plan, position))
    with pytest.raises(UnsafeFileError, match="altered since it was compiled") as caught:
        cache.obtain(IDENTITY, must_not_build)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, len(BUILT.plan) - 1])
def test_a_truncated_engine_is_refused(cache: EngineCache, length: int) -> None:
    engine = fill(cache) / ENGINE_FILE
    engine.write_bytes(BUILT.plan[:length])
    with pytest.raises(UnsafeFileError, match="altered"):
        cache.obtain(IDENTITY, must_not_build)


def test_an_engine_whose_record_was_made_to_fit_is_refused(cache: EngineCache) -> None:
    """Who brings an engine along brings its digest along as well; the seal is what he cannot make."""
    folder = fill(cache)
    hostile = b"hostile code"
    (folder / ENGINE_FILE).write_bytes(hostile)
    record = json.loads((folder / RECORD_FILE).read_text())
    record["sha256"] = hashlib.sha256(hostile).hexdigest()
    (folder / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(UnsafeFileError, match="no valid seal") as caught:
        cache.obtain(IDENTITY, must_not_build)
    assert f"--trust-engine {record['sha256']}" in str(caught.value)


def test_an_engine_of_another_user_or_machine_is_refused(cache: EngineCache, tmp_path: Path) -> None:
    fill(cache)
    elsewhere = EngineCache(cache.bundle, state=tmp_path / "other state")
    with pytest.raises(UnsafeFileError, match="not compiled by you on this machine"):
        elsewhere.obtain(IDENTITY, must_not_build)


def test_an_engine_may_be_trusted_by_its_digest(cache: EngineCache, tmp_path: Path) -> None:
    fill(cache)
    digest = hashlib.sha256(BUILT.plan).hexdigest()
    trusting = EngineCache(cache.bundle, (digest,), state=tmp_path / "other state")
    assert trusting.obtain(IDENTITY, must_not_build).sha256 == digest
    distrusting = EngineCache(cache.bundle, ("00" * 32,), state=tmp_path / "other state")
    with pytest.raises(UnsafeFileError):
        distrusting.obtain(IDENTITY, must_not_build)


@pytest.mark.parametrize("digest", ["", "AB" * 32, "ab" * 31, "ab" * 33, "ab" * 32 + "\n", "g" * 64])
def test_a_trusted_digest_is_a_digest(tmp_path: Path, digest: str) -> None:
    with pytest.raises(InvalidArgumentError, match="64 hexadecimal digits"):
        EngineCache(tmp_path, (digest,))


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b"null", b"{}", b'{"schema_version": 1}', b"[" * 100_000])
def test_an_engine_without_readable_record_is_built_again(cache: EngineCache, record: bytes) -> None:
    (fill(cache) / RECORD_FILE).write_bytes(record)
    again = BuiltEngine(b"new code")
    assert cache.obtain(IDENTITY, lambda: again).built == again
    assert cache.obtain(IDENTITY, must_not_build).built == again


@pytest.mark.parametrize("field", ["identity", "sha256", "attention_layers", "fused_attention_layers", "built_utc"])
def test_every_field_of_the_record_is_sealed(cache: EngineCache, field: str) -> None:
    folder = fill(cache)
    record = json.loads((folder / RECORD_FILE).read_text())
    known = {"attention_layers": 99, "fused_attention_layers": 99, "sha256": "00" * 32, "built_utc": "never"}
    record[field] = known.get(field, {})
    (folder / RECORD_FILE).write_text(json.dumps(record))
    if field == "identity":  # then it is an engine for something else
        assert cache.find(IDENTITY) is None
        return
    with pytest.raises(UnsafeFileError, match="no valid seal"):
        cache.find(IDENTITY)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_whatever_bytes_change_the_original_or_nothing_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "bundle").mkdir()
    cache = EngineCache(folder / "bundle", state=folder / "state")
    path = fill(cache) / data.draw(st.sampled_from([ENGINE_FILE, RECORD_FILE]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        found = cache.find(IDENTITY)
    except UnsafeFileError:
        return
    assert found is None or found.built == BUILT


@needs_posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o755, 0o701])
@pytest.mark.parametrize("place", ["engines", "key", "state"])
def test_a_folder_that_others_may_enter_is_refused(cache: EngineCache, place: str, mode: int) -> None:
    folder = fill(cache)
    {"engines": folder.parent, "key": folder, "state": cache.state}[place].chmod(mode)
    with pytest.raises(UnsafeFileError, match=f"mode 0{mode:o}, expected 0700"):
        cache.obtain(IDENTITY, must_not_build)


@needs_posix
@pytest.mark.parametrize("name", ["engines", "key", ENGINE_FILE, RECORD_FILE])
def test_links_are_not_followed(cache: EngineCache, tmp_path: Path, name: str) -> None:
    folder = fill(cache)
    path = {"engines": folder.parent, "key": folder}.get(name, folder / name)
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeFileError, match="delete it"):
        cache.obtain(IDENTITY, must_not_build)


@needs_posix
@pytest.mark.parametrize("name", [ENGINE_FILE, RECORD_FILE])
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(cache: EngineCache, name: str) -> None:
    path = fill(cache) / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnsafeFileError, match="no plain file"):
        cache.obtain(IDENTITY, must_not_build)


@needs_posix
@pytest.mark.skipif(os.name != "nt" and os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["engines", "key", ENGINE_FILE])
def test_what_belongs_to_another_user_is_refused(cache: EngineCache, name: str) -> None:
    folder = fill(cache)
    path = {"engines": folder.parent, "key": folder}.get(name, folder / name)
    os.chown(path, 12345, 12345)
    with pytest.raises(UnsafeFileError, match="belongs to the user 12345"):
        cache.obtain(IDENTITY, must_not_build)


def test_a_damaged_key_is_named(cache: EngineCache) -> None:
    fill(cache)
    (key,) = cache.state.glob("*.key")
    key.write_bytes(b"short")
    with pytest.raises(StorageError, match="5 bytes, expected 32; delete it"):
        cache.find(IDENTITY)


def test_the_key_is_kept_outside_of_the_bundle(cache: EngineCache, tmp_path: Path) -> None:
    fill(cache)
    copied = tmp_path / "copied"
    shutil.copytree(cache.bundle, copied)
    key = next(cache.state.glob("*.key")).read_bytes()
    assert len(key) == 32
    assert not any(key in path.read_bytes() for path in copied.rglob("*") if path.is_file())
    assert EngineCache(copied, state=cache.state).find(IDENTITY) is not None  # the same user's copy stays good


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({"XDG_STATE_HOME": "/s"}, "linux", Path("/s/dendsam-deploy")),
        ({"XDG_STATE_HOME": "relative"}, "linux", Path.home() / ".local/state/dendsam-deploy"),
        ({}, "linux", Path.home() / ".local/state/dendsam-deploy"),
        ({"LOCALAPPDATA": "/l", "XDG_STATE_HOME": "/s"}, "win32", Path("/l/dendsam-deploy")),
    ],
)
def test_where_state_is_kept(environment: dict[str, str], platform: str, expected: Path) -> None:
    assert state_folder(environment, platform) == expected
