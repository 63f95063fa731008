"""What an untrusted template may use: CPU time, characters made, characters looked at.

Time runs through a trace function of the rendering thread, so it stops any loop made of Python code, in
every thread and without signals. A single C call cannot be traced: those that could run long or allocate
much on small input state their cost to the meter before they run (see ``sandbox``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

_EVENTS_PER_CLOCK = 64
_NODES_PER_CLOCK = 4096
_MAX_LOOKED = 1 << 32


@dataclass(frozen=True)
class Limits:
    """Bounds of one rendering.

    Attributes:
        seconds: CPU time of the rendering thread.
        max_chars: length of the longest single string, and of the result.
        max_made_chars: sum over all strings and lists made on the way.
    """

    seconds: float = 2.0
    max_chars: int = 1 << 23
    max_made_chars: int = 1 << 25

    def grown_by(self, input_chars: int) -> Limits:
        """The same bounds for a conversation of ``input_chars``: they hold for what a template adds."""
        return Limits(self.seconds, self.max_chars + 8 * input_chars, self.max_made_chars + 256 * input_chars)


class LimitExceeded(BaseException):
    """A bound was reached. Not an ``Exception``: the template engine swallows many of those."""


class Meter:
    """Counts one rendering against its limits."""

    def __init__(self, limits: Limits, *, lines: bool = True) -> None:
        self._limits = limits
        self._lines = lines
        self._deadline = time.thread_time() + limits.seconds
        self._made = 0
        self._looked = 0
        self._events = 0

    def make(self, chars: int) -> None:
        """Account for a string or list of ``chars`` that is about to be made."""
        self._made += chars
        if chars > self._limits.max_chars or self._made > self._limits.max_made_chars:
            raise LimitExceeded(f"it builds more than {self._limits.max_chars} characters")
        self.check_time()

    def look(self, value: Any) -> int:
        """Account for a C call that walks all of ``value``; returns its size in characters and nodes.

        Shared parts count as often as they are reached, since the call would walk them as often.
        """
        if isinstance(value, str):
            size = len(value)
        else:
            size, nodes, stack = 0, 0, [value]
            while stack:
                item = stack.pop()
                nodes += 1
                if isinstance(item, dict):
                    stack.extend(item.keys())
                    stack.extend(item.values())
                elif isinstance(item, list | tuple | set | frozenset):
                    stack.extend(item)
                else:
                    size += _length(item)
                if nodes % _NODES_PER_CLOCK == 0:
                    self.check_time()
            size += nodes
        self._looked += size
        if self._looked > _MAX_LOOKED:
            raise LimitExceeded("it compares or walks too much data")
        return size

    def check_time(self) -> None:
        """Raise once the CPU time is used up."""
        if time.thread_time() > self._deadline:
            raise LimitExceeded(f"it runs longer than {self._limits.seconds:g} s")

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """A ``sys.settrace`` function: looks at the clock now and then."""
        self._events += 1
        if self._events % _EVENTS_PER_CLOCK == 0:
            self.check_time()
        return self.trace if self._lines and frame.f_code.co_filename != __file__ else None


def _length(item: Any) -> int:
    if isinstance(item, str | bytes):
        return len(item)
    if isinstance(item, int):
        return item.bit_length() // 3
    return 1


_CURRENT: ContextVar[Meter] = ContextVar("hybrid_template_meter")


def meter() -> Meter:
    """The meter of the rendering in progress in this thread."""
    return _CURRENT.get()


@contextmanager
def metered(limits: Limits, *, lines: bool = True) -> Iterator[None]:
    """Run the body under ``limits``; code it calls raises `LimitExceeded` when they are reached.

    Without ``lines`` the clock is looked at in calls only: several times faster, and enough for our own code.
    """
    current = Meter(limits, lines=lines)
    token = _CURRENT.set(current)
    previous = sys.gettrace()
    sys.settrace(current.trace)
    try:
        yield
    finally:
        sys.settrace(previous)
        _CURRENT.reset(token)
