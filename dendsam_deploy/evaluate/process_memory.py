"""How much main memory a process has needed, for a while and not only since it began."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]  # a module elsewhere

_CLEAR_REFERENCES, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"


class PeakMemory:
    """The peak of this process's resident memory since this object was made, or was last asked.

    Linux can set the mark of the peak back to the present size. Where that is not possible, a peak is known only if it
    is higher than every one before it.
    """

    def __init__(self) -> None:
        self._can_reset = False
        self._before_mb = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin anew: what was needed before does not count any more."""
        self._can_reset = _reset()
        self._before_mb = 0.0 if self._can_reset else _peak_since_start_mb() or 0.0

    def peak_mb(self) -> float | None:
        """Return the peak in MB (10^6 bytes); None where the system does not tell it, or has seen a higher one before.

        References
        ----------
        proc(5), ``VmHWM`` in /proc/pid/status and /proc/pid/clear_refs; getrusage(2).
        """
        peak = _high_water_mark_mb() if self._can_reset else _peak_since_start_mb()
        return None if peak is None or peak <= self._before_mb else peak


def _reset() -> bool:
    """Set the kernel's mark back; tell whether that was possible."""
    with suppress(OSError):
        _CLEAR_REFERENCES.write_text(_RESET_PEAK)
        return True
    return False


def _high_water_mark_mb() -> float | None:
    """Return the mark that `_reset` sets back."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def _peak_since_start_mb() -> float | None:
    """Return the largest size that this process ever had."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB elsewhere
