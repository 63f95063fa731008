"""A long prompt that arrives while streams run: what it does to them, and they to it."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from typing import Any

from hybrid.bench_serve.client import Sample, complete, model_card
from hybrid.bench_serve.options import LoadOptions, random_prompt
from hybrid.errors import HybridError

QUIET_TOKENS = 48  # of each stream before the prompt arrives: what is usual is their median gap
_STREAM_TOKENS = 100_000
_LARGEST = 8  # gaps that are listed


async def measure_beside(options: LoadOptions, num_tokens: int) -> dict[str, Any]:
    """Prefill ``num_tokens`` alone, then again while ``num_clients`` streams run.

    Returns gaps in milliseconds, rates in tokens per second. A prompt's time is that to its first token.

    Raises:
        HybridError: the server cannot be reached, or a request failed.
    """
    card = await model_card(options)
    generator, num_ids = random.Random(options.seed), card["meta"]["n_vocab"]
    await _prefill(options, card, random_prompt(generator, min(num_tokens, 512), num_ids))  # warm up
    alone_s = await _prefill(options, card, random_prompt(generator, num_tokens, num_ids))
    limit = card["meta"]["n_ctx"]
    streams = []
    async with asyncio.TaskGroup() as group:
        tasks = []
        for _ in range(options.num_clients):
            prompt = random_prompt(generator, options.prompt_tokens.draw(generator), num_ids)
            sample, length = Sample(len(prompt)), min(_STREAM_TOKENS, limit - len(prompt))
            streams.append(sample)
            tasks.append(group.create_task(complete(options, card["id"], prompt, length, sample)))
        while min(len(stream.token_times) for stream in streams) < QUIET_TOKENS:
            if any(task.done() for task in tasks):
                raise HybridError(f"a stream ended: {[stream.error for stream in streams]}")
            await asyncio.sleep(0.05)
        sent = time.perf_counter()
        beside_s = await _prefill(options, card, random_prompt(generator, num_tokens, num_ids))
        answered = sent + beside_s
        for task in tasks:
            task.cancel()
    return _report(card["id"], streams, num_tokens, alone_s, sent, answered)


async def _prefill(options: LoadOptions, card: dict[str, Any], prompt: list[int]) -> float:
    """Seconds to the first token after a prompt."""
    sample = await complete(options, card["id"], prompt, 1)
    if sample.error is not None or sample.first_token_s is None:
        raise HybridError(f"the prompt of {len(prompt)} tokens failed: {sample.error}")
    return sample.first_token_s


def _report(
    model: str, streams: list[Sample], num_tokens: int, alone_s: float, sent: float, answered: float
) -> dict[str, Any]:
    all_run = max(stream.token_times[1] for stream in streams)  # the prompts of all are done
    before, during = [], []
    for stream in streams:
        for earlier, later in itertools.pairwise(stream.token_times):
            if earlier >= all_run and later <= sent:
                before.append(later - earlier)
            elif later > sent and earlier <= answered:
                during.append(later - earlier)
    usual, beside = statistics.median(before), sorted(during)
    ranks = {f"p{rank}": beside[-(-rank * len(beside) // 100) - 1] for rank in (50, 90, 99)}
    return {
        "model": model,
        "streams": len(streams),
        "long_prompt": num_tokens,
        "usual_gap_ms": round(usual * 1e3, 2),
        "usual_largest_gap_ms": round(max(before) * 1e3, 2),
        "gaps": len(during),
        "gap_ms": {name: round(value * 1e3, 2) for name, value in ranks.items()},
        "largest_gaps_ms": [round(gap * 1e3, 2) for gap in beside[: -_LARGEST - 1 : -1]],
        "largest_to_usual": round(beside[-1] / usual, 3),
        "largest_to_median": round(beside[-1] / ranks["p50"], 3),
        "alone_tokens_per_second": round(num_tokens / alone_s, 2),
        "beside_tokens_per_second": round(num_tokens / (answered - sent), 2),
        "prefill_share": round(alone_s / (answered - sent), 4),
    }
