"""What a load test sends."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from hybrid.errors import ConfigError

MAX_LENGTH = 1 << 20
_FIRST_ID = 256  # ids below are often control tokens or bytes


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: ``N``, ``LOW-HIGH`` (uniform) or ``normal:MEAN,DEVIATION``.

    Raises:
        ConfigError: it is something else, or out of range.
    """

    text: str

    def __post_init__(self) -> None:
        self.draw(random.Random(0))

    def draw(self, generator: random.Random) -> int:
        """A length, at least 1."""
        if found := re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", self.text):
            low = int(found[1])
            high = int(found[2] or found[1])
            if 1 <= low <= high <= MAX_LENGTH:
                return generator.randint(low, high)
        elif found := re.fullmatch(r"normal:(\d{1,7}),(\d{1,7})", self.text):
            return min(max(1, round(generator.gauss(int(found[1]), int(found[2])))), MAX_LENGTH)
        raise ConfigError(f"lengths: expected N, LOW-HIGH or normal:MEAN,DEVIATION, found {self.text!r}")


@dataclass(frozen=True)
class LoadOptions:
    """What to send.

    Attributes:
        num_requests: requests in all.
        duration_s: instead of that number, how long to begin requests.
        rate: requests begun a second, with exponential pauses; ``None``: no pauses.
    """

    url: str = "http://127.0.0.1:8000"
    num_clients: int = 8
    num_requests: int = 64
    duration_s: float | None = None
    rate: float | None = None
    prompt_tokens: Lengths = Lengths("128")
    output_tokens: Lengths = Lengths("64")
    shared_prefix: int = 0
    request_timeout_s: float = 600.0
    seed: int = 0
    api_key: str | None = None


def random_prompt(generator: random.Random, length: int, num_ids: int) -> list[int]:
    """``length`` token ids."""
    first = _FIRST_ID if num_ids > 2 * _FIRST_ID else 0
    return [generator.randrange(first, num_ids) for _ in range(length)]
