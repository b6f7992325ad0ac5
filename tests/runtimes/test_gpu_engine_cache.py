"""The cache of compiled engines: each is found only by its machine and graph, and is there as a whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import string
import time
from pathlib import Path

import pytest
from engine_records import BUILT, IDENTITY, fill, must_not_build, needs_posix
from hypothesis import given, settings
from hypothesis import strategies as st

from dendsam_deploy import durable
from dendsam_deploy.errors import MissingCapabilityError, StorageError
from dendsam_deploy.runtimes.gpu_engine_cache import (
    ENGINE_FILE,
    RECORD_FILE,
    BuiltEngine,
    EngineCache,
    EngineIdentity,
    StoredEngine,
)


def test_what_was_built_once_is_found(cache: EngineCache) -> None:
    digest = hashlib.sha256(BUILT.plan).hexdigest()
    assert cache.find(IDENTITY) is None
    assert cache.obtain(IDENTITY, lambda: BUILT) == StoredEngine(BUILT, digest, is_new=True)
    assert cache.obtain(IDENTITY, must_not_build) == StoredEngine(BUILT, digest, is_new=False)


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
            *[st.text(max_size=8)] * 7,
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


def test_timings_return_to_the_same_machine_only(cache: EngineCache) -> None:
    assert cache.timing_data(IDENTITY) == b""
    cache.keep_timing_data(IDENTITY, b"timings")
    same_machine = dataclasses.replace(IDENTITY, role="decoder", graph_sha256=("00" * 32,))
    assert cache.timing_data(same_machine) == b"timings"
    for field in ("gpu", "compute_capability", "driver", "compiler"):
        assert cache.timing_data(dataclasses.replace(IDENTITY, **{field: "other"})) == b""
