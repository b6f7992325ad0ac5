"""Reads pickles as data: containers, numbers and strings are built; nothing that a pickle names is imported or called.

A pickle is a program: its instructions import names and call them. Here its instructions are carried out by a machine
that has none for either. A name stays a `Name`, and what a call would have made is an inert `Placeholder` that keeps
the arguments and the state as data. The few calls that only put plain values together (an ordered dict, the view of a
stored tensor) are carried out by functions of this program that the caller hands in.

Work is counted, so that no file, however it was made, keeps the machine busy for more than some seconds.

References
----------
``pickletools`` of the standard library describes every instruction.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from dendsam_deploy.models.inert_values import Name, Placeholder, as_key, dotted_name

if TYPE_CHECKING:
    from collections.abc import Mapping

Rebuild = dict[str, Callable[..., object]]

MOST_WORK = 3_000_000
"""Instructions and copied elements of one pickle. Training checkpoints of ViT-H need some 100,000."""

_LONGEST_NAME = 300

LARGEST_PICKLE_BYTES = 512 << 20
"""Trainings may leave whole image stacks in the pickle itself, beside the tensors."""


class PickleError(ValueError):
    """The bytes are no pickle, are cut off, or ask for more work than any checkpoint needs."""


@dataclass(frozen=True, slots=True)
class Unpickled:
    """A pickle as data.

    Parameters
    ----------
    value : object
        Of plain containers, numbers, strings, names and placeholders.
    names : frozenset of str
        Every dotted name that it mentions.
    calls : frozenset of str
        Those of them that it would have called, apart from constructing an object without its constructor.
    """

    value: object
    names: frozenset[str]
    calls: frozenset[str]


class BoundedStream:
    """A file that never reads, nor makes room for, more than what is left of a share of it.

    Parameters
    ----------
    file : BinaryIO
        Open for reading, at the beginning of the share.
    size : int
        Bytes that may be read.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        found = self._file.read(max(0, min(size, self._left)))
        self._left -= len(found)
        return found

    def readline(self) -> bytes:
        """Read to the end of a line."""
        found = self._file.readline(self._left)
        self._left -= len(found)
        return found

    def tell(self) -> int:
        """Return the position in the file."""
        return self._file.tell()


def read_pickle(
    stream: BoundedStream,
    rebuild: Rebuild | None = None,
    persistent: Callable[[object], object] | None = None,
    seen: set[str] | None = None,
) -> Unpickled:
    """Read one pickle; the stream then stands behind it.

    Parameters
    ----------
    stream : BoundedStream
        Where it begins.
    rebuild : dict, optional
        Functions to use where the pickle calls a name; they must not do more than put their arguments together. An
        ordered dict is known without them.
    persistent : callable, optional
        Makes an object of a persistent identifier; by default such an object becomes a placeholder.
    seen : set of str, optional
        Gets every name as it is met: what a pickle names before it breaks off is called elsewhere all the same.

    Raises
    ------
    PickleError
        Where the bytes are not one whole pickle.
    """
    machine = _Machine(_CONTAINERS | (rebuild or {}), persistent, set() if seen is None else seen)
    try:
        for instruction, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]  # it needs no more
            machine.carry_out(instruction.name, argument)
    except PickleError:
        raise
    # Whatever damaged or hostile bytes lead to: an empty stack, a missing memo, wrong arguments.
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise PickleError(_first_line(error)) from error
    except MemoryError as error:
        raise PickleError("needs more memory than there is") from error
    return Unpickled(machine.result, frozenset(machine.names), frozenset(machine.calls))


@dataclass(slots=True)
class _Machine:
    """The stack, the memo and the marks of a pickle that is being read."""

    rebuild: Mapping[str, Callable[..., object]]
    persistent: Callable[[object], object] | None
    names: set[str]
    calls: set[str] = field(default_factory=set)
    result: object = None
    _stack: list[Any] = field(default_factory=list)
    _marks: list[int] = field(default_factory=list)
    _memo: dict[int, object] = field(default_factory=dict)
    _work: int = 0

    def carry_out(self, instruction: str, argument: object) -> None:
        """Carry out one instruction."""
        self._spend(1)
        if instruction in _ARGUMENT_ITSELF:
            self._stack.append(argument)
        elif instruction in _CONSTANTS:
            self._stack.append(_CONSTANTS[instruction])
        elif instruction in _EMPTY:
            self._stack.append(_EMPTY[instruction]())
        elif instruction in _WITH_ARGUMENT:
            _WITH_ARGUMENT[instruction](self, argument)
        elif instruction in _WITHOUT_ARGUMENT:
            _WITHOUT_ARGUMENT[instruction](self)
        elif instruction not in ("PROTO", "FRAME"):
            raise PickleError(f"the instruction {instruction} belongs to no checkpoint")

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MOST_WORK:
            raise PickleError(f"takes more than {MOST_WORK:,} steps")

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        found = self._stack[start:]
        del self._stack[start:]
        return found

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def stop(self) -> None:
        self.result = self._stack.pop()

    def pop(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def pop_mark(self) -> None:
        self._since_mark()

    def duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    def recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def memorise(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memorise_next(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def list_of_marked(self) -> None:
        self._stack.append(self._since_mark())

    def tuple_of_marked(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def set_of_marked(self) -> None:
        self._stack.append({as_key(value) for value in self._since_mark()})

    def dict_of_marked(self) -> None:
        pairs = self._since_mark()
        self._stack.append({})
        self._set_items(pairs)

    def tuple_of_last(self, length: int) -> None:
        found = tuple(self._stack[-length:])
        if len(found) < length:
            raise PickleError("a tuple of more values than there are")
        del self._stack[-length:]
        self._stack.append(found)

    def append(self) -> None:
        self._extend([self._stack.pop()])

    def append_marked(self) -> None:
        self._extend(self._since_mark())

    def add_marked(self) -> None:
        values = self._since_mark()
        if isinstance(self._stack[-1], set):
            self._stack[-1].update(as_key(value) for value in values)

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def set_marked_items(self) -> None:
        self._set_items(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        # A list of a class of its own is a placeholder, whose content nobody asks for.
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(values)

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                target[as_key(key)] = value

    def name(self, text: str) -> None:
        module, _, attribute = text.partition(" ")
        self._name(module, attribute)

    def name_from_stack(self) -> None:
        attribute, module = self._stack.pop(), self._stack.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise PickleError("a name that is no string")
        self._name(module, attribute)

    def _name(self, module: str, attribute: str) -> None:
        module, attribute = NAME_MAPPING.get((module, attribute), (IMPORT_MAPPING.get(module, module), attribute))
        self._look_up(f"{module}.{attribute}")

    def extension(self, code: object) -> None:
        # Which name this is, the registry of the process that unpickles would say.
        self._look_up(f"copyreg.extension_{code}")

    def _look_up(self, dotted: str) -> None:
        if len(dotted) > _LONGEST_NAME or not dotted.isprintable():
            raise PickleError("a name that is none")
        self.names.add(dotted)
        self._stack.append(Name(dotted))

    def call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._called(function, arguments))

    def construct_marked(self) -> None:
        function, *arguments = self._since_mark()
        self._stack.append(self._called(function, tuple(arguments)))

    def construct_named(self, text: str) -> None:
        arguments = tuple(self._since_mark())
        self.name(text)
        self._stack.append(self._called(self._stack.pop(), arguments))

    def new_object(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        self._stack.append(self._new(kind, arguments))

    def new_object_by_keywords(self) -> None:
        keywords, arguments, kind = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._stack.append(self._new(kind, (arguments, keywords)))

    def _new(self, kind: object, arguments: object) -> object:
        name = dotted_name(kind)
        return {} if name in _CONTAINERS else Placeholder(name, arguments)

    def _called(self, function: object, arguments: object) -> object:
        name = dotted_name(function)
        self.calls.add(name)
        if name == "builtins.getattr" and isinstance(arguments, tuple) and len(arguments) >= 2:
            if not isinstance(arguments[1], str):
                raise PickleError("an attribute whose name is no string")
            self._look_up(f"{dotted_name(arguments[0])}.{arguments[1]}")
            return self._stack.pop()
        make = self.rebuild.get(name)
        if make is None or not isinstance(arguments, tuple):
            return Placeholder(name, arguments)
        self._spend(sum(len(part) for part in arguments if isinstance(part, list | dict | tuple)))
        return make(*arguments)

    def build(self) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Placeholder):
            self._stack[-1].state = state

    def persistent_from_stack(self) -> None:
        self.persistent_named(self._stack.pop())

    def persistent_named(self, identifier: object) -> None:
        known = self.persistent
        self._stack.append(Placeholder("persistent", identifier) if known is None else known(identifier))


def _ordered(*arguments: object) -> dict[object, object]:
    """Make a dict of a dict or a list of pairs, as OrderedDict does; other arguments (a factory) do not matter."""
    content = arguments[-1] if arguments else ()
    if isinstance(content, dict):
        return dict(content)
    pairs = content if isinstance(content, list | tuple) else ()
    return {as_key(pair[0]): pair[1] for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:80] if str(error) else type(error).__name__


_CONTAINERS: Rebuild = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _ordered,
    "collections.Counter": _ordered,
    "builtins.dict": _ordered,
}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

_EMPTY: dict[str, Callable[[], object]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}

_ARGUMENT_ITSELF = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)

_WITH_ARGUMENT: dict[str, Callable[[_Machine, Any], None]] = {
    "GET": _Machine.recall,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "PUT": _Machine.memorise,
    "BINPUT": _Machine.memorise,
    "LONG_BINPUT": _Machine.memorise,
    "GLOBAL": _Machine.name,
    "INST": _Machine.construct_named,
    "PERSID": _Machine.persistent_named,
    "EXT1": _Machine.extension,
    "EXT2": _Machine.extension,
    "EXT4": _Machine.extension,
}

_WITHOUT_ARGUMENT: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "STOP": _Machine.stop,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "MEMOIZE": _Machine.memorise_next,
    "LIST": _Machine.list_of_marked,
    "TUPLE": _Machine.tuple_of_marked,
    "TUPLE1": lambda machine: machine.tuple_of_last(1),
    "TUPLE2": lambda machine: machine.tuple_of_last(2),
    "TUPLE3": lambda machine: machine.tuple_of_last(3),
    "FROZENSET": _Machine.set_of_marked,
    "DICT": _Machine.dict_of_marked,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_marked,
    "ADDITEMS": _Machine.add_marked,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_marked_items,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.call,
    "OBJ": _Machine.construct_marked,
    "NEWOBJ": _Machine.new_object,
    "NEWOBJ_EX": _Machine.new_object_by_keywords,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_from_stack,
}
