"""The closed process: what it may not do, and what becomes of one that tries."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

from dendsam_deploy.errors import CheckpointError, UnsafeFileError
from dendsam_deploy.models import closed_process
from dendsam_deploy.models.closed_process import ClosedTask, run_closed

PROBES = """
import os, socket, subprocess, sys, time
from pathlib import Path
from dendsam_deploy.errors import CheckpointError, UnsafeFileError

def writes_inside(source, folder): (folder / "out").write_text("done")
def writes_outside(source, folder): source.with_name("canary").write_text("x")
def appends(source, folder): open(source, "ab")
def connects(source, folder): socket.socket().connect(("127.0.0.1", int(source.read_text())))
def starts_a_program(source, folder): subprocess.run(["touch", str(source.with_name("canary"))])
def calls_the_shell(source, folder): os.system(f"touch {source.with_name('canary')}")
def forks(source, folder): os.fork()
def unpickles(source, folder): import pickle; pickle.loads(b"cbuiltins\\nlen\\n.")
def removes(source, folder): os.remove(source)
def takes_memory(source, folder): bytearray(8 << 30)
def never_ends(source, folder):
    while True: pass
def dies(source, folder): os.abort()
def fills_the_disk(source, folder): (folder / "out").write_bytes(bytes(3 << 29))
def tells(source, folder): (folder / "out").write_text(repr((sorted(os.environ), os.getcwd())))
def refuses(source, folder): raise UnsafeFileError("not this one")
def complains(source, folder): raise CheckpointError("nor this")
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Tasks of a module that lies in a folder of its own on the path."""
    package = tmp_path / "path"
    package.mkdir()
    (package / "probes.py").write_text(PROBES)
    monkeypatch.setattr(sys, "path", [*sys.path, str(package)])
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.write_text("1")
    folder.mkdir()
    return lambda function: ClosedTask("probes", function, source, folder)


def test_it_may_read_and_write_into_its_folder(task):
    run_closed(task("writes_inside"))
    assert (task("").folder / "out").read_text() == "done"


def test_its_environment_is_empty_and_its_folder_its_own(task, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    run_closed(task("tells"))
    variables, folder = eval((task("").folder / "out").read_text())
    assert "SECRET_TOKEN" not in variables
    assert "HOME" not in variables
    assert folder == str(task("").folder)


@pytest.mark.parametrize(
    "function",
    [
        "writes_outside",
        "appends",
        "starts_a_program",
        "calls_the_shell",
        "forks",
        "unpickles",
        "removes",
        "takes_memory",
    ],
)
def test_what_it_may_not(function, task):
    with pytest.raises(CheckpointError, match="could not be read within the limits for unknown files"):
        run_closed(task(function))
    assert not task("").source.with_name("canary").exists()
    assert task("").source.read_text() == "1"


@pytest.mark.parametrize("function", ["dies", "fills_the_disk"])
def test_it_may_end_badly(function, task):
    with pytest.raises(CheckpointError, match="could not be read within the limits"):
        run_closed(task(function))


def test_it_has_no_network(task):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        task("").source.write_text(str(server.getsockname()[1]))
        with pytest.raises(CheckpointError, match=r"socket.* is refused here"):
            run_closed(task("connects"))
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_the_kernel_keeps_it_off_the_network_too():
    """Without the hook: an interface that is down, or a system that allows no namespaces."""
    program = (
        "import socket; from dendsam_deploy.models.closed_process import _leave_the_network as leave\n"
        "allowed = leave()\n"
        "try: socket.create_connection(('127.0.0.1', {port}), timeout=2); print(allowed, 'connected')\n"
        "except OSError: print(allowed, 'refused')"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = program.format(port=server.getsockname()[1])
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["True", "refused"], ["False", "connected"])


def test_it_is_stopped_in_time(task, monkeypatch):
    monkeypatch.setattr(closed_process, "TIME_LIMIT_S", 3)
    with pytest.raises(CheckpointError, match="took more than 3 s"):
        run_closed(task("never_ends"))


@pytest.mark.parametrize(("function", "kind"), [("refuses", UnsafeFileError), ("complains", CheckpointError)])
def test_its_errors_come_back_as_they_were(function, kind, task):
    with pytest.raises(kind, match=r"not this one|nor this") as caught:
        run_closed(task(function))
    assert type(caught.value) is kind


def test_detectors_are_opened_in_it_and_nowhere_else(tmp_path, monkeypatch):
    """Where no such process can be started, no detector is read."""
    from dendsam_deploy.models.detector import load_detector  # noqa: PLC0415 - ultralytics is slow to import

    network = load_detector(tmp_path / "yolo11n.yaml").network
    torch.save({"model": network}, tmp_path / "yolo.pt")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CheckpointError, match="could not be read within the limits"):
        load_detector(tmp_path / "yolo.pt")
