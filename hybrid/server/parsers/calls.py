"""One tool call, read from text that is still growing."""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

# A call whose arguments are shorter is passed on when it is whole and right, a longer one as it comes.
HELD_ARGUMENTS = 256

# Names as models write them; wider than what the protocol allows, and no marker fits in.
NAME = r"[\w.\-:/]{1,128}"
# White space of a header or tail. Bounded, since text that may yet become a call is held back.
SPACE = r"\s{0,64}"


class Outcome(enum.Enum):
    NEED_MORE = enum.auto()  # it may become a call
    MALFORMED = enum.auto()  # the text is none, or no longer
    PART = enum.auto()  # a part of it is certain
    DONE = enum.auto()  # it ends


class Reading(NamedTuple):
    """What a reader found.

    Attributes:
        consumed: characters of the text that are dealt with.
        name, id: of the call, in its first reading of a part; ``id`` only where the format has one.
        arguments: what is new of them.
    """

    outcome: Outcome
    consumed: int = 0
    name: str | None = None
    id: str | None = None
    arguments: str = ""


NEED_MORE = Reading(Outcome.NEED_MORE)
MALFORMED = Reading(Outcome.MALFORMED)


class CallReader(Protocol):
    """Reads one call.

    ``text`` begins where the opening marker does, less what earlier readings consumed; ``final`` says that
    nothing will follow. What the readings add up to depends on the text alone, not on how it was cut.
    """

    def read(self, text: str, *, final: bool) -> Reading: ...
