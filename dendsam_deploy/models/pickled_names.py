"""Which importable names a torch checkpoint refers to, read without unpickling anything.

A pickle is a program: it imports names and calls them. Its opcodes can be listed without being executed.
"""

from __future__ import annotations

import pickletools
import sys
import zipfile
from typing import TYPE_CHECKING

from dendsam_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_LARGEST_PICKLE_BYTES = 256 << 20
_STRING_OPCODES = frozenset(
    {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
)
# Python 3 writes the old module name where it uses the protocol that torch uses.
_OLD_BUILTINS = "__builtin__."

# Of the standard library, what trainings leave in checkpoints and what only holds values.
_HARMLESS = frozenset(
    {
        *(f"builtins.{name}" for name in ("set", "frozenset", "list", "dict", "tuple", "slice", "range", "object")),
        *(f"builtins.{name}" for name in ("int", "float", "complex", "bool", "str", "bytes", "bytearray")),
        *(f"collections.{name}" for name in ("OrderedDict", "defaultdict", "Counter", "deque")),
        *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *("argparse.Namespace", "copyreg._reconstructor", "_codecs.encode", "decimal.Decimal", "fractions.Fraction"),
    }
)
_SYSTEM_MODULES = frozenset({"posix", "nt"})  # each is in the standard library's list of its own system only


def pickled_names(path: Path) -> frozenset[str]:
    """Return every ``module.name`` that unpickling a checkpoint would look up.

    Parameters
    ----------
    path : Path
        A file of ``torch.save`` (a zip archive with ``data.pkl`` in it), or a bare pickle.

    Returns
    -------
    frozenset of str
        A name that is put together while unpickling, or comes from the extension registry, cannot be known; it
        appears as ``module.name`` of the nearest strings, or as the opcode.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, cut off or no pickle at all.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: {found}; give the path of a checkpoint (.pt)")
    program = _pickle_bytes(path)
    names: set[str] = set()
    strings = ["?", "?"]
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name in _STRING_OPCODES:
                strings.append(str(argument))
            elif opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", ".", 1))
            elif opcode.name == "STACK_GLOBAL":
                names.add(f"{strings[-2]}.{strings[-1]}")
            elif opcode.name.startswith("EXT"):
                names.add(opcode.name)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a torch checkpoint ({_first_line(error)}); give a .pt file") from error
    return frozenset(
        f"builtins.{name.removeprefix(_OLD_BUILTINS)}" if name.startswith(_OLD_BUILTINS) else name for name in names
    )


def dangerous_names(names: Iterable[str]) -> list[str]:
    """Return those names that can do harm when they are called: the standard library's, but for plain values.

    Names of other packages are no proof of ill will: trainings leave objects of their own in checkpoints.
    """
    modules = sys.stdlib_module_names | _SYSTEM_MODULES
    return sorted(name for name in names if name.partition(".")[0] in modules and name not in _HARMLESS)


def _pickle_bytes(path: Path) -> bytes:
    """Return the pickle of a checkpoint, checked for size before it is read."""
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; download or copy it again")
    with path.open("rb") as file:
        starts_like_zip = file.read(4) == b"PK\x03\x04"
    if not starts_like_zip:
        if size > _LARGEST_PICKLE_BYTES:
            raise CheckpointError(f"{path}: not a torch checkpoint (no zip archive); give a .pt file")
        return path.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith("data.pkl")]
            if len(members) != 1 or members[0].file_size > _LARGEST_PICKLE_BYTES:
                raise CheckpointError(f"{path}: a zip archive without one data.pkl of sane size; give a .pt file")
            return archive.read(members[0])
    # A damaged archive fails in any of these ways, depending on where the damage lies.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint is cut off or damaged ({size:,} bytes); download or copy it again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:80] if str(error) else type(error).__name__
