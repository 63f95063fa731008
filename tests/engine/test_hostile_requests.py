"""Requests nobody should send, to the demo model: each is refused or answered, and the next one works."""

from __future__ import annotations

import asyncio
import math

import pytest

from hybrid import AsyncLLM, SamplingParams
from hybrid.errors import ConfigError, ContextLengthError, RequestError

SHORT = SamplingParams(temperature=0, max_tokens=4)
CONTEXT = 128


@pytest.fixture(scope="module")
def llm():
    llm = AsyncLLM("demo", max_model_len=CONTEXT, max_num_seqs=4, num_threads=1)
    yield llm
    assert llm.errored is None
    llm.close()


@pytest.fixture(autouse=True)
def answers_as_before(llm):
    """The engine is unharmed by whatever a test sent."""
    yield
    assert len(ask(llm, "Once upon a time")) > 4
    stats = llm.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_cache_usage) == (0, 0, 0)


def ask(llm, prompt, params=SHORT, request_id=None):
    """The text, in a loop of its own."""

    async def main():
        return "".join(
            [o.outputs[0].text async for o in llm.generate(prompt, params, request_id) if o.outputs]
        )

    return asyncio.run(main())


@pytest.mark.parametrize(
    "prompt",
    [
        None, 7, 1.5, True, b"bytes", "", [], [1, 2], ["a"], {}, {"prompt": ""}, {"prompt": 5}, {"text": "a"},
        {"prompt_token_ids": []}, {"prompt_token_ids": None}, {"prompt_token_ids": "12"},
        {"prompt_token_ids": [-1]}, {"prompt_token_ids": [10**9]}, {"prompt_token_ids": [2**70]},
        {"prompt_token_ids": [1.0]}, {"prompt_token_ids": [True]}, {"prompt_token_ids": [None]},
        {"prompt_token_ids": ["1"]}, {"prompt_token_ids": [[1, 2]]}, {"prompt_token_ids": {1: 2}},
        {"prompt_token_ids": math.nan},
    ],
)  # fmt: skip
def test_prompts_of_no_kind(llm, prompt):
    with pytest.raises(RequestError, match="prompt"):
        ask(llm, prompt)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 100_000])
def test_prompts_that_do_not_fit(llm, length):
    with pytest.raises(ContextLengthError) as refused:
        ask(llm, {"prompt_token_ids": [5] * length})
    assert (refused.value.num_prompt_tokens, refused.value.max_model_len) == (length, CONTEXT)


@pytest.mark.parametrize(
    "text", ["\ud800", "a\udfffb", "\x00", "\u202e", "\U0010ffff" * 9, "\r\n\t", "<|eot|>"]
)
def test_odd_texts(llm, text):
    surrogate = any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)
    if surrogate:
        with pytest.raises(RequestError, match="lone surrogate"):
            ask(llm, text)
    else:
        ask(llm, text)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": math.nan}, {"temperature": -1}, {"temperature": math.inf}, {"top_p": 0},
        {"top_p": 1.0001}, {"top_k": -5}, {"min_p": 2}, {"max_tokens": -1}, {"max_tokens": 0},
        {"n": 10**6}, {"n": 0}, {"stop": ["x"] * 65}, {"stop": ""}, {"stop": ["a", ""]}, {"seed": 2**63},
        {"seed": -1}, {"logit_bias": {-1: 1}}, {"logit_bias": {1: math.nan}}, {"logprobs": 10**6},
        {"repetition_penalty": 0}, {"min_tokens": 9, "max_tokens": 3}, {"structured_outputs": {"regex": "("}},
    ],
)  # fmt: skip
def test_parameters_out_of_range_never_reach_the_engine(llm, fields):
    with pytest.raises(RequestError, match=next(iter(fields))):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={10**9: 1.0}),
        SamplingParams(stop_token_ids=[10**9]),
        SamplingParams(allowed_token_ids=[10**9]),
        SamplingParams(logit_bias={2**80: 1.0}),
    ],
)
def test_tokens_the_vocabulary_lacks(llm, params):
    with pytest.raises(RequestError, match="token"):
        ask(llm, "a", params)


@pytest.mark.parametrize("params", [{"temperature": 0}, "hot", 3, []])
def test_parameters_of_no_kind(llm, params):
    with pytest.raises(RequestError, match="sampling_params"):
        ask(llm, "a", params)


@pytest.mark.parametrize("request_id", [5, b"x", ("a",), 1.0])
def test_ids_of_no_kind(llm, request_id):
    with pytest.raises(RequestError, match="request_id"):
        ask(llm, "a", SHORT, request_id)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e300, seed=1, max_tokens=4),
        SamplingParams(temperature=1e-4, seed=1, max_tokens=4),
        SamplingParams(repetition_penalty=1e30, max_tokens=4),
        SamplingParams(repetition_penalty=1e-30, max_tokens=4),
        SamplingParams(top_p=1e-300, top_k=1, min_p=1.0, max_tokens=4),
        SamplingParams(logit_bias=dict.fromkeys(range(200), -100.0), max_tokens=4),
        SamplingParams(allowed_token_ids=[3] * 10_000, max_tokens=4),
        SamplingParams(stop=["\ud800", "a" * 100_000], max_tokens=4),
        SamplingParams(seed=2**63 - 1, n=64, max_tokens=2),
        SamplingParams(max_tokens=10**18, ignore_eos=True),
    ],
)
def test_extremes_within_the_rules_are_answered(llm, params):
    ask(llm, "a fox", params)


def test_max_tokens_beyond_the_context_end_by_length(llm):
    async def main():
        params = SamplingParams(temperature=0, max_tokens=10**6, ignore_eos=True)
        outputs = [o async for o in llm.generate({"prompt_token_ids": [5] * 100}, params)]
        assert len(outputs) == CONTEXT - 100
        assert outputs[-1].outputs[0].finish_reason == "length"

    asyncio.run(main())


@pytest.mark.parametrize(
    "options", [{"max_queue": -1}, {"max_queue": 1.5}, {"max_queue_wait_s": 0}, {"max_queue_wait_s": "x"}]
)
def test_bad_limits_are_refused_before_loading(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        AsyncLLM("/no/such/file.gguf", **options)
