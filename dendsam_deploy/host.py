"""What kind of machine this is: the facts without which a time means nothing, and no name by which to find it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch")
"""Packages whose version decides how fast graphs run."""

_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "avx_vnni", "asimd")
"""Instruction sets that engines choose their kernels by."""

_DECISIVE = ("processor", "architecture", "instructions", "cpu_cores", "gpus")
"""Two machines that differ in one of these cannot be compared by their times."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """A machine, as far as it decides how long something takes.

    Parameters
    ----------
    processor : str
        Name of its model, with the numbers of family and model where the name alone says little.
    architecture : str
        Such as ``x86_64``.
    instructions : tuple of str
        Instruction sets for matrix products that the processor has, where the system lists them.
    cpu_cores : int
        Cores that this process may use.
    memory_gib : float or None
        Main memory, where the system tells.
    gpus : tuple of str
        Names of the NVIDIA GPUs.
    gpu_driver : str or None
        Version of their driver.
    system, python : str
        Operating system with its version, and version of Python.
    packages : dict
        Installed versions of the packages that execute graphs.
    load_average : float or None
        Processes that ran or waited during the last minute, where the system tells: 0 is an idle machine.
    """

    processor: str
    architecture: str
    instructions: tuple[str, ...]
    cpu_cores: int
    memory_gib: float | None
    gpus: tuple[str, ...]
    gpu_driver: str | None
    system: str
    python: str
    packages: dict[str, str]
    load_average: float | None

    def to_document(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def examine_host() -> HostFacts:
    """Look at this machine."""
    gpus, driver = _nvidia_gpus()
    return HostFacts(
        processor=_processor(),
        architecture=platform.machine(),
        instructions=_instructions(),
        cpu_cores=cpu_cores(),
        memory_gib=memory_gib(),
        gpus=gpus,
        gpu_driver=driver,
        system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}".strip(),
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name)) is not None},
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Say in what two machines, as `HostFacts.to_document` describes them, differ so much that times say nothing."""
    return [
        f"{name} {one.get(name)!r} and {other.get(name)!r}" for name in _DECISIVE if one.get(name) != other.get(name)
    ]


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float | None:
    """Return the size of the main memory where the system tells it."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def gpu_memory_in_use_mb(index: int) -> float | None:
    """Return how much memory of an NVIDIA GPU all processes together use, MB; None where that cannot be known.

    Parameters
    ----------
    index : int
        The GPU as this process counts them, which ``CUDA_VISIBLE_DEVICES`` decides.
    """
    physical = _physical_index(index, os.environ.get("CUDA_VISIBLE_DEVICES"))
    with _nvidia_library() as library:
        if library is None or physical is None:
            return None
        device, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
        if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(physical), ctypes.byref(device)):
            return None
        if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)):
            return None
        return float(memory[2]) / 1e6


def gpu_name(index: int) -> str | None:
    """Return the name of an NVIDIA GPU as this process counts them; None where that cannot be known."""
    names, _ = _nvidia_gpus()
    physical = _physical_index(index, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return names[physical] if physical is not None and physical < len(names) else None


def _physical_index(index: int, visible: str | None) -> int | None:
    """Return the number of a GPU among all of the machine; None where the visible ones are named in another way.

    Examples
    --------
    >>> _physical_index(1, None), _physical_index(1, "2,5"), _physical_index(0, "GPU-8f1c")
    (1, 5, None)
    """
    if visible is None:
        return index
    numbers = visible.split(",")
    return int(numbers[index]) if index < len(numbers) and numbers[index].strip().isdecimal() else None


def _nvidia_gpus() -> tuple[tuple[str, ...], str | None]:
    """Return the names of the NVIDIA GPUs and the version of their driver."""
    with _nvidia_library() as library:
        if library is None:
            return (), None
        count, text = ctypes.c_uint(), ctypes.create_string_buffer(96)
        names = []
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            device = ctypes.c_void_p()
            if not library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)):
                library.nvmlDeviceGetName(device, text, ctypes.c_uint(len(text)))
                names.append(text.value.decode(errors="replace"))
        failed = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
        return tuple(names), None if failed else text.value.decode(errors="replace")


@contextmanager
def _nvidia_library() -> Iterator[Any]:
    """Open NVIDIA's management library, which comes with the driver; None where there is none.

    References
    ----------
    NVML API reference, docs.nvidia.com/deploy/nvml-api. Every function returns 0 where it succeeds.
    """
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    if library.nvmlInit_v2():
        yield None
        return
    try:
        yield library
    finally:
        library.nvmlShutdown()


def _cpu_info() -> dict[str, str]:
    """Return the lines of the first processor in Linux's list of them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _processor() -> str:
    """Return the model of the processor, or its family where nothing better is known."""
    info = _cpu_info()
    if "cpu family" in info:  # virtual machines hide the name of the model, not its number
        return f"{info.get('model name', 'unnamed')} (family {info['cpu family']}, model {info.get('model')})"
    return info.get("model name") or platform.processor() or platform.machine()


def _instructions() -> tuple[str, ...]:
    """Return the instruction sets that matter, of those that Linux lists."""
    info = _cpu_info()
    listed = f"{info.get('flags', '')} {info.get('Features', '')}".split()
    return tuple(name for name in _INSTRUCTIONS if name in listed)


def _version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
