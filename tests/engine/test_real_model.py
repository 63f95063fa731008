"""The engine on real kernels: the same bits whatever the ISA, the threads, the chunks and the batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid import LLM, SamplingParams
from hybrid.cli.main import main

PROMPT = {"prompt_token_ids": [(7 * i + 3) % 1000 for i in range(90)]}
PARAMS = SamplingParams(seed=3, max_tokens=12, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    assert main(["synth", "tiny", "-o", str(path)]) == 0
    return path


def run(path, prompts=(PROMPT,), **options):
    with LLM(path, max_model_len=256, **options) as llm:
        return llm.generate(list(prompts), PARAMS)


@pytest.fixture(scope="module")
def reference(tiny):
    return run(tiny, num_threads=1)[0]


def assert_same_bits(output, reference):
    assert output.outputs[0].token_ids == reference.outputs[0].token_ids
    np.testing.assert_array_equal(output.prompt_logprobs.array, reference.prompt_logprobs.array)
    for found, expected in zip(output.outputs[0].logprobs, reference.outputs[0].logprobs, strict=True):
        np.testing.assert_array_equal(found.row, expected.row)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads(tiny, reference, num_threads):
    assert_same_bits(run(tiny, num_threads=num_threads)[0], reference)


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_chunks(tiny, reference, budget):
    assert_same_bits(run(tiny, num_threads=2, max_num_batched_tokens=budget)[0], reference)


def test_batch_mates(tiny, reference):
    mates = [{"prompt_token_ids": [5, 6, 7]}, PROMPT, {"prompt_token_ids": [9] * 150}]
    outputs = run(tiny, mates, num_threads=2, max_num_seqs=3, max_num_batched_tokens=40)
    assert_same_bits(outputs[1], reference)


def test_requests_of_several_threads(tiny, reference):
    """They take turns: each gets the bits it gets alone."""
    with LLM(tiny, max_model_len=256, num_threads=2, max_num_seqs=3) as llm, ThreadPoolExecutor(4) as threads:
        tasks = [threads.submit(llm.generate, [PROMPT], PARAMS, use_tqdm=False) for _ in range(8)]
        for task in tasks:
            assert_same_bits(task.result(timeout=60)[0], reference)


def text_of(llm, prompt, params):
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    return output


def test_a_reused_prefix_has_the_bits_of_a_computed_one(tiny):
    """The second turn finds blocks of the prompt, of the written text and of both, and is none the wiser."""
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, logprobs=-1)
    first_prompt = [(11 * i + 5) % 1000 for i in range(100)]
    options = {"max_model_len": 512, "num_threads": 2}
    with LLM(tiny, **options) as llm:
        first = text_of(llm, first_prompt, params)
        second_prompt = [*first_prompt, *first.outputs[0].token_ids, *range(20)]
        reused = text_of(llm, second_prompt, params)
    assert (first.num_cached_tokens, reused.num_cached_tokens) == (0, 192)
    with LLM(tiny, **options) as llm:
        computed = text_of(llm, second_prompt, params)
    assert computed.num_cached_tokens == 0
    assert reused.outputs[0].token_ids == computed.outputs[0].token_ids
    for found, expected in zip(reused.outputs[0].logprobs, computed.outputs[0].logprobs, strict=True):
        np.testing.assert_array_equal(found.row, expected.row)


def test_among_fifteen_others_and_short_of_memory(tiny, reference):
    """Sixteen at once in too little memory: prompts that begin alike, texts of different lengths."""
    mates = [{"prompt_token_ids": [n, *PROMPT["prompt_token_ids"][: 10 * n]]} for n in range(1, 9)]
    mates += [{"prompt_token_ids": [*PROMPT["prompt_token_ids"][: 70 + n], n]} for n in range(7)]
    params = [SamplingParams(seed=n, max_tokens=160 if n > 7 else 20, ignore_eos=True) for n in range(15)]
    options = {"max_model_len": 256, "num_threads": 2, "max_num_seqs": 16, "max_num_batched_tokens": 40}
    with LLM(tiny, kv_cache_tokens=448, **options) as llm:
        outputs = llm.generate([*mates, PROMPT], [*params, PARAMS], use_tqdm=False)
        stats = llm.stats()
    assert_same_bits(outputs[-1], reference)
    assert stats.num_preemptions_total > 0
    assert stats.prefix_cache_hits > 0
    with LLM(tiny, max_model_len=256, num_threads=2) as llm:
        for mate, each, output in zip(mates, params, outputs, strict=False):
            assert (
                output.outputs[0].token_ids
                == text_of(llm, mate["prompt_token_ids"], each).outputs[0].token_ids
            )


def test_several_texts_of_a_prompt(tiny, reference):
    params = SamplingParams(n=4, seed=3, max_tokens=12, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)
    with LLM(tiny, max_model_len=256, num_threads=2, max_num_seqs=4) as llm:
        output = text_of(llm, PROMPT["prompt_token_ids"], params)
        stats = llm.stats()
    assert_same_bits(output, reference)
    with LLM(tiny, max_model_len=256, num_threads=2, max_num_seqs=1) as llm:
        one_by_one = text_of(llm, PROMPT["prompt_token_ids"], params)
    for found, expected in zip(output.outputs, one_by_one.outputs, strict=True):
        assert found.token_ids == expected.token_ids
        for a, b in zip(found.logprobs, expected.logprobs, strict=True):
            np.testing.assert_array_equal(a.row, b.row)
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
    assert output.metrics.num_generated_tokens == 48
    assert (stats.num_requests_running, stats.kv_cache_usage) == (0, 0)


def test_the_best_isa_is_the_default(tiny):
    with LLM(tiny, max_model_len=64) as llm:
        assert f"ISA {cpu.supported_isas()[-1]}," in llm.describe()


@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_every_isa_of_the_host(tiny, reference, isa):
    assert_same_bits(run(tiny, isa=isa)[0], reference)


def test_what_is_forced_stays_a_choice_of_each_llm(tiny, reference):
    run(tiny, isa="scalar")
    assert_same_bits(run(tiny, num_threads=1)[0], reference)
