"""Which importable names a torch checkpoint refers to, and which of them no checkpoint needs.

Reading a checkpoint here looks up none of them. A file that names what could do harm elsewhere is refused all the same:
it was made to be opened by somebody.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from dendsam_deploy.errors import UnsafeFileError
from dendsam_deploy.models.tensor_file import open_tensor_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Of the standard library, what trainings leave in checkpoints and what only holds values.
_HARMLESS = frozenset(
    {
        *(f"builtins.{name}" for name in ("set", "frozenset", "list", "dict", "tuple", "slice", "range", "object")),
        *(f"builtins.{name}" for name in ("int", "float", "complex", "bool", "str", "bytes", "bytearray", "iter")),
        *(f"builtins.{name}" for name in ("abs", "all", "any", "len", "max", "min", "pow", "round", "sorted", "sum")),
        "builtins.getattr",  # of an object that is itself harmless: what it looks up is a name of its own
        *(f"collections.{name}" for name in ("OrderedDict", "defaultdict", "Counter", "deque")),
        *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *(f"itertools.{name}" for name in ("chain", "count", "cycle", "repeat")),
        *("argparse.Namespace", "copyreg._reconstructor", "_codecs.encode", "decimal.Decimal", "fractions.Fraction"),
        *("functools.partial", "logging.getLogger", "random.Random", "re._compile", "types.SimpleNamespace"),
        *("uuid.UUID", "time.struct_time"),
    }
)
_HARMLESS_MODULES = ("math.", "numbers.", "typing.")
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
    *("IPython", "ipykernel", "jupyter_client", "numexpr", "sympy", "pexpect", "sh", "plumbum", "fabric", "invoke"),
)


def pickled_names(path: Path) -> frozenset[str]:
    """Return every ``module.name`` that unpickling a checkpoint would look up.

    Parameters
    ----------
    path : Path
        A file of ``torch.save``, in its present or its older format, or a bare pickle.

    Returns
    -------
    frozenset of str
        Modules and names of Python 2 under their present names. What the pickle would take from the extension registry
        appears as ``copyreg.extension_CODE``, what it would look up in another object as ``module.name.attribute``.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, cut off or no pickle at all.
    """
    with open_tensor_file(path) as file:
        return file.pickled.names


def dangerous_names(names: Iterable[str]) -> list[str]:
    """Return those names that can do harm when they are called: the standard library's, but for plain values.

    Names of other packages are no proof of ill will, but for some that exist to run or fetch code: trainings leave
    objects of their own in checkpoints.
    """
    modules = sys.stdlib_module_names | _SYSTEM_MODULES
    found = []
    for name in names:
        is_foreign_code = any(name == known or name.startswith(f"{known}.") for known in _RUNS_CODE)
        is_harmless = name in _HARMLESS or name.startswith(_HARMLESS_MODULES)
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
