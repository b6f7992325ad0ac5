"""TensorRT itself, or the line that installs it; the home of ``tensorrt``.

The code above this file uses only what version 10.16 and version 11.4 both have. Type checkers prove it against the
signatures of both.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dendsam_deploy.errors import MissingCapabilityError

try:
    import tensorrt
except (ImportError, OSError) as error:  # also where one of its libraries is missing
    raise MissingCapabilityError(
        f"engine tensorrt: the package does not load ({error}); run: pip install 'dendsam-deploy[tensorrt]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import TypeAlias

__all__ = ["CollectingLogger", "tensorrt", "tensorrt_errors", "tensorrt_version"]

_Severity: TypeAlias = "tensorrt.ILogger.Severity"


def tensorrt_version() -> str:
    """Return the version of the installed TensorRT, such as ``11.4.0.106``."""
    return str(vars(tensorrt)["__version__"])


class CollectingLogger(tensorrt.ILogger):
    """Keeps what TensorRT says is wrong, for the message of the exception that follows.

    Parameters
    ----------
    kept : int
        Most messages that are kept; the latest ones.
    """

    def __init__(self, kept: int = 8) -> None:
        tensorrt.ILogger.__init__(self)
        self._messages: deque[str] = deque(maxlen=kept)

    def log(self, severity: _Severity, msg: str) -> None:
        """Take a message."""
        if severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR):
            self._messages.append(" ".join(msg.split()))

    def take(self) -> str:
        """Return the messages as one line, and forget them."""
        text = "; ".join(dict.fromkeys(self._messages))
        self._messages.clear()
        return text[:1000] or "TensorRT gave no reason"


@contextmanager
def tensorrt_errors(path: Path, logger: CollectingLogger) -> Iterator[None]:
    """Turn what TensorRT's binding raises into an error that names the graph and what TensorRT said.

    Raises
    ------
    MissingCapabilityError
        In place of the binding's exceptions.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise MissingCapabilityError(
            f"{path}: TensorRT {tensorrt_version()} failed ({type(error).__name__}: {error}; {logger.take()}); "
            "free memory of the GPU, or choose --engine onnxruntime"
        ) from error
