"""Which importable names a torch checkpoint refers to, and which of them no checkpoint needs.

Reading a checkpoint here looks up none of them. A file that names what could do harm elsewhere is refused all the same:
it was made to be opened by somebody.
"""

from __future__ import annotations

import builtins
import re
import sys
from typing import TYPE_CHECKING

from dendsam_deploy.errors import UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def _is_exception(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


# Of the standard library, what trainings leave in checkpoints and what only holds values.
_HARMLESS = frozenset(
    {
        *(f"builtins.{name}" for name in ("set", "frozenset", "list", "dict", "tuple", "slice", "range", "object")),
        *(f"builtins.{name}" for name in ("int", "float", "complex", "bool", "str", "bytes", "bytearray", "iter")),
        *(f"builtins.{name}" for name in ("abs", "all", "any", "len", "max", "min", "pow", "round", "sorted", "sum")),
        *(f"builtins.{name}" for name in ("Ellipsis", "NotImplemented", "type", "enumerate", "zip", "print")),
        *(f"builtins.{name}" for name, kind in vars(builtins).items() if _is_exception(kind)),
        "builtins.getattr",  # of an object that is itself harmless: what it looks up is a name of its own
        *(f"collections.{name}" for name in ("OrderedDict", "defaultdict", "Counter", "deque", "ChainMap")),
        *(f"collections.{name}" for name in ("UserDict", "UserList", "UserString", "namedtuple")),
        *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *(f"itertools.{name}" for name in ("chain", "count", "cycle", "repeat")),
        *("argparse.Namespace", "copyreg._reconstructor", "_codecs.encode", "decimal.Decimal", "fractions.Fraction"),
        *("functools.partial", "logging.getLogger", "random.Random", "re._compile", "types.SimpleNamespace"),
        *("uuid.UUID", "uuid.SafeUUID", "time.struct_time", "types.MappingProxyType", "types.NoneType", "io.BytesIO"),
        *("array.array", "array._array_reconstructor", "zoneinfo.ZoneInfo", "zoneinfo.ZoneInfo._unpickle"),
        *("logging.Logger", "logging.RootLogger", "enum.Enum", "inspect._empty", "dataclasses._MISSING_TYPE"),
        *(f"operator.{name}" for name in ("itemgetter", "add", "sub", "mul", "truediv", "neg", "eq", "lt", "gt")),
    }
)
"""Without the getters of attributes in `operator`: what they are asked for is no name that one could find."""

_HARMLESS_MODULES = ("math.", "numbers.", "typing.")
_IN_C = ("_io.", "_operator.", "_functools.", "_collections.", "_decimal.", "_zoneinfo.")
_SYSTEM_MODULES = frozenset({"posix", "nt", "commands"})  # each is in the list of its own system or version only

_INTERNAL = re.compile("__.+__")  # by which one gets from any object to any other

# Of other packages, what opens files of code, fetches, installs or runs.
_RUNS_CODE = (
    *("torch.load", "torch.hub", "torch.jit", "torch.package", "torch.serialization", "torch.classes", "torch.ops"),
    *("torch.utils.cpp_extension", "torch.utils.collect_env", "torch.multiprocessing", "torch.distributed.rpc"),
    *("torch._inductor", "torch._dynamo", "torch.storage._load_from_bytes", "torch.utils.model_zoo"),
    *("numpy.load", "numpy.testing", "numpy.f2py", "numpy.distutils", "numpy.ctypeslib", "numpy.memmap", "scipy.io"),
    *("pip", "setuptools", "pkg_resources", "_distutils_hack", "requests", "urllib3", "httpx", "aiohttp", "paramiko"),
    *("dill", "cloudpickle", "joblib", "jsonpickle", "yaml", "pandas.read_pickle", "pandas.eval", "pandas.io", "cffi"),
    *("torch.save", "torch.fx.graph_module", "torch.fx.experimental", "torch.utils.bottleneck"),
    *("torch.utils._config_module", "torch.utils.data.datapipes", "torch.distributed.run"),
    *("numpy.save", "numpy.savetxt", "numpy.savez", "numpy.lib.npyio", "numpy.lib._npyio_impl", "numpy.lib.format"),
    *("hydra", "keras", "tensorflow", "_pytest", "pytest", "psutil", "git", "huggingface_hub", "timm.models.hub"),
    *("ultralytics.nn.tasks.torch_safe_load", "ultralytics.nn.tasks.attempt_load_weights", "ultralytics.utils.checks"),
    *("ultralytics.utils.downloads", "ultralytics.hub", "lightning_fabric.utilities.cloud_io"),
    *("IPython", "ipykernel", "jupyter_client", "numexpr", "sympy", "pexpect", "sh", "plumbum", "fabric", "invoke"),
)


def dangerous_names(names: Iterable[str]) -> list[str]:
    """Return those names that can do harm when they are called: the standard library's, but for plain values.

    Names of other packages are no proof of ill will, but for some that exist to run or fetch code: trainings leave
    objects of their own in checkpoints.
    """
    modules = sys.stdlib_module_names | _SYSTEM_MODULES
    found = []
    for name in names:
        is_foreign_code = any(name == known or name.startswith(f"{known}.") for known in _RUNS_CODE)
        public = name.removeprefix("_") if name.startswith(_IN_C) else name
        is_harmless = public in _HARMLESS or name.startswith(_HARMLESS_MODULES)
        is_standard = name.partition(".")[0] in modules and not is_harmless
        is_internal = any(_INTERNAL.fullmatch(part) and part != "__main__" for part in name.split("."))
        if is_foreign_code or is_standard or is_internal:
            found.append(name)
    return sorted(found)


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint that names what no weights need.

    Raises
    ------
    UnsafeFileError
        With the first of these names.
    """
    if dangerous := dangerous_names(names):
        raise UnsafeFileError(
            f"{path}: loading it would call {', '.join(dangerous[:2])}, which no weights need; "
            "it was not loaded: do not trust where it comes from"
        )
