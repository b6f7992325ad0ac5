"""A short-lived process in which a suspicious file is read: no network, no other program, little memory and time.

It is started by its parent with an empty environment in an empty folder, imports what it needs, then closes itself:
limits of the operating system, its own network namespace where the system allows one, and an audit hook that refuses
connections, programs, native libraries, and writing anywhere but in that folder. Only then does it touch the file.

References
----------
``sys.addaudithook``, PEP 578; setrlimit(2); unshare(2).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from dendsam_deploy import errors
from dendsam_deploy.errors import CheckpointError, DendsamError

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]  # a module elsewhere

TIME_LIMIT_S = 120
_SPARE_BYTES = 1 << 30
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET of unshare(2)
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "PATH")
_START = (
    "import sys, json; request = json.load(sys.stdin); sys.path[:] = request['path']; "
    "from dendsam_deploy.models.closed_process import serve; serve(request)"
)
_REFUSED_EVENTS = (
    *("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("pty.", "ctypes.", "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "imaplib.", "poplib.", "telnetlib."),
    *("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.kill"),
    *(
        "os.putenv",
        "shutil.",
        "sys.addaudithook",
        "sys.setprofile",
        "sys.settrace",
        "code.__new__",
        "pickle.",
        "winreg.",
    ),
    *("msvcrt.", "syslog.", "mmap."),
)


@dataclass(frozen=True, slots=True)
class ClosedTask:
    """What a closed process is to do.

    Parameters
    ----------
    module, function : str
        A function of this package that takes the file and a folder to write into.
    source : Path
        The suspicious file.
    folder : Path
        An empty folder for results.
    """

    module: str
    function: str
    source: Path
    folder: Path


def run_closed(task: ClosedTask) -> None:
    """Let a closed process do something with a file.

    Raises
    ------
    DendsamError
        What the function raised, as it raised it.
    CheckpointError
        If the process exceeded its time or memory, or ended otherwise.
    """
    size = task.source.stat().st_size
    request = {
        "path": [entry for entry in sys.path if entry],
        "module": task.module,
        "function": task.function,
        "source": str(task.source.resolve()),
        "folder": str(task.folder.resolve()),
        "bytes": size,
    }
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-X", "utf8", "-c", _START],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=TIME_LIMIT_S,
            cwd=task.folder,
            env=environment | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"{task.source}: took more than {TIME_LIMIT_S} s to read; it is no usable file"
        ) from error
    answer = _answer(done.stdout)
    if answer is None:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise CheckpointError(
            f"{task.source}: could not be read within the limits for unknown files ({last[0]:.160}); save it again"
        )
    kind, message = answer
    if kind:
        raise _error_class(kind)(message)


def serve(request: dict[str, object]) -> NoReturn:
    """Do what the parent asks and tell it how that went; the beginning of the closed process."""
    source, folder = Path(str(request["source"])), Path(str(request["folder"]))
    _leave_the_network()
    function = getattr(import_module(str(request["module"])), str(request["function"]))
    _limit(int(str(request["bytes"])))
    _refuse_what_is_not_reading(folder)
    try:
        function(source, folder)
        answer = {"kind": "", "message": ""}
    except DendsamError as error:
        answer = {"kind": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # what happens at the end of an interpreter, the hook would refuse


def _answer(output: bytes) -> tuple[str, str] | None:
    """Read what a closed process told; None where it did not come to that."""
    try:
        answer = json.loads(output)
        return str(answer["kind"]), str(answer["message"])
    except (ValueError, KeyError, TypeError):
        return None


def _error_class(name: str) -> type[DendsamError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, DendsamError) else CheckpointError


def _leave_the_network() -> bool:
    """Move to a network namespace of its own, which has no interface; tell whether the system allowed it."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    return bool(library.unshare(_NEW_NETWORK) == 0 or library.unshare(_NEW_USER | _NEW_NETWORK) == 0)


def _limit(source_bytes: int) -> None:
    """Limit time, memory, files, and the size of what is written."""
    if resource is None:
        return
    limits = {
        resource.RLIMIT_CPU: TIME_LIMIT_S,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_FSIZE: 4 * source_bytes + _SPARE_BYTES,
    }
    if (used := _address_space()) is not None:
        limits[resource.RLIMIT_AS] = used + 6 * source_bytes + _SPARE_BYTES
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bound, bound))


def _address_space() -> int | None:
    """Return the bytes of address space in use; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _refuse_what_is_not_reading(folder: Path) -> None:
    """Install the audit hook; it stays to the end of the process."""
    allowed = f"{folder}{os.sep}"

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            if (writes or "w" in str(mode)) and not str(path).startswith(allowed):
                raise PermissionError(f"writing {path} is refused here")
        elif event.startswith(_REFUSED_EVENTS):
            raise PermissionError(f"{event} is refused here")

    sys.addaudithook(hook)
