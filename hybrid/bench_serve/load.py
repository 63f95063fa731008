"""Many requests, a number of them at once: rates and percentiles."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.bench_serve.client import Sample, complete, model_card
from hybrid.bench_serve.options import LoadOptions, random_prompt

PERCENTILES = (50, 90, 99)


async def measure(options: LoadOptions, on_sample: Callable[[Sample], None] = lambda sample: None) -> Result:
    """Send the requests, at most ``num_clients`` at once.

    Raises:
        HybridError: the server cannot be reached, or has no model yet.
    """
    model = await model_card(options)
    generator = random.Random(options.seed)
    num_ids = model["meta"]["n_vocab"]
    prefix = random_prompt(generator, options.shared_prefix, num_ids)
    places = asyncio.Semaphore(options.num_clients)
    samples: list[Sample] = []

    async def one(prompt: list[int], num_output: int) -> None:
        async with places:
            samples.append(await complete(options, model["id"], prompt, num_output))
            on_sample(samples[-1])

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            if _enough(options, number, time.perf_counter() - started):
                break
            prompt = prefix + random_prompt(generator, options.prompt_tokens.draw(generator), num_ids)
            group.create_task(one(prompt, options.output_tokens.draw(generator)))
            if options.rate is not None:
                await asyncio.sleep(generator.expovariate(options.rate))
            elif options.duration_s is not None:
                await asyncio.sleep(0)  # it takes its place; then wait for the next one
                async with places:
                    pass
    return Result(options, model["id"], samples, time.perf_counter() - started)


def _enough(options: LoadOptions, num_begun: int, seconds: float) -> bool:
    if options.duration_s is None:
        return num_begun == options.num_requests
    return seconds >= options.duration_s


@dataclass(frozen=True)
class Result:
    """All samples of a run that took ``duration_s``."""

    options: LoadOptions
    model: str
    samples: list[Sample]
    duration_s: float

    def summary(self) -> dict[str, Any]:
        """Counts, rates (per second) and percentiles (milliseconds)."""
        good = [sample for sample in self.samples if sample.error is None]
        errors: dict[str, int] = {}
        for sample in self.samples:
            if sample.error is not None:
                errors[sample.error] = errors.get(sample.error, 0) + 1
        num_prompt = sum(sample.num_prompt_tokens for sample in good)
        num_output = sum(sample.num_output_tokens for sample in good)
        return {
            "model": self.model,
            "clients": self.options.num_clients,
            "requests": len(self.samples),
            "answered": len(good),
            "errors": errors,
            "duration_s": round(self.duration_s, 3),
            "prompt_tokens": num_prompt,
            "cached_tokens": sum(sample.num_cached_tokens for sample in good),
            "output_tokens": num_output,
            "requests_per_second": round(len(good) / self.duration_s, 3),
            "prompt_tokens_per_second": round(num_prompt / self.duration_s, 2),
            "output_tokens_per_second": round(num_output / self.duration_s, 2),
            "ttft_ms": percentiles([sample.first_token_s for sample in good]),
            "inter_token_ms": percentiles([gap for sample in good for gap in sample.gaps_s]),
            "total_ms": percentiles([sample.total_s for sample in good]),
        }


def percentiles(seconds: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and nearest-rank percentiles in milliseconds; ``None`` if there is nothing."""
    known = sorted(value * 1000 for value in seconds if value is not None)
    if not known:
        return None
    found = {f"p{rank}": known[-(-rank * len(known) // 100) - 1] for rank in PERCENTILES}
    return {name: round(value, 3) for name, value in {"mean": sum(known) / len(known), **found}.items()}
