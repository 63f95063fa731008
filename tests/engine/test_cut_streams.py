"""A thousand streams opened and cut at random on the demo model: nothing is left of them."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from pathlib import Path

import pytest

from hybrid import AsyncLLM, SamplingParams
from hybrid.errors import QueueFullError

STEMS = ["Once upon a time", "The old fisherman said that the sea", "One winter morning a fox came to " * 20]


def resources():
    """Threads, descriptors and resident bytes of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        threading.active_count(),
        len(list(Path("/proc/self/fd").iterdir())),
        pages * os.sysconf("SC_PAGE_SIZE"),
    )


async def cut(llm, rng, ended):
    """Open a stream, read some of it, and leave it in one of the ways there are."""
    params = SamplingParams(
        max_tokens=rng.randrange(1, 30), n=rng.choice([1, 1, 1, 2]), seed=rng.randrange(99)
    )
    name = str(rng.random())
    generator = llm.generate(rng.choice(STEMS) + " x" * rng.randrange(20), params, name)
    task = asyncio.ensure_future(read(generator, rng.randrange(0, 12)))
    if rng.random() < 0.4:
        await asyncio.sleep(rng.random() * 0.1)
        await llm.abort(name) if rng.random() < 0.5 else task.cancel()
    try:
        await task
        ended["read"] += 1
    except asyncio.CancelledError:
        ended["cancelled"] += 1
    except QueueFullError:
        ended["refused"] += 1
        await asyncio.sleep(0.05)


async def read(generator, count):
    async for _ in generator:
        count -= 1
        if count <= 0:
            break
    await generator.aclose()


async def cut_many(llm, count, rng):
    ended = dict.fromkeys(("read", "cancelled", "refused"), 0)
    places = asyncio.Semaphore(40)

    async def one():
        async with places:
            await cut(llm, rng, ended)

    await asyncio.gather(*(one() for _ in range(count)))
    while llm.stats().num_requests_running + llm.stats().num_requests_waiting:
        await asyncio.sleep(0.001)
    return ended


@pytest.mark.timeout(600)
def test_a_thousand_streams_leave_nothing():
    async def main():
        rng = random.Random(3)
        text = SamplingParams(temperature=0, max_tokens=20)
        threads, descriptors, _ = resources()
        async with AsyncLLM(
            "demo", max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64, num_threads=1, max_queue=30
        ) as llm:
            expected = [output.outputs[0].token_ids async for output in llm.generate(STEMS[0], text)]
            await cut_many(llm, 200, rng)  # every batch size is recorded, every buffer has grown
            before = resources()
            ended = await cut_many(llm, 1000, rng)
            after = resources()
            stats = llm.stats()
            print("before", before, "after", after, ended, stats)
            assert sum(ended.values()) == 1000
            assert min(ended.values()) > 20
            assert ended["read"] > 300
            assert (stats.kv_cache_usage, llm.errored) == (0, None)
            engine = llm._loaded.engine
            assert not engine.has_unfinished_requests()
            assert not any(engine.scheduler.pool._references)
            assert after[:2] == before[:2]
            assert after[2] - before[2] < 16 << 20
            assert [o.outputs[0].token_ids async for o in llm.generate(STEMS[0], text)] == expected
        assert resources()[0] <= threads + 1  # the default executor's, which asyncio.run ends
        assert resources()[1] == descriptors

    asyncio.run(main())
