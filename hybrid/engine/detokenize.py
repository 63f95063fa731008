"""Text of a growing list of tokens, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Incremental decoder: gives whole characters only, and keeps the rest."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class StopMatcher:
    """Finds the stop string that is complete first, whatever pieces the text comes in.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stop_strings: Sequence[str], *, include: bool = False) -> None:
        self._stop_strings, self._include = stop_strings, include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add ``text``; returns what is now certain. After a match there is nothing more."""
        if self.matched is not None:
            return ""
        self._held += text
        match = self._first_match()
        if match is not None:
            start, self.matched = match
            end = start + len(self.matched) if self._include else start
            released, self._held = self._held[:end], ""
            return released
        keep = self._possible_beginning()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def flush(self) -> str:
        """What was held back: no more text comes."""
        released, self._held = self._held, ""
        return released

    def _first_match(self) -> tuple[int, str] | None:
        found = [(self._held.find(stop), stop) for stop in self._stop_strings]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        return min(ends)[1:] if ends else None

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop_strings):
                return length
        return 0


class TextStream:
    """Tokens in, text out, ended by stop strings; the first ``min_tokens`` tokens are not searched."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop_strings: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop_strings, include=include_stop)
        self._unsearched = min_tokens

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched

    def push(self, token_id: int) -> str:
        """Text that became certain with ``token_id``."""
        text = self._detokenizer.push(token_id)
        if self._unsearched > 0:
            self._unsearched -= 1
            return text
        return self._matcher.push(text)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        return self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
