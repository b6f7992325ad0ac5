"""A bundle appears whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from dendsam_deploy.bundle import writer as writer_module
from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.writer import BundleWriter
from dendsam_deploy.durable import write_text
from dendsam_deploy.errors import BundleError, InvalidArgumentError, StorageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_name_appears_at_the_end(tmp_path: Path, fill):
    out = tmp_path / "deep" / "toy"
    with BundleWriter(out) as writer:
        fill(writer)
        assert writer.folder.parent == out.parent
        assert writer.folder.name.startswith(".toy.partial-")
        assert not out.exists()
    assert names(out.parent) == ["toy"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_failure_leaves_nothing(tmp_path: Path, fill):
    def interrupted() -> None:
        with BundleWriter(tmp_path / "toy") as writer:
            fill(writer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_a_bundle_that_could_not_be_opened_is_not_published(tmp_path: Path, fill):
    def spoiled() -> None:
        with BundleWriter(tmp_path / "toy") as writer:
            fill(writer)
            (writer.folder / "encoder.onnx").write_bytes(b"")

    with pytest.raises(BundleError, match="0 bytes"):
        spoiled()
    assert names(tmp_path) == []


def test_a_bundle_is_only_replaced_on_request(tmp_path: Path, make_bundle):
    make_bundle(tmp_path / "toy", name="first")
    with pytest.raises(InvalidArgumentError, match="--overwrite"):
        BundleWriter(tmp_path / "toy")
    make_bundle(tmp_path / "toy", overwrite=True, name="second")
    assert Bundle.open(tmp_path / "toy").manifest.name == "second"
    assert names(tmp_path) == ["toy"]


def test_nothing_but_a_bundle_is_ever_replaced(tmp_path: Path, make_bundle):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(InvalidArgumentError, match="is no bundle"):
            BundleWriter(tmp_path / name, overwrite=True)
    (tmp_path / "empty").mkdir()
    make_bundle(tmp_path / "empty")
    assert names(tmp_path) == ["empty", "file", "thesis"]


def fail_to_sync(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_clear_line_and_the_old_bundle_stays(tmp_path: Path, make_bundle, monkeypatch):
    make_bundle(tmp_path / "toy", name="first")
    monkeypatch.setattr(writer_module.os, "fsync", fail_to_sync)
    with pytest.raises(StorageError, match="No space left on device"):
        make_bundle(tmp_path / "toy", overwrite=True, name="second")
    assert names(tmp_path) == ["toy"]
    assert Bundle.open(tmp_path / "toy").manifest.name == "first"


def test_a_rename_that_fails_puts_the_old_bundle_back(tmp_path: Path, make_bundle, monkeypatch):
    make_bundle(tmp_path / "toy", name="first")
    rename = Path.rename

    def refuse_to_publish(self: Path, target: Path) -> Path:
        if self.name.startswith(".toy.partial-"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_to_publish)
    with pytest.raises(StorageError, match="Permission denied"):
        make_bundle(tmp_path / "toy", overwrite=True, name="second")
    monkeypatch.undo()
    assert names(tmp_path) == ["toy"]
    assert Bundle.open(tmp_path / "toy").manifest.name == "first"


def test_a_text_is_replaced_at_once_or_not_at_all(tmp_path: Path, monkeypatch):
    path = tmp_path / "parity.json"
    write_text(path, "old")
    write_text(path, "new")
    monkeypatch.setattr(writer_module.os, "fsync", fail_to_sync)
    with pytest.raises(StorageError, match=r"parity\.json: cannot be written"):
        write_text(path, "never")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["parity.json"]
