"""Keeping text of a conversation from turning into control tokens of its template.

A rendered template is one string in which the template's ``<|im_end|>`` and a user's look alike. So
strings of the conversation are marked before rendering, with characters that occur nowhere else, and the
marks are read and removed after it, before any text is encoded:

- after each character that could begin a control token, a *break*: what follows cannot complete it,
  however the template cuts, trims or joins the text;
- before a string that could complete a control token begun by the template, a break as well;
- a control token that the template itself looks for (``content.split('</think>')``) stays findable,
  between a *fence* before and one after it, with white space inside them so that trimming works too;
- other strings the template looks for stay whole; one that could begin a control token has its break
  after the end.

A control token in the result is the template's when it has no break inside, its first fence not before
and its second not after it. Text that neither holds the first character of a control token nor completes
one is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from operator import eq
from typing import Any

from hybrid.errors import RequestError, TokenizerError
from hybrid.tokenizer import Tokenizer

# Noncharacters, then private use: the first that neither text nor template uses become the marks. JSON
# and Python's repr both escape these as a backslash, "u" and four digits.
_MARK_RANGES = (range(0xFDD0, 0xFDF0), range(0xE000, 0xF900))
_MAX_SUFFIX_CHARS = 1 << 24
_SPACES = re.compile(r"\s*")


@dataclass(frozen=True)
class Marks:
    """The mark characters of one conversation: the break, and two fences for each control token sought."""

    brk: str
    fences: dict[str, tuple[str, str]]

    def unescape(self, text: str) -> str:
        """``text`` with marks that were written as JSON or Python literals turned back to characters."""
        for mark in self._all():
            if _escaped(mark) in text:
                text = re.sub(rf"\\+{_escaped(mark)}", mark, text)
        return text

    def strip(self, text: str) -> str:
        """``text`` without marks."""
        for mark in self._all():
            text = text.replace(mark, "")
        return text

    def _all(self) -> Iterator[str]:
        return chain(self.brk, *self.fences.values())


class Marker:
    """Marks conversations for one template and vocabulary."""

    def __init__(self, tokenizer: Tokenizer, known: Collection[str], source: str) -> None:
        """``known``: strings the template computes with; ``source``: the template."""
        self._tokenizer = tokenizer
        self._source = source
        self._controls = controls = frozenset(tokenizer.control_texts)
        if sum(len(text) ** 2 for text in controls) > _MAX_SUFFIX_CHARS:
            raise TokenizerError("control tokens are too long to keep them apart from text")
        self._suffixes = {text[cut:] for text in controls for cut in range(1, len(text))}
        self._insides = "\0".join(text[1:] for text in sorted(controls))
        self._longest = max(map(len, controls), default=0)
        self._heads = heads = frozenset(text[0] for text in controls)
        self._sought = frozenset(
            text for text in controls if len(text) == 1 or any(text in item for item in known)
        )
        whole = {text for text in known if not self._tails_matching(text, holds_control=True)}
        # The template compares with these, and they are harmless as they stand.
        self._free = frozenset(text for text in whole if not self._tails_matching(text, holds_control=False))
        words = sorted(self._sought | {text for text in whole if not heads.isdisjoint(text)}, key=_by_length)
        self._pattern = re.compile("|".join(map(re.escape, (*words, *sorted(heads))))) if heads else None

    def choose(self, values: Any) -> Marks:
        """Marks that occur nowhere in ``values``, the template or the control tokens.

        Raises:
            RequestError: the text leaves no characters for them.
        """
        texts = [self._source, *self._controls, *_strings(values)]
        free = (
            char
            for char in map(chr, chain(*_MARK_RANGES))
            if not any(char in text or _escaped(char) in text for text in texts)
        )
        count = 1 + 2 * len(self._sought)
        chosen = list(islice(free, count))
        if len(chosen) < count:
            raise RequestError("the messages use every private character: none is left to mark their text")
        pairs = zip(chosen[1::2], chosen[2::2], strict=True)
        return Marks(chosen[0], dict(zip(sorted(self._sought), pairs, strict=True)))

    def mark(self, value: Any, marks: Marks) -> Any:
        """A copy of a JSON value with its strings and keys marked."""
        if isinstance(value, str):
            return self._mark_text(value, marks)
        if isinstance(value, dict):
            return {self._mark_inside(key, marks): self.mark(item, marks) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item, marks) for item in value]
        return value

    def pieces(self, rendered: str, marks: Marks) -> Iterator[str | int]:
        """A marked rendering as plain pieces and special token ids, marks removed."""
        rendered = marks.unescape(rendered)
        position = 0
        for token_id, start, end in self._tokenizer.find_special(rendered, parse_special=True):
            fences = marks.fences.get(rendered[start:end])
            if fences is not None and any(map(eq, fences, _neighbours(rendered, start, end))):
                continue
            yield from self._plain(marks.strip(rendered[position:start]))
            yield token_id
            position = end
        yield from self._plain(marks.strip(rendered[position:]))

    def _plain(self, text: str) -> Iterable[str | int]:
        return self._tokenizer.split_special(text, parse_special=False)

    def _mark_text(self, text: str, marks: Marks) -> str:
        if text in self._free:
            return text
        places = {place for place in (0, len(text) - len(text.lstrip())) if self._completes(text[place:])}
        bounds = [0, *sorted(places), len(text)]
        return marks.brk.join([self._mark_inside(text[a:b], marks) for a, b in pairwise(bounds)])

    def _mark_inside(self, text: str, marks: Marks) -> str:
        parts: list[str] = []
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            found, start, end = match.group(), match.start(), match.end()
            if found in self._free or start < position:
                continue
            before = text[position:start]
            position = self._after_spaces(text, end)
            after = text[end:position]
            if found in self._sought:
                opening, closing = marks.fences[found]
                cut = len(before.rstrip()) or len(before)
                parts += [before[:cut], opening, before[cut:], found, after, closing]
            elif found in self._heads:
                parts += [before, found, marks.brk]
                position = end
            else:
                parts += [before, found, after, marks.brk]
        return "".join([*parts, text[position:]])

    def _after_spaces(self, text: str, end: int) -> int:
        """End of the white space at ``end``; none is skipped at the end of the text, where it may be trimmed,
        nor where white space can begin a control token."""
        found = _SPACES.match(text, end)
        if found is None or found.end() == len(text) or any(head.isspace() for head in self._heads):
            return end
        return found.end()

    def _completes(self, text: str) -> bool:
        """Whether ``text`` could go on, or end, a control token begun before it."""
        if not text:
            return False
        if len(text) < self._longest and text in self._insides:
            return True
        return any(text[:size] in self._suffixes for size in range(1, min(len(text), self._longest) + 1))

    def _tails_matching(self, text: str, *, holds_control: bool) -> bool:
        """Whether a control token stands in ``text``; or else, whether one could begin in it and go on."""
        tails = [text[place:] for place, char in enumerate(text) if char in self._heads]
        if holds_control:
            return any(tail.startswith(control) for tail in tails for control in self._controls)
        return any(control.startswith(tail) for tail in tails for control in self._controls)


def _neighbours(text: str, start: int, end: int) -> tuple[str, str]:
    """The characters before ``start`` and after ``end``, white space apart."""
    while start > 0 and text[start - 1].isspace():
        start -= 1
    while end < len(text) and text[end].isspace():
        end += 1
    return text[max(start - 1, 0) : start], text[end : end + 1]


def _escaped(mark: str) -> str:
    return f"u{ord(mark):04x}"


def _by_length(text: str) -> tuple[int, str]:
    return (-len(text), text)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
