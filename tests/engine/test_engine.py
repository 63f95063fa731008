"""Scheduling, chunking, stopping and refusing, on the mock model."""

from __future__ import annotations

import pytest
import torch

from hybrid.config import EngineConfig
from hybrid.errors import ConfigError, ContextLengthError, ModelError, RequestError
from hybrid.sampling_params import SamplingParams

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def ids(outputs):
    return [output.sampled.token_id for output in outputs]


def greedy_reference(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.reference_logits(tokens).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 10, 512])
def test_any_chunk_size_gives_the_ids_of_the_plain_loop(make_engine, run_engine, budget):
    engine = make_engine(max_num_batched_tokens=budget)
    outputs = run_engine(engine, {"a": (PROMPT, GREEDY)})["a"]
    assert ids(outputs) == greedy_reference(engine.model, PROMPT, 8)


@pytest.mark.parametrize("budget", [1, 4, 512])
def test_no_token_is_computed_twice(make_engine, run_engine, budget):
    engine = make_engine(max_num_batched_tokens=budget)
    run_engine(engine, {"a": (PROMPT, GREEDY)})
    # The last chosen token is never fed back.
    assert engine.model.num_computed == len(PROMPT) + 7


def test_prompts_across_block_borders(make_engine, run_engine):
    prompt = [i % 50 for i in range(150)]
    engine = make_engine(max_num_batched_tokens=37)
    outputs = run_engine(engine, {"a": (prompt, GREEDY)})["a"]
    assert ids(outputs) == greedy_reference(engine.model, prompt, 8)
    assert engine.model.batches[:5] == [[37], [37], [37], [37], [2]]


def test_requests_wait_for_their_turn(make_engine, run_engine):
    engine = make_engine()
    requests = {str(n): ([n, n + 1], GREEDY) for n in range(3)}
    outputs = run_engine(engine, requests)
    assert all(len(batch) == 1 for batch in engine.model.batches)
    for n in range(3):
        assert ids(outputs[str(n)]) == greedy_reference(engine.model, [n, n + 1], 8)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=7, max_tokens=8, top_p=0.9)])
def test_batch_mates_change_nothing(make_engine, run_engine, params):
    alone = run_engine(make_engine(), {"a": (PROMPT, params)})["a"]
    long = SamplingParams(seed=1, max_tokens=100)
    requests = {"x": ([7] * 12, long), "a": (PROMPT, params), "y": ([8], long)}
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=5)
    together = run_engine(engine, requests)
    assert ids(together["a"]) == ids(alone)
    assert max(len(batch) for batch in engine.model.batches) == 3
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def test_end_token_stops_and_ignore_eos_does_not(make_engine, run_engine):
    expected = greedy_reference(make_engine().model, PROMPT, 8)
    end = expected[3]
    stop = expected.index(end) + 1
    outputs = run_engine(make_engine(end_token_ids={end}), {"a": (PROMPT, GREEDY)})["a"]
    assert ids(outputs) == expected[:stop]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", None)
    ignoring = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = run_engine(make_engine(end_token_ids={end}), {"a": (PROMPT, ignoring)})["a"]
    assert ids(outputs) == expected
    assert outputs[-1].finish_reason == "length"


def test_stop_token_ids_name_the_reason(make_engine, run_engine):
    expected = greedy_reference(make_engine().model, PROMPT, 8)
    params = SamplingParams(temperature=0, stop_token_ids=[expected[2]])
    outputs = run_engine(make_engine(), {"a": (PROMPT, params)})["a"]
    assert ids(outputs) == expected[: expected.index(expected[2]) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", expected[2])


def test_min_tokens_masks_the_end(make_engine, run_engine):
    end = greedy_reference(make_engine().model, PROMPT, 1)[0]
    params = SamplingParams(temperature=0, max_tokens=6, min_tokens=4)
    outputs = run_engine(make_engine(end_token_ids={end}), {"a": (PROMPT, params)})["a"]
    assert len(outputs) >= 4
    assert end not in ids(outputs)[:4]


def test_the_context_end_is_a_length_stop(make_engine, run_engine):
    for params in (SamplingParams(seed=1), SamplingParams(seed=1, max_tokens=1000)):
        outputs = run_engine(make_engine(max_model_len=16), {"a": (PROMPT, params)})["a"]
        assert len(outputs) == 6
        assert outputs[-1].finish_reason == "length"


def test_a_prompt_that_does_not_fit_is_refused_before_work(make_engine):
    engine = make_engine(max_model_len=10)
    with pytest.raises(ContextLengthError) as refused:
        engine.add_request("a", PROMPT, GREEDY)
    assert (refused.value.num_prompt_tokens, refused.value.max_model_len) == (10, 10)
    assert not engine.has_unfinished_requests()
    assert engine.step() == []
    assert engine.model.batches == []


@pytest.mark.parametrize("prompt", [[], [-1], [50], [1, True], [1.0], ["a"]])
def test_bad_prompts_are_refused(make_engine, prompt):
    with pytest.raises(RequestError, match="prompt"):
        make_engine().add_request("a", prompt, GREEDY)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(stop_token_ids=[50]),
        SamplingParams(logit_bias={50: 1.0}),
        SamplingParams(allowed_token_ids=[3, 50]),
        SamplingParams(logprobs=51),
        SamplingParams(allowed_token_ids=[3], stop_token_ids=[3], min_tokens=1),
    ],
)
def test_params_that_do_not_suit_the_vocabulary_are_refused(make_engine, params):
    with pytest.raises(RequestError):
        make_engine().add_request("a", PROMPT, params)


def test_a_request_id_is_used_once_at_a_time(make_engine, run_engine):
    engine = make_engine()
    engine.add_request("a", PROMPT, GREEDY)
    with pytest.raises(RequestError, match="request_id"):
        engine.add_request("a", PROMPT, GREEDY)
    engine.abort_request("a")
    assert len(run_engine(engine, {"a": (PROMPT, GREEDY)})["a"]) == 8


def test_abort_frees_the_request_and_leaves_the_others(make_engine, run_engine):
    engine = make_engine(max_num_batched_tokens=4)
    engine.add_request("running", PROMPT, SamplingParams())
    engine.add_request("waiting", PROMPT, SamplingParams())
    engine.step()
    engine.abort_request("waiting")
    engine.abort_request("running")
    engine.abort_request("running")
    assert not engine.has_unfinished_requests()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    outputs = run_engine(engine, {"a": (PROMPT, GREEDY)})["a"]
    assert ids(outputs) == greedy_reference(engine.model, PROMPT, 8)


def test_aborting_a_waiting_request_leaves_the_running_one(make_engine):
    engine = make_engine()
    engine.add_request("running", PROMPT, GREEDY)
    engine.add_request("waiting", PROMPT, GREEDY)
    first = engine.step()
    engine.abort_request("waiting")
    tokens = ids(first)
    while engine.has_unfinished_requests():
        tokens += ids(engine.step())
    assert tokens == greedy_reference(engine.model, PROMPT, 8)


def test_an_interrupted_step_can_be_repeated(make_engine):
    engine = make_engine(max_num_batched_tokens=4)
    engine.add_request("a", PROMPT, GREEDY)
    engine.model.fail_at = 1
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.model.fail_at = None
    tokens = []
    while engine.has_unfinished_requests():
        tokens += ids(engine.step())
    assert tokens == greedy_reference(engine.model, PROMPT, 8)


def test_logits_that_are_not_finite_are_an_error(make_engine):
    engine = make_engine()
    engine.add_request("a", PROMPT, GREEDY)
    engine.model.poison = True
    with pytest.raises(ModelError, match=r"'a'.*nan"):
        engine.step()


def test_seeds_make_a_request_reproducible(make_engine, run_engine):
    seeded = SamplingParams(seed=11, max_tokens=20)
    runs = [run_engine(make_engine(seed=s), {"a": (PROMPT, seeded)})["a"] for s in (0, 1)]
    assert ids(runs[0]) == ids(runs[1])
    other = run_engine(make_engine(), {"a": (PROMPT, SamplingParams(seed=12, max_tokens=20))})["a"]
    assert ids(other) != ids(runs[0])


def test_the_engine_seed_decides_for_requests_without_one(make_engine, run_engine):
    free = SamplingParams(max_tokens=20)
    requests = {"a": (PROMPT, free), "b": (PROMPT, free)}
    first, again, other = (run_engine(make_engine(seed=s), dict(requests)) for s in (5, 5, 6))
    assert ids(first["a"]) == ids(again["a"])
    assert ids(first["b"]) == ids(again["b"])
    assert ids(first["a"]) != ids(first["b"])
    assert ids(first["a"]) != ids(other["a"])


def test_metrics_count_tokens_and_time(make_engine, run_engine):
    outputs = run_engine(make_engine(), {"a": (PROMPT, GREEDY)})["a"]
    metrics = outputs[-1].metrics
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (10, 8)
    assert 0 < metrics.first_token_s == metrics.queue_s + metrics.prompt_s
    assert metrics.prompt_tokens_per_s == pytest.approx(10 / metrics.prompt_s)
    assert metrics.generated_tokens_per_s == pytest.approx(7 / metrics.generation_s)
    assert outputs[0].metrics.generated_tokens_per_s is None


def test_torch_s_own_threads_rest_during_a_step(make_engine, monkeypatch):
    engine = make_engine()
    engine.add_request("a", PROMPT, GREEDY)
    seen = []
    compute_logits = engine.model.compute_logits
    monkeypatch.setattr(
        engine.model, "compute_logits", lambda x: seen.append(torch.get_num_threads()) or compute_logits(x)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine.step()
        assert (seen, torch.get_num_threads()) == ([1], 3)
        engine.model.fail_at = 0
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_close_frees_the_model(make_engine):
    engine = make_engine()
    engine.add_request("a", PROMPT, GREEDY)
    engine.close()
    assert engine.model.closed
    assert not engine.has_unfinished_requests()


def test_a_context_beyond_the_model_is_refused(make_engine):
    with pytest.raises(ConfigError, match="4096"):
        make_engine(max_model_len=4097)


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": 1},
        {"max_model_len": True},
        {"max_model_len": 8, "max_num_seqs": 0},
        {"max_model_len": 8, "max_num_batched_tokens": 0},
        {"max_model_len": 8, "max_num_seqs": 4, "max_num_batched_tokens": 3},
        {"max_model_len": 8, "seed": -1},
    ],
)
def test_bad_configurations_are_refused(options):
    with pytest.raises(ConfigError):
        EngineConfig(**options)


@pytest.mark.parametrize("budget", [3, 512])
@pytest.mark.parametrize("count", [0, 3, -1])
def test_prompt_logprobs_against_a_plain_loop(make_engine, run_engine, budget, count):
    engine = make_engine(max_num_batched_tokens=budget)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=count)
    entries = run_engine(engine, {"a": (PROMPT, params)})["a"][0].prompt_logprobs
    assert len(entries) == len(PROMPT)
    assert entries[0] is None
    for i in range(1, len(PROMPT)):
        expected = torch.log_softmax(engine.model.reference_logits(PROMPT[:i]).double(), 0)
        order = expected.argsort(descending=True).tolist()
        wanted = range(50) if count == -1 else {PROMPT[i], *order[:count]}
        assert set(entries[i]) == set(wanted)
        for token_id, entry in entries[i].items():
            assert entry.logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
            assert entry.rank == order.index(token_id) + 1


def test_whole_vocabulary_of_a_huge_prompt_is_refused(make_engine):
    engine = make_engine(max_model_len=4096, vocab_size=200_000)
    params = SamplingParams(prompt_logprobs=-1)
    engine.add_request("fits", [1] * 2685, params)  # 2684 rows of 800,000 bytes are just below 2 GiB
    engine.abort_request("fits")
    with pytest.raises(RequestError, match=r"prompt_logprobs.*2147483648"):
        engine.add_request("too much", [1] * 2686, params)
    with pytest.raises(RequestError, match="logprobs"):
        engine.add_request("too much", [1], SamplingParams(logprobs=-1))


@pytest.mark.parametrize("count", [0, 2, -1])
def test_logprobs_are_those_of_the_model_not_of_the_sampler(make_engine, run_engine, count):
    engine = make_engine()
    params = SamplingParams(
        temperature=3.0, top_k=2, seed=0, max_tokens=5, logprobs=count, logit_bias={4: 9.0}
    )
    tokens = list(PROMPT)
    for output in run_engine(engine, {"a": (PROMPT, params)})["a"]:
        expected = torch.log_softmax(engine.model.reference_logits(tokens).double(), 0)
        token_id = output.sampled.token_id
        assert output.sampled.logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
        best = expected.topk(max(count, 0)).indices.tolist()
        assert set(output.sampled.logprobs) == (set(range(50)) if count == -1 else {token_id, *best})
        tokens.append(token_id)
