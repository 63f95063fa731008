"""Tool calls that hold a JSON object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import regex

from hybrid.server.parsers.calls import HELD_ARGUMENTS, MALFORMED, NEED_MORE, Outcome, Reading
from hybrid.server.parsers.json_object import JsonObjectEnd, parse_object


@dataclass(frozen=True)
class JsonCall:
    """How a format writes a call, as expressions of `regex`.

    Attributes:
        header: from the opening marker to just before the object, which it looks ahead to, so that more text
            cannot change the match. Groups ``name`` and perhaps ``id``.
        tail: from just after the object to the end of the closing marker.
        unwrap: where the object is not the arguments but holds them: name and arguments of the object's
            text, or ``None`` where it has none. Such a call is never passed on in parts.
    """

    header: regex.Pattern[str]
    tail: regex.Pattern[str]
    unwrap: Callable[[str], tuple[str, str] | None] | None = None


class JsonCallReader:
    """Reads a call that is written in one of several ways, the first that fits."""

    def __init__(self, *ways: JsonCall) -> None:
        self._ways = ways
        self._begin(ways[0])

    def _begin(self, way: JsonCall) -> None:
        self._way = way
        self._header: regex.Match[str] | None = None
        self._object = JsonObjectEnd()
        self._streaming = False

    def read(self, text: str, *, final: bool) -> Reading:
        if self._streaming:
            return self._read_streaming(text, final)
        reading = self._read_held(text, final)
        if reading is MALFORMED and self._way is not self._ways[-1]:
            self._begin(self._ways[self._ways.index(self._way) + 1])
            return self.read(text, final=final)
        return reading

    def _read_held(self, text: str, final: bool) -> Reading:
        if self._header is None:
            match = self._way.header.match(text, partial=not final)
            if match is None or match.partial:
                return MALFORMED if match is None else NEED_MORE
            self._header = match
        start = self._header.end()
        self._object.read(text[start + self._object.length :])
        end = start + self._object.length
        if self._way.unwrap is None and self._object.length > HELD_ARGUMENTS:
            self._streaming = True
            return self._part(Outcome.PART, end, text[start:end])
        if self._object.broken:
            return MALFORMED
        if not self._object.complete:
            return MALFORMED if final else NEED_MORE
        tail = self._tail_length(text[end:], final)
        return self._whole(text[start:end], end + tail) if tail is not None and tail >= 0 else _wait(tail)

    def _whole(self, object_text: str, consumed: int) -> Reading:
        if parse_object(object_text) is None:
            return MALFORMED
        if self._way.unwrap is None:
            return self._part(Outcome.DONE, consumed, object_text)
        unwrapped = self._way.unwrap(object_text)
        if unwrapped is None:
            return MALFORMED
        return Reading(Outcome.DONE, consumed, unwrapped[0], None, unwrapped[1])

    def _part(self, outcome: Outcome, consumed: int, arguments: str) -> Reading:
        assert self._header is not None
        groups = self._header.groupdict()
        return Reading(outcome, consumed, groups["name"], groups.get("id"), arguments)

    def _read_streaming(self, text: str, final: bool) -> Reading:
        if not self._object.complete:
            count = self._object.read(text)
            if count:
                return Reading(Outcome.PART, count, arguments=text[:count])
            return MALFORMED if self._object.broken or final else NEED_MORE
        tail = self._tail_length(text, final)
        return Reading(Outcome.DONE, tail) if tail is not None and tail >= 0 else _wait(tail)

    def _tail_length(self, text: str, final: bool) -> int | None:
        """Length of the tail that ``text`` begins with; -1: it cannot be one; ``None``: not yet known.

        A model may end its turn in place of the closing marker, so that what is there at the end will do.
        """
        match = self._way.tail.match(text, partial=True)
        if match is None:
            return -1
        if match.partial:
            return len(text) if final else None
        return match.end()


def _wait(tail: int | None) -> Reading:
    return NEED_MORE if tail is None else MALFORMED
