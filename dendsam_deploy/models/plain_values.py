"""Values of an unknown file in plain terms: bounded in number, depth and length, whatever refers to whatever in it."""

from __future__ import annotations

from typing import Any

from dendsam_deploy.errors import CheckpointError
from dendsam_deploy.models.inert_values import Placeholder

_DEEPEST, _MOST_VALUES, _LONGEST_TEXT = 40, 50_000, 4000
_LARGEST_NUMBER = 1 << 63


class PlainValues:
    """Turns values into what JSON can write; others into a word in angle brackets. A file has so many values."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def of(self, value: object, depth: int = 0) -> Any:  # noqa: ANN401 - whatever JSON can write
        """Return a value in plain terms.

        Raises
        ------
        CheckpointError
            Where there are more of them, or deeper ones, than any description has.
        """
        self._left -= 1
        if self._left < 0 or depth > _DEEPEST:
            raise CheckpointError("the file describes itself by more values than any checkpoint")
        if isinstance(value, dict):
            return {_word(key): self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(item, depth + 1) for item in value]
        is_number = isinstance(value, int | float) and abs(value) < _LARGEST_NUMBER
        return value if value is None or is_number or isinstance(value, float) else _word(value)


def _word(value: object) -> str:
    """Return text as it is, a path as text, and for anything else what it is."""
    match value:
        case str(text):
            pass
        case int() | float() if abs(value) < _LARGEST_NUMBER:
            text = str(value)
        case Placeholder(maker=maker, arguments=tuple(parts)) if maker.startswith("pathlib"):
            text = "/".join(part for part in parts if isinstance(part, str))
        case Placeholder(maker=maker):
            text = f"<{maker}>"
        case _:
            text = f"<{type(value).__name__}>"
    return text[:_LONGEST_TEXT]
