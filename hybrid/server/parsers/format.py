"""What tells one family's output from another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hybrid.server.parsers.calls import CallReader

THINK_BEGIN = "<think>"
THINK_END = "</think>"


@dataclass(frozen=True)
class ToolFormat:
    """How a family writes tool calls.

    Attributes:
        call_begin: what every call begins with.
        section: markers around all calls of an answer, where the family has them.
        ends_reasoning: the markers are tokens that stand for nothing else, so a call ends a block of
            reasoning that was left open.
        new_reader: makes a reader for one call; its text begins with ``call_begin``.
    """

    call_begin: str
    new_reader: Callable[[], CallReader]
    section: tuple[str, str] | None = None
    ends_reasoning: bool = False

    @property
    def openers(self) -> tuple[str, ...]:
        return (self.call_begin,) if self.section is None else (self.section[0], self.call_begin)
