"""What this machine can run, and why not. Engines are not asked whether they are installed but made to run a graph."""

from __future__ import annotations

import dataclasses
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from dendsam_deploy.host import cpu_cores, memory_gib
from dendsam_deploy.runtimes.choice import PLACES
from dendsam_deploy.runtimes.probe import NO_DRIVER, why_not
from dendsam_deploy.runtimes.session import ENGINES, SessionOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGE = "dendsam-deploy"

_EXTRAS: Mapping[str, str] = MappingProxyType({"train": "finetune, export, demo, and verify against the weights"})
"""The extras that commands of this version use, and for what."""

_REMEDIES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("cpu", "onnxruntime"): f"pip install -U {_PACKAGE}",
        ("cuda", "onnxruntime"): "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        ("cuda", "onnxruntime+tensorrt"): "pip install 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt<11'",
        ("cpu", "openvino"): f"pip install '{_PACKAGE}[openvino]'",
        ("cuda", "tensorrt"): f"pip install '{_PACKAGE}[tensorrt]'",
        ("cpu", "torch"): f"pip install '{_PACKAGE}[train]'",
        ("cuda", "torch"): f"pip install '{_PACKAGE}[train]'",
        ("cpu", "torch+package"): f"pip install '{_PACKAGE}[train]', and a C++ compiler",
        ("cuda", "torch+package"): f"pip install '{_PACKAGE}[train]', and a C++ compiler",
    }
)
"""What makes an engine work on a kind of device where its package is missing or broken."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that commands can ask for.

    Parameters
    ----------
    kind : str
        ``engine`` or ``extra``.
    name : str
        As on the command line; an engine with its device.
    available : bool
        Whether it works here.
    detail : str
        What it is good for, or why it does not work.
    remedy : str
        What to do about that, such as a line for pip; empty where there is nothing to do.
    """

    kind: Literal["engine", "extra"]
    name: str
    available: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class MachineReport:
    """What was found on a machine.

    Parameters
    ----------
    python, platform : str
        Version and name.
    cpu_cores : int
        Cores that this process may use.
    memory_gib : float or None
        Main memory, where the system tells.
    packages : dict
        Installed versions of the packages that this program needs for deploying.
    findings : tuple of Finding
        Engines and extras.
    """

    python: str
    platform: str
    cpu_cores: int
    memory_gib: float | None
    packages: dict[str, str]
    findings: tuple[Finding, ...]

    def to_document(self) -> dict[str, object]:
        """Return the report as plain values: the content of ``doctor --json``."""
        return dataclasses.asdict(self)


def examine_machine() -> MachineReport:
    """Try every engine on every kind of device, and see which extras are complete."""
    engines = [_try_engine(engine, device) for device, engine in PLACES if engine in ENGINES]
    extras = [_look_for_extra(name, use) for name, use in _EXTRAS.items()]
    return MachineReport(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu_cores=cpu_cores(),
        memory_gib=memory_gib(),
        packages={name: version for name in _required_packages("") if (version := _version(name)) is not None},
        findings=(*engines, *extras),
    )


def _try_engine(engine: str, device: str) -> Finding:
    """Run a graph of one node on an engine and device."""
    name = f"{engine} on {device}"
    reason = why_not(ENGINES[engine], "cpu" if device == "cpu" else "cuda:0", SessionOptions(engine))
    if reason is None:
        return Finding("engine", name, True, "runs a graph")
    if reason == NO_DRIVER:
        return Finding("engine", name, False, reason, "needs an NVIDIA GPU and its driver")
    return Finding("engine", name, False, reason, _REMEDIES[device, engine])


def _look_for_extra(extra: str, use: str) -> Finding:
    """Tell whether all packages of an extra are installed."""
    versions = {name: _version(name) for name in _required_packages(extra)}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Finding(
            "extra", extra, False, f"{use}: lacks {', '.join(missing)}", f"pip install '{_PACKAGE}[{extra}]'"
        )
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("extra", extra, True, f"{use}: {listed}")


def _required_packages(extra: str) -> list[str]:
    """Return the names of the packages that this program, or an extra of it, needs on this system.

    Of requirements with a condition about the system, those that are installed are taken to be meant.
    """
    names = []
    for requirement in metadata.requires(_PACKAGE) or []:
        name, _, condition = requirement.partition(";")
        wanted = re.search(r"""extra\s*==\s*["'](\w+)["']""", condition)
        bare = re.split(r"[\s<>=!~\[(]", name.strip(), maxsplit=1)[0]
        other_system = "sys_platform" in condition and _version(bare) is None
        if (wanted[1] if wanted else "") == extra and not other_system:
            names.append(bare)
    return names


def _version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
