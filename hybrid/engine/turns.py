"""Sharing the time between prompts and the next tokens of running texts."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

# A prompt may take this many times as long as a decode step before the next one: the pause between two tokens
# of a running text stays below 1 + PROMPT_TIME, hence three, times its usual length, and the prompt has
# PROMPT_TIME / (1 + PROMPT_TIME), hence 65 %, of the time.
PROMPT_TIME = 1.9
_MARGIN = 0.92  # layers are not all alike
_SMALLEST_PIECE = 32  # tokens; below it a prompt reads whole layers for next to nothing
_REMEMBERED_LAYERS, _REMEMBERED_STEPS = 16, 64


class Turns:
    """Alternates: a decode step, then layers of a prompt for as long as their time lasts, at least one."""

    def __init__(self) -> None:
        self._decode_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._token_s: deque[float] = deque(maxlen=_REMEMBERED_LAYERS)  # of a prompt's token in a layer
        self._prompt_s = 0.0  # since the last decode step
        self._used_up = False
        self._limited = False
        self._num_tokens = 1
        self._looked = 0.0

    @property
    def prompt_is_next(self) -> bool:
        """Whether the prompt has time left."""
        return not self._used_up

    def piece(self, num_tokens: int) -> int:
        """Of ``num_tokens`` that fit a step, how many are computed at once between steps of running texts: so
        many that a whole number of their layers fills the time there is."""
        allowed = self._allowed_s()
        if not allowed or not self._token_s:
            return num_tokens
        token_s = statistics.median(self._token_s)
        num_layers = math.ceil(allowed / (token_s * num_tokens))
        fitting = int(_MARGIN * allowed / (token_s * num_layers))
        return min(num_tokens, max(fitting, _SMALLEST_PIECE))

    def decoded(self, seconds: float) -> None:
        """A decode step took so long."""
        self._decode_s.append(seconds)
        self._prompt_s, self._used_up = 0.0, False

    def start_prompt(self, num_tokens: int, *, limited: bool) -> None:
        """Layers of ``num_tokens`` of prompts begin; ``limited``: texts wait for their next token."""
        self._num_tokens, self._limited, self._looked = num_tokens, limited, time.perf_counter()

    def prompt_is_over(self) -> bool:
        """Called after each layer: whether another one like it would take too long."""
        now = time.perf_counter()
        layer_s, self._looked = now - self._looked, now
        self._token_s.append(layer_s / self._num_tokens)
        self._prompt_s += layer_s
        self._used_up = self._limited and self._prompt_s + layer_s > self._allowed_s()
        return self._used_up

    def _allowed_s(self) -> float:
        """From what a decode step usually takes: the lower quartile, since a prompt leaves caches cold."""
        steps = sorted(self._decode_s)
        return PROMPT_TIME * steps[len(steps) // 4] if steps else 0.0
