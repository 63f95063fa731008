"""How the experts of a layer divide between the CPU and a device that they are streamed to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamRates:
    """What a prompt's experts cost.

    Attributes:
        cpu_expert_s: seconds of an expert on the CPU whatever its tokens: reading it from RAM.
        cpu_token_s: and for each of its tokens.
        upload_s: seconds to bring one to the device; uploads follow one another.
        device_token_s: seconds of a token there, which uploads of others hide.
    """

    cpu_expert_s: float
    cpu_token_s: float
    upload_s: float
    device_token_s: float

    def cpu_s(self, count: int) -> float:
        """Of one expert with so many tokens."""
        return self.cpu_expert_s + self.cpu_token_s * count if count else 0.0

    def device_s(self, counts: Sequence[int]) -> float:
        """Of experts streamed one after another: the slower of uploads and arithmetic."""
        return max(self.upload_s * len(counts), self.device_token_s * sum(counts))


@dataclass(frozen=True)
class Division:
    """Experts that are streamed, most tokens first, and seconds expected on either side."""

    streamed: tuple[int, ...]
    cpu_s: float
    device_s: float

    @property
    def seconds(self) -> float:
        return max(self.cpu_s, self.device_s)


def divide(counts: Sequence[int], rates: StreamRates) -> Division:
    """The division that ends first: both sides work at the same time on experts with ``counts`` tokens each.

    An upload costs the same for every expert, so the streamed ones are those with most tokens, as many as
    balance. (Where the device's arithmetic and not the upload is the limit, another choice may end earlier,
    by less than one expert takes.) Among equals the lower id is streamed; of equal times the fewest are.
    """
    order = sorted((expert for expert, count in enumerate(counts) if count), key=lambda e: (-counts[e], e))
    cpu_s = sum(rates.cpu_s(counts[expert]) for expert in order)
    tokens = 0
    best = Division((), cpu_s, 0.0)
    for number, expert in enumerate(order, 1):
        cpu_s -= rates.cpu_s(counts[expert])
        tokens += counts[expert]
        device_s = max(rates.upload_s * number, rates.device_token_s * tokens)
        found = Division(tuple(order[:number]), max(cpu_s, 0.0), device_s)
        if found.seconds < best.seconds:
            best = found
    return best
