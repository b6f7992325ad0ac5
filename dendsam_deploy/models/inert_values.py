"""What stands for the things that a pickle names or would have made, and for the keys of its dicts."""

from __future__ import annotations

from dataclasses import dataclass

_LONGEST_KEY = 16
_LARGEST_KEY = 1 << 60  # hashes of larger integers could be made to collide

_SCALARS = (str, bytes, bool, float, type(None))


@dataclass(frozen=True, slots=True)
class Name:
    """An importable name, as the pickle writes it; it was not looked up."""

    dotted: str


@dataclass(slots=True, eq=False)
class Placeholder:
    """What a call would have made.

    Parameters
    ----------
    maker : str
        Dotted name of what would have been called.
    arguments : object
        What it would have been called with.
    state : object
        What would have become its attributes.
    """

    maker: str
    arguments: object = ()
    state: object = None

    def __repr__(self) -> str:
        """Return the maker's name: arguments may contain the object itself."""
        return f"<{self.maker}>"


def as_key(value: object) -> object:
    """Return what stands for a value as a key of a dict: plain and short ones themselves, others a new placeholder."""
    if isinstance(value, tuple) and len(value) <= _LONGEST_KEY and all(map(_is_plain, value)):
        return value
    return value if _is_plain(value) or isinstance(value, Name | Placeholder) else Placeholder("key", value)


def _is_plain(value: object) -> bool:
    if isinstance(value, int):
        return -_LARGEST_KEY < value < _LARGEST_KEY
    return isinstance(value, _SCALARS)


def dotted_name(function: object) -> str:
    """Return the name of what is called; the result of any number of other calls is named after the first of them."""
    if isinstance(function, Name):
        return function.dotted
    if not isinstance(function, Placeholder):
        return type(function).__name__
    # A name that grew with every call of a call would need the square of the file's size.
    return function.maker if function.maker.endswith("()") else f"{function.maker}()"
