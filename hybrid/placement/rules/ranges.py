"""Sets of layers or experts as people write them: ``3-60``, ``0,2,8-``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_NUMBER = 9999
_ITEM = r" *[0-9]{1,4} *(- *([0-9]{1,4} *)?)?"
_TEXT = re.compile(f"{_ITEM}(,{_ITEM})*")


@dataclass(frozen=True)
class Ranges:
    """``spans`` are (first, last), both included; last ``None``: to the end."""

    spans: tuple[tuple[int, int | None], ...]

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and any(
            first <= number and (last is None or number <= last) for first, last in self.spans
        )

    def __str__(self) -> str:
        return ",".join(
            str(first) if last == first else f"{first}-{'' if last is None else last}"
            for first, last in self.spans
        )

    def beyond(self, count: int) -> Ranges | None:
        """The part that numbers 0 to ``count`` - 1 do not have; ``None`` where all is within."""
        outside = tuple(
            (first if last is None else max(first, count), first if last is None else last)
            for first, last in self.spans
            if (first if last is None else last) >= count
        )
        return Ranges(outside) if outside else None


def parse_ranges(text: str) -> Ranges:
    """From text.

    Raises:
        ValueError: malformed, or a range descends.
    """
    if not _TEXT.fullmatch(text):
        raise ValueError("expected numbers and ranges such as 3-60 or 0,8-")
    spans = []
    for piece in text.replace(" ", "").split(","):
        first, dash, last = piece.partition("-")
        end = None if dash and not last else int(last or first)
        if end is not None and end < int(first):
            raise ValueError(f"expected an ascending range, found {piece!r}")
        spans.append((int(first), end))
    return Ranges(tuple(spans))


def ranges_of(numbers: Iterable[int]) -> Ranges:
    """The fewest ranges that hold exactly these numbers."""
    spans: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return Ranges(tuple(spans))
