"""Records of a bundle as JSON: dataclasses are read back from JSON values, every one of which is checked.

A field's annotation says what its value may be: ``str``, ``int``, ``bool``, a finite ``float``, words of a `Literal`,
another dataclass, ``tuple[X, ...]``, ``dict[str, X]``, alternatives with ``|``, or `Any`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal, TypeVar

Record = TypeVar("Record")

_LONGEST_QUOTE = 80


class RecordError(ValueError):
    """A JSON text is not the record that it should be; names the place, what was found, and what was expected."""


def object_from_json(text: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    RecordError
        Where the text is no JSON, nested too deeply, holds absurd numbers, or is something else than an object.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:  # the former also for an integer of thousands of digits
        raise RecordError(f"not JSON ({error})") from error
    if not isinstance(document, dict):
        raise RecordError(f"the file holds {_quoted(document)}, expected an object")
    return document


def record_from_json(kind: type[Record], value: object, where: str, *, is_strict: bool) -> Record:
    """Build a dataclass from a JSON object.

    Parameters
    ----------
    kind : type
        The dataclass.
    value : object
        The JSON value.
    where : str
        Its place in the file, for messages.
    is_strict : bool
        Whether every key must be there and none that is unknown. Otherwise fields that have a default may be missing,
        and what a later version added is passed over.

    Raises
    ------
    RecordError
        Names the place, what was found and what was expected.
    """
    if not isinstance(value, dict):
        raise RecordError(f"{where} is {type(value).__name__}, expected an object")
    fields = {field.name: field for field in dataclasses.fields(typing.cast("Any", kind))}
    if is_strict and (unknown := sorted(value.keys() - fields.keys())):
        raise RecordError(f"{where} has the unknown key {unknown[0]!r}; known are {sorted(fields)}")
    needed = {name for name, field in fields.items() if is_strict or not _has_default(field)}
    if missing := sorted(needed - value.keys()):
        raise RecordError(f"{where} lacks the key {missing[0]!r}")
    hints = typing.get_type_hints(kind)
    found = fields.keys() & value.keys()
    return kind(
        **{name: _value(hints[name], value[name], f"{where}.{name}", is_strict) for name in fields if name in found}
    )


def _has_default(field: dataclasses.Field[Any]) -> bool:
    """Tell whether a field may be left out."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _value(hint: Any, value: Any, where: str, is_strict: bool) -> object:  # noqa: ANN401 - whatever an annotation allows, and whatever JSON holds
    """Convert one JSON value to the annotated type, or say what is wrong with it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # the latter where a Literal is part of it
        options = [option for option in arguments if option is not types.NoneType]
        if value is None and len(options) < len(arguments):
            return None
        if len(options) == 1:
            return _value(options[0], value, where, is_strict)
        hint = next((option for option in options if _is_plain(option, value)), hint)
    if dataclasses.is_dataclass(hint):
        return record_from_json(typing.cast("type[Any]", hint), value, where, is_strict=is_strict)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, f"{where}[{i}]", is_strict) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}", is_strict) for key, item in value.items()}
    if _is_plain(hint, value):
        return float(value) if hint is float else value
    raise RecordError(f"{where} is {_quoted(value)}, expected {_described(hint)}")


def _is_plain(hint: object, value: object) -> bool:
    """Tell whether a JSON value is of a type that has no parts."""
    if hint is Any:
        return True
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    return isinstance(hint, type) and hint in (int, str, bool) and type(value) is hint


def _is_finite(value: float) -> bool:
    """Tell whether a number is one of floating point; integers have no limit in JSON."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _described(hint: object) -> str:
    """Name a type the way a person would write it."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _quoted(value: object) -> str:
    """Write a value as Python does, if that is not too long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
