"""Sharing the time between prompts and the next tokens of running texts."""

from __future__ import annotations

import statistics
import time
from collections import deque

# A prompt may take this many times as long as a decode step before the next one: the pause between two tokens
# of a running text is 1 + PROMPT_TIME, hence 2.8, times its usual length, which leaves 7 % for steps that
# are slower than usual before it is three; the prompt has PROMPT_TIME / (1 + PROMPT_TIME), hence 64 %, of the
# time, of which it loses some to parts that do not fill their turn.
PROMPT_TIME = 1.8
_READING = 32  # a part's weights are read in about the time of so many tokens
_SMALLEST_PIECE = 32  # tokens; below it a prompt reads whole layers for next to nothing
_CANDIDATES = 16  # sizes of a piece that are compared
_COMPARED_PARTS = 48
_REMEMBERED_PARTS, _REMEMBERED_STEPS = 16, 64


class Turns:
    """Alternates: a decode step, then parts of a prompt's layers while their time lasts, at least one.

    A part is what lies between two yields of `hybrid.models.layer_steps`. How long the next one takes is
    known from those of its kind; which kind it is, from what followed the last of this kind.
    """

    def __init__(self) -> None:
        self._decode_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._token_s: dict[str, deque[float]] = {}  # kind -> of a token, or of `_READING`'s share
        self._follows: dict[str, str] = {}
        self._kind = ""  # of the part before
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
        many that most of them are computed in a time, where a turn holds whole parts."""
        allowed, parts = self._allowed_s(), self._cycle()
        if not allowed or not parts:
            return num_tokens
        smallest = min(num_tokens, _SMALLEST_PIECE)
        steps = range(_CANDIDATES + 1)
        sizes = {smallest + (num_tokens - smallest) * step // _CANDIDATES for step in steps}
        fitting = [n for n in sorted(sizes) if max(self._part_s(kind, n) for kind in parts) <= allowed]
        return max(fitting, key=lambda n: self._rate(n, parts, allowed), default=smallest)

    def decoded(self, seconds: float) -> None:
        """A decode step took so long."""
        self._decode_s.append(seconds)
        self._prompt_s, self._used_up = 0.0, False

    def start_prompt(self, num_tokens: int, *, limited: bool) -> None:
        """Parts of ``num_tokens`` of prompts begin; ``limited``: texts wait for their next token."""
        self._num_tokens, self._limited, self._looked = num_tokens, limited, time.perf_counter()

    def prompt_is_over(self, kind: str) -> bool:
        """Called after each part: whether the next one would take too long."""
        now = time.perf_counter()
        part_s, self._looked = now - self._looked, now
        known = self._token_s.setdefault(kind, deque(maxlen=_REMEMBERED_PARTS))
        known.append(part_s / (self._num_tokens + _READING))
        self._follows[self._kind], self._kind = kind, kind
        self._prompt_s += part_s
        next_s = self._part_s(self._follows.get(kind, kind), self._num_tokens)
        self._used_up = self._limited and self._prompt_s + next_s > self._allowed_s()
        return self._used_up

    def _part_s(self, kind: str, num_tokens: int) -> float:
        return statistics.median(self._token_s[kind]) * (num_tokens + _READING)

    def _cycle(self) -> list[str]:
        """Kinds of the parts that follow each other from now on, round and round."""
        found: list[str] = []
        kind = self._follows.get(self._kind, self._kind)
        while kind in self._token_s and kind not in found:
            found.append(kind)
            kind = self._follows.get(kind, "")
        return found

    def _rate(self, num_tokens: int, parts: list[str], allowed: float) -> float:
        """Tokens times parts a second if pieces have ``num_tokens`` and each turn as many parts as fit."""
        seconds = [self._part_s(kind, num_tokens) for kind in parts]
        turns, left = 0, 0.0
        for index in range(_COMPARED_PARTS):
            part_s = seconds[index % len(seconds)]
            if part_s > left:
                turns, left = turns + 1, allowed
            left -= part_s
        whole = sum(seconds[index % len(seconds)] for index in range(_COMPARED_PARTS))
        return num_tokens * _COMPARED_PARTS / (whole + turns * allowed / PROMPT_TIME)

    def _allowed_s(self) -> float:
        """From what a decode step usually takes: the lower quartile, since a prompt leaves caches cold."""
        steps = sorted(self._decode_s)
        return PROMPT_TIME * steps[len(steps) // 4] if steps else 0.0
