"""Sharing the time between prompts and the next tokens of running texts."""

from __future__ import annotations

import statistics
import time
from collections import deque

# A prompt may take this many times as long as a decode step before the next one: the pause between two tokens
# of a running text stays below 1 + PROMPT_TIME, hence three, times its usual length, and the prompt has
# PROMPT_TIME / (1 + PROMPT_TIME), hence 64 %, of the time.
PROMPT_TIME = 1.8
_REMEMBERED_STEPS = 16


class Turns:
    """Alternates: a decode step, then layers of a prompt for as long as their time lasts, at least one."""

    def __init__(self) -> None:
        self._decode_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._prompt_s = 0.0  # since the last decode step
        self._used_up = False
        self._limited = False
        self._looked = 0.0

    @property
    def prompt_is_next(self) -> bool:
        """Whether the prompt has time left."""
        return not self._used_up

    def decoded(self, seconds: float) -> None:
        """A decode step took so long."""
        self._decode_s.append(seconds)
        self._prompt_s, self._used_up = 0.0, False

    def start_prompt(self, *, limited: bool) -> None:
        """Layers of a prompt begin or go on; ``limited``: a text waits for its next token."""
        self._limited, self._looked = limited, time.perf_counter()

    def prompt_is_over(self) -> bool:
        """Called after each layer: whether another one like it would take too long."""
        now = time.perf_counter()
        layer_s, self._looked = now - self._looked, now
        self._prompt_s += layer_s
        allowed = PROMPT_TIME * statistics.median(self._decode_s) if self._decode_s else 0.0
        self._used_up = self._limited and self._prompt_s + layer_s > allowed
        return self._used_up
