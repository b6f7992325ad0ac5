"""The cache of compiled engines: found only by its machine and graph, loaded only under this user's own seal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import stat
import string
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy import durable
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError, StorageError, UnsafeFileError
from dendsam_deploy.runtimes.gpu_engine_cache import (
    ENGINE_FILE,
    RECORD_FILE,
    BuiltEngine,
    EngineCache,
    EngineIdentity,
    StoredEngine,
)
from dendsam_deploy.runtimes.private_folder import state_folder

IDENTITY = EngineIdentity(
    role="encoder",
    precision="fp16",
    graph_sha256=("ab" * 32, "cd" * 32),
    gpu="NVIDIA RTX 6000 Ada",
    compute_capability="8.9",
    driver="580.82 (CUDA 13.0)",
    compiler="tensorrt 11.4.0.106",
    profiles="[]",
)
BUILT = BuiltEngine(b"native code", attention_layers=12, fused_attention_layers=11)
needs_posix = pytest.mark.skipif(os.name == "nt", reason="owners and modes of files are those of POSIX systems")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    (tmp_path / "bundle").mkdir()
    return EngineCache(tmp_path / "bundle", state=tmp_path / "state")


def must_not_build() -> BuiltEngine:
    raise AssertionError("compiled again")


def fill(cache: EngineCache) -> Path:
    cache.obtain(IDENTITY, lambda: BUILT)
    return cache.folder(IDENTITY)


def test_what_was_built_once_is_found(cache: EngineCache) -> None:
    digest = hashlib.sha256(BUILT.plan).hexdigest()
    assert cache.find(IDENTITY) is None
    assert cache.obtain(IDENTITY, lambda: BUILT) == StoredEngine(BUILT, digest, is_new=True)
    assert cache.obtain(IDENTITY, must_not_build) == StoredEngine(BUILT, digest, is_new=False)


@needs_posix
def test_nobody_else_may_enter(cache: EngineCache) -> None:
    folder = fill(cache)
    for place in (folder, folder.parent, cache.state):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert folder.parent == cache.bundle / "engines"


def test_the_name_of_the_folder_says_what_the_engine_is_for() -> None:
    assert IDENTITY.key.startswith("encoder-fp16-nvidia_rtx_6000_ada-sm8.9-tensorrt_11.4.0.106-")
    assert set(IDENTITY.key) <= {*string.ascii_lowercase, *string.digits, "-", "_", "."}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineIdentity)])
def test_an_engine_for_anything_else_is_stale_and_not_used(cache: EngineCache, field: str) -> None:
    fill(cache)
    value = ("ef" * 32,) if field == "graph_sha256" else "other"
    other = dataclasses.replace(IDENTITY, **{field: value})
    assert other.key != IDENTITY.key
    assert cache.find(other) is None
    again = BuiltEngine(b"other code")
    assert cache.obtain(other, lambda: again).built == again
    assert cache.obtain(IDENTITY, must_not_build).built == BUILT


def test_an_engine_in_a_renamed_folder_is_stale(cache: EngineCache) -> None:
    other = dataclasses.replace(IDENTITY, driver="999")
    fill(cache).rename(cache.folder(other))
    again = BuiltEngine(b"other code")
    assert cache.obtain(other, lambda: again).built == again
    assert cache.obtain(other, must_not_build).built == again


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            EngineIdentity,
            st.text(max_size=4),
            st.text(max_size=4),
            st.tuples(st.text(max_size=4)),
            *[st.text(max_size=8)] * 5,
        ),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_two_identities_never_share_a_folder(pair: list[EngineIdentity]) -> None:
    keys = [identity.key for identity in pair]
    assert keys[0] != keys[1]
    for key in keys:
        assert len(key) < 200
        assert set(key) <= {*string.ascii_lowercase, *string.digits, "-", "_", "."}
        assert Path(key).name == key


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


def test_a_failed_build_leaves_nothing_that_is_taken_for_an_engine(cache: EngineCache) -> None:
    def fails() -> BuiltEngine:
        raise MissingCapabilityError("no memory")

    with pytest.raises(MissingCapabilityError, match="no memory"):
        cache.obtain(IDENTITY, fails)
    assert cache.find(IDENTITY) is None
    assert cache.obtain(IDENTITY, lambda: BUILT).is_new


class PowerFailureError(Exception):
    """Stops a test in the middle of a write."""


def test_a_build_interrupted_at_any_write_is_never_half_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends at the n-th flush of a file or folder; the next one finds a whole engine or none."""
    flush, calls = os.fsync, 0
    outcomes = set()
    for last in range(40):
        place = tmp_path / str(last)
        (place / "bundle").mkdir(parents=True)
        cache = EngineCache(place / "bundle", state=place / "state")
        calls = 0

        def dying(descriptor: int, last: int = last) -> None:
            nonlocal calls
            calls += 1
            if calls > last:
                raise PowerFailureError
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "fsync", dying)
            try:
                cache.obtain(IDENTITY, lambda: BUILT)
            except PowerFailureError:
                outcomes.add("died")
            else:
                outcomes.add("finished")
        found = cache.find(IDENTITY)
        assert found is None or found.built == BUILT
        assert cache.obtain(IDENTITY, lambda: BUILT).built == BUILT
    assert outcomes == {"died", "finished"}


def test_a_new_engine_never_meets_the_record_of_an_old_one(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a build interrupted between the two files would be refused as altered for ever."""
    folder = fill(cache)
    record = json.loads((folder / RECORD_FILE).read_text())
    (folder / RECORD_FILE).write_text(json.dumps(record | {"identity": {}}))

    def stopped(path: Path, text: str) -> None:
        raise PowerFailureError

    monkeypatch.setattr("dendsam_deploy.runtimes.gpu_engine_cache.write_text", stopped)
    with pytest.raises(PowerFailureError):
        cache.obtain(IDENTITY, lambda: BuiltEngine(b"new code"))
    assert (folder / ENGINE_FILE).read_bytes() == b"new code"
    assert cache.find(IDENTITY) is None


def _obtain_slowly(bundle: Path, state: Path, log: Path) -> None:
    def build() -> BuiltEngine:
        with log.open("a") as stream:
            stream.write("built\n")
        time.sleep(0.5)
        return BUILT

    stored = EngineCache(bundle, state=state, lock_limit_s=30.0).obtain(IDENTITY, build)
    with log.open("a") as stream:
        stream.write(f"got {stored.sha256}\n")


@needs_posix
def test_of_several_processes_one_builds_and_all_use_it(cache: EngineCache, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")  # forking a process that has threads, as tests may, can deadlock
    log = tmp_path / "log"
    processes = [spawn.Process(target=_obtain_slowly, args=(cache.bundle, cache.state, log)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = log.read_text().splitlines()
    assert lines.count("built") == 1
    assert lines.count(f"got {hashlib.sha256(BUILT.plan).hexdigest()}") == 2


@needs_posix
def test_waiting_for_another_process_has_an_end(cache: EngineCache) -> None:
    folder = cache.folder(IDENTITY)
    for place in (folder.parent, folder):
        place.mkdir(mode=0o700)
    hasty = dataclasses.replace(cache, lock_limit_s=0.3)
    refused = pytest.raises(MissingCapabilityError, match="another process")
    with durable.exclusive(folder) as is_alone, refused:
        assert is_alone
        hasty.obtain(IDENTITY, must_not_build)


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match="engines"):
        EngineCache(tmp_path / "bundle", state=tmp_path / "state").obtain(IDENTITY, lambda: BUILT)


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


def test_timings_return_to_the_same_machine_only(cache: EngineCache) -> None:
    assert cache.timing_data(IDENTITY) == b""
    cache.keep_timing_data(IDENTITY, b"timings")
    same_machine = dataclasses.replace(IDENTITY, role="decoder", graph_sha256=("00" * 32,))
    assert cache.timing_data(same_machine) == b"timings"
    for field in ("gpu", "compute_capability", "driver", "compiler"):
        assert cache.timing_data(dataclasses.replace(IDENTITY, **{field: "other"})) == b""


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
