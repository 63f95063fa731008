"""The asynchronous API on the mock model: deltas, aborts, limits, failures, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

import pytest

import hybrid.async_llm
from hybrid.async_llm import AsyncLLM
from hybrid.config import ExpertUse
from hybrid.engine.load import LoadedModel
from hybrid.errors import ContextLengthError, EngineError, ModelError, QueueFullError, RequestError
from hybrid.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


class NumberTokenizer:
    """Texts are numbers in words: "3 14"."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return "".join(f" {i}" for i in ids)

    def detokenizer(self, *, skip_special=False, prompt_ids=()):
        return self

    def push(self, token_id):
        return f" {token_id}"

    def flush(self):
        return ""


@pytest.fixture
def make_llm(monkeypatch, make_engine):
    made = []

    def make(max_queue=256, max_queue_wait_s=None, seconds=0.0, **options) -> AsyncLLM:
        engine = make_engine(**options)
        engine.model.seconds = seconds
        loaded = LoadedModel(
            Path("mock.gguf"), engine, NumberTokenizer(), None, None, None, "scalar", 1, ExpertUse()
        )
        monkeypatch.setattr(hybrid.async_llm, "load", lambda *args: loaded)
        made.append(AsyncLLM("mock.gguf", max_queue=max_queue, max_queue_wait_s=max_queue_wait_s))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def engine_of(llm):
    return llm._loaded.engine


async def collect(generator):
    """Text, token ids and the last output of a request."""
    text, token_ids, output = "", [], None
    async for output in generator:
        text += output.outputs[0].text
        token_ids += output.outputs[0].token_ids
    return text, token_ids, output


async def idle(llm):
    """Wait until no request is open; then the engine has none either."""
    while llm.stats().num_requests_running + llm.stats().num_requests_waiting:
        await asyncio.sleep(0.001)
    assert not engine_of(llm).has_unfinished_requests()
    pool = engine_of(llm).scheduler.pool
    assert pool.num_free == pool.num_blocks


def test_deltas_add_up(make_llm):
    async def main():
        async with make_llm() as llm:
            outputs = [output async for output in llm.generate("3 1 4", GREEDY, "mine")]
            assert [output.finished for output in outputs] == [False] * 11 + [True]
            assert {output.request_id for output in outputs} == {"mine"}
            assert all(len(output.outputs[0].token_ids) == 1 for output in outputs)
            ids = [output.outputs[0].token_ids[0] for output in outputs]
            assert "".join(output.outputs[0].text for output in outputs) == NumberTokenizer().decode(ids)
            tokens = [3, 1, 4]
            for token_id in ids:
                assert token_id == int(engine_of(llm).model.reference_logits(tokens).argmax())
                tokens.append(token_id)

    asyncio.run(main())


def test_many_at_once_are_each_as_alone(make_llm):
    async def main():
        async with make_llm(max_num_seqs=4, max_num_batched_tokens=16) as llm:
            params = [SamplingParams(seed=n, max_tokens=5 + n) for n in range(20)]
            alone = [(await collect(llm.generate(f"{n} 7", params[n])))[1] for n in range(20)]
            together = await asyncio.gather(*(collect(llm.generate(f"{n} 7", params[n])) for n in range(20)))
            assert [ids for _, ids, _ in together] == alone
            await idle(llm)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["aclose", "cancel", "drop"])
def test_leaving_ends_the_request(make_llm, how):
    async def main():
        llm = make_llm(seconds=0.01, max_model_len=4000)
        generator = llm.generate("3 1 4", ENDLESS)
        if how == "cancel":
            task = asyncio.ensure_future(collect(generator))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await anext(generator)
            if how == "aclose":
                await generator.aclose()
            else:
                del generator
                gc.collect()
        steps = len(engine_of(llm).model.batches)
        await idle(llm)
        assert len(engine_of(llm).model.batches) <= steps + 1 + (how == "drop")
        assert len((await collect(llm.generate("3 1 4", GREEDY)))[1]) == 12

    asyncio.run(main())


def test_cancelled_before_it_is_queued(make_llm):
    async def main():
        llm = make_llm()
        for delay in (0, 0, 0.0001, 0.0005):
            task = asyncio.ensure_future(collect(llm.generate("3 1 4", ENDLESS)))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await idle(llm)

    asyncio.run(main())


def test_several_texts_of_a_prompt(make_llm):
    async def main():
        llm = make_llm(max_num_seqs=4)
        params = SamplingParams(n=3, seed=5, max_tokens=9, stop=" 7")
        texts, ends, events = ["", "", ""], [None] * 3, []
        async for output in llm.generate("3 1 4", params):
            for completion in output.outputs:
                texts[completion.index] += completion.text
                ends[completion.index] = completion.finish_reason
            events.append(output.finished)
        assert events == [False] * (len(events) - 1) + [True]
        assert None not in ends
        assert len(set(texts)) == 3
        text, _, _ = await collect(llm.generate("3 1 4", SamplingParams(seed=5, max_tokens=9, stop=" 7")))
        assert text == texts[0]
        await idle(llm)

    asyncio.run(main())


def test_aborting_ends_all_texts(make_llm):
    async def main():
        llm = make_llm(max_num_seqs=2, seconds=0.005)
        generator = llm.generate("3 1 4", SamplingParams(n=3, temperature=0, ignore_eos=True), "a")
        await anext(generator)
        await llm.abort("a")
        *_, last = [output async for output in generator]
        assert last.finished
        assert [(c.index, c.finish_reason) for c in last.outputs] == [(i, "abort") for i in range(3)]
        await idle(llm)

    asyncio.run(main())


def test_abort_by_id(make_llm):
    async def main():
        llm = make_llm(seconds=0.005, max_model_len=4000)
        running, waiting = llm.generate("3 1 4", ENDLESS, "running"), llm.generate("5", ENDLESS, "waiting")
        await anext(running)
        task = asyncio.ensure_future(collect(waiting))
        while llm.stats().num_requests_waiting == 0:
            await asyncio.sleep(0.001)
        await llm.abort("unknown")
        await llm.abort("waiting")
        _, ids, last = await task
        assert (ids, last.finished, last.outputs[0].finish_reason) == ([], True, "abort")
        assert llm.stats().num_requests_running == 1  # the other one goes on
        await anext(running)
        await llm.abort("running")
        *_, last = await collect(running)
        assert last.outputs[0].finish_reason == "abort"
        await idle(llm)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("", RequestError), (None, RequestError), ("99", RequestError), ("1 " * 200, ContextLengthError)],
)
def test_invalid_requests_raise_before_the_first_item(make_llm, prompt, error):
    async def main():
        llm = make_llm()
        with pytest.raises(error):
            await anext(llm.generate(prompt, GREEDY))
        with pytest.raises(RequestError, match="sampling_params"):
            await anext(llm.generate("1", {"temperature": 0}))
        assert engine_of(llm).model.batches == []

    asyncio.run(main())


def test_an_id_is_used_once_at_a_time(make_llm):
    async def main():
        llm = make_llm(seconds=0.01)
        first = llm.generate("1", GREEDY, "a")
        await anext(first)
        with pytest.raises(RequestError, match="request_id"):
            await anext(llm.generate("1", GREEDY, "a"))
        await collect(first)
        assert len((await collect(llm.generate("1", GREEDY, "a")))[1]) == 12

    asyncio.run(main())


def test_a_full_queue_refuses(make_llm):
    async def main():
        llm = make_llm(max_queue=2, seconds=0.005)
        first = llm.generate("1", GREEDY)
        await anext(first)
        tasks = [asyncio.ensure_future(collect(llm.generate(f"{n}", GREEDY))) for n in (2, 3)]
        while llm.stats().num_requests_waiting < 2:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFullError, match="2 waiting") as full:
            await anext(llm.generate("4", GREEDY))
        assert full.value.num_waiting == 2
        await collect(first)
        for task in tasks:
            assert len((await task)[1]) == 12
        await idle(llm)

    asyncio.run(main())


def test_two_hundred_clients_of_a_queue_of_32(make_llm):
    """Good answers or refusals, nothing else; every answer is that of its own prompt."""

    async def main():
        llm = make_llm(max_queue=32, max_num_seqs=8, max_num_batched_tokens=64, kv_cache_tokens=512)
        model = engine_of(llm).model

        async def client(n):
            prompt = [n % 50, n // 50, *range(n % 40)]
            try:
                _, ids, _ = await collect(llm.generate(NumberTokenizer().decode(prompt), GREEDY))
            except QueueFullError:
                return None
            tokens = list(prompt)
            for token_id in ids:
                assert token_id == int(model.reference_logits(tokens).argmax())
                tokens.append(token_id)
            return len(ids)

        answers = await asyncio.gather(*(client(n) for n in range(200)))
        assert set(answers) == {12, None}
        assert answers.count(12) >= 40
        await idle(llm)

    asyncio.run(main())


def test_waiting_too_long_ends_the_request(make_llm):
    async def main():
        llm = make_llm(max_queue_wait_s=0.05, seconds=0.01, max_model_len=4000)
        first = llm.generate("1", SamplingParams(max_tokens=30))
        await anext(first)
        with pytest.raises(QueueFullError, match="waited"):
            await anext(llm.generate("2", GREEDY))
        assert len((await collect(first))[1]) == 29
        await idle(llm)

    asyncio.run(main())


def test_a_failing_engine_ends_every_stream(make_llm):
    async def main():
        llm = make_llm(max_num_seqs=2, seconds=0.002)
        tasks = [asyncio.ensure_future(collect(llm.generate(f"{n}", ENDLESS))) for n in range(3)]
        while llm.stats().num_requests_running < 2:
            await asyncio.sleep(0.001)
        assert llm.errored is None
        engine_of(llm).model.poison = True
        for task in tasks:
            with pytest.raises(ModelError, match="not finite"):
                await task
        assert isinstance(llm.errored, ModelError)
        with pytest.raises(EngineError, match="not finite"):
            await anext(llm.generate("1", GREEDY))
        assert llm.stats().num_requests_running == 0
        llm.close()
        assert engine_of(llm).model.closed

    asyncio.run(main())


def test_prompt_progress_comes_on_the_event_loop(make_llm):
    async def main():
        llm = make_llm(max_num_batched_tokens=4)
        seen = []

        def note(done, total):
            seen.append((done, total))
            assert threading.current_thread() is threading.main_thread()

        await collect(llm.generate("1 2 3 4 5 6 7 8 9 10", GREEDY, on_prompt=note))
        assert seen == [(4, 10), (8, 10)]

    asyncio.run(main())


def test_stats_count(make_llm):
    async def main():
        llm = make_llm(max_num_batched_tokens=4, max_model_len=128)
        before = llm.stats()
        assert (before.num_requests_running, before.num_requests_waiting, before.kv_cache_usage) == (0, 0, 0)
        generator = llm.generate("1 2 3 4 5 6", GREEDY)
        await anext(generator)
        assert 0 < llm.stats().kv_cache_usage <= 1
        await collect(generator)
        after = llm.stats()
        assert (after.prompt_tokens_total, after.generation_tokens_total) == (6, 12)
        assert (after.prompt_steps_total, after.decode_steps_total) == (2, 11)
        assert after.decode_seconds_total > 0

    asyncio.run(main())


def test_close_ends_streams_and_threads(make_llm):
    async def main():
        before = threading.active_count()
        llm = make_llm(seconds=0.005, max_model_len=4000)
        generator = llm.generate("1", ENDLESS)
        await anext(generator)
        assert threading.active_count() > before
        llm.close()
        llm.close()
        assert threading.active_count() == before
        with pytest.raises(RequestError, match="closed"):
            await collect(generator)
        with pytest.raises(RequestError, match="closed"):
            await anext(llm.generate("1", GREEDY))

    asyncio.run(main())


def test_an_event_loop_that_is_gone_costs_its_own_requests_alone(make_llm):
    llm = make_llm(seconds=0.005, max_model_len=4000)
    kept = []

    async def leave():
        kept.append(llm.generate("1", ENDLESS))
        await anext(kept[0])

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()

    async def main():
        assert len((await collect(llm.generate("2", GREEDY)))[1]) == 12
        await idle(llm)

    asyncio.run(main())
    assert llm.errored is None
    kept.clear()
