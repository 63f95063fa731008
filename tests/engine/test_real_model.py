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


def test_the_best_isa_is_the_default(tiny):
    with LLM(tiny, max_model_len=64) as llm:
        assert f"ISA {cpu.supported_isas()[-1]}," in llm.describe()


@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_every_isa_of_the_host(tiny, reference, isa):
    assert_same_bits(run(tiny, isa=isa)[0], reference)


def test_what_is_forced_stays_a_choice_of_each_llm(tiny, reference):
    run(tiny, isa="scalar")
    assert_same_bits(run(tiny, num_threads=1)[0], reference)
