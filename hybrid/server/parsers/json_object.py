"""Where a JSON object in growing text ends."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64
_CLOSERS = {"{": "}", "[": "]"}


class JsonObjectEnd:
    """Follows strings and brackets of an object that comes in pieces.

    A bracket that closes nothing, a raw control character in a string or more than ``MAX_DEPTH`` levels make
    it `broken`; other faults are left to `parse_object`.

    Attributes:
        length: characters of the object so far.
        complete: it has ended.
        broken: what comes next is no part of an object.
    """

    def __init__(self) -> None:
        self.length = 0
        self.complete = False
        self.broken = False
        self._open: list[str] = []
        self._in_string = False
        self._escaped = False

    def read(self, text: str) -> int:
        """Read on; how many characters of ``text`` belong to the object."""
        count = 0
        while count < len(text) and not (self.complete or self.broken):
            self._step(text[count])
            count += not self.broken
        self.length += count
        return count

    def _step(self, char: str) -> None:
        if self._in_string:
            self._step_string(char)
        elif char == '"':
            self._in_string = True
            self.broken = not self._open
        elif char in _CLOSERS:
            self._open.append(_CLOSERS[char])
            self.broken = len(self._open) > MAX_DEPTH
        elif char in "}]":
            self.broken = not self._open or self._open.pop() != char
            self.complete = not self.broken and not self._open

    def _step_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
        else:
            self.broken = char < " "


def parse_json(text: str) -> Any:
    """The value that ``text`` is, strictly.

    Raises:
        ValueError: it is no JSON, or holds NaN, an infinity or too many levels.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("too many levels") from error


def parse_object(text: str) -> dict[str, Any] | None:
    """The object that ``text`` is; ``None`` where it is none."""
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
