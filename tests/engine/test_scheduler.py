"""Blocks, turns and shared prompts, on the mock model, whose text depends on every cached token."""

from __future__ import annotations

import random

import pytest
import torch

from hybrid.engine.sequence import FailedRequest
from hybrid.errors import ConfigError, RequestError
from hybrid.kvcache.blocks import BLOCK_SIZE
from hybrid.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)


def prompt_of(length, seed=0):
    return [random.Random(seed * 1000 + i).randrange(50) for i in range(length)]


def reference(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.reference_logits(tokens).argmax()))
    return tokens[len(prompt) :]


def ids(outputs, index=0):
    return [output.sampled.token_id for output in outputs if output.index == index]


def all_free(engine):
    pool = engine.scheduler.pool
    return pool.num_free == pool.num_blocks and not any(pool._references)


# --- turns -------------------------------------------------------------------------------------


def test_running_texts_go_on_between_the_layers_of_a_prompt(make_engine):
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=32)
    model = engine.model
    model.num_layers, model.layer_seconds, model.seconds = 8, 0.002, 0.002
    engine.add_request("writer", [1], SamplingParams(temperature=0, max_tokens=100))
    for _ in range(5):
        engine.step()
    engine.add_request("long", prompt_of(64), GREEDY)
    model.trace.clear()
    outputs = {"writer": [], "long": []}
    while len(outputs["long"]) == 0:
        for output in engine.step():
            outputs[output.request_id].append(output)
    pauses = "".join(name[0] for name in model.trace).split("d")
    assert sum(pauses.count("l") for pauses in pauses) == 16  # both chunks, each layer once
    # A layer takes about as long as a decode step, of which a prompt may take 1.8: one layer, seldom two.
    assert max(len(pause) for pause in pauses) <= 3
    assert len(outputs["writer"]) >= 5
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert ids(outputs["long"]) == reference(model, prompt_of(64), 8)


def test_a_prompt_alone_is_not_paused(make_engine):
    engine = make_engine()
    engine.add_request("a", prompt_of(64), GREEDY)
    assert len(engine.step()) == 1


def test_commands_pause_a_prompt_after_any_layer(make_engine, run_engine):
    engine = make_engine()
    engine.interrupted = lambda: True
    engine.add_request("a", prompt_of(64), GREEDY)
    for layers in (1, 2, 3):
        assert engine.step() == []
        assert len(engine.model.trace) == layers - 1
    engine.abort_request("a")
    assert all_free(engine)
    assert engine.step() == []
    engine.interrupted = lambda: False
    assert ids(run_engine(engine, {"b": (prompt_of(64), GREEDY)})["b"]) == reference(
        engine.model, prompt_of(64), 8
    )


def test_blocks_of_a_prompt_that_is_aborted_between_layers_stay_its_own(make_engine):
    """Two prompts share a pass; one is aborted, and the other's text must not suffer from who comes next."""
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=512, max_model_len=128, kv_cache_tokens=320)
    prompts = {name: prompt_of(100, seed) for seed, name in enumerate("abc")}
    engine.interrupted = lambda: True
    engine.add_request("a", prompts["a"], GREEDY)
    engine.add_request("b", prompts["b"], GREEDY)
    assert engine.step() == []
    engine.abort_request("a")
    assert engine.scheduler.pool.num_free == 1
    engine.add_request("c", prompts["c"], GREEDY)
    engine.interrupted = lambda: False
    outputs = {"b": [], "c": []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id].append(output)
    for name, found in outputs.items():
        assert ids(found) == reference(engine.model, prompts[name], 8)
    assert all_free(engine)


def test_a_long_prompt_does_not_keep_short_ones_waiting(make_engine):
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=32, max_model_len=600)
    engine.add_request("long", prompt_of(500), GREEDY)
    engine.add_request("short", prompt_of(10, 1), GREEDY)
    first = engine.step()
    assert [output.request_id for output in first] == ["short"]
    assert engine.model.batches == [[22, 10]]


# --- memory ------------------------------------------------------------------------------------


def test_texts_that_outgrow_the_cache_give_way_and_come_back(make_engine, run_engine):
    """Four contexts of 200 tokens in a cache of 4 blocks."""
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_tokens=256)
    params = SamplingParams(temperature=0, max_tokens=150)
    prompts = {str(n): prompt_of(20 + n, n) for n in range(4)}
    outputs = run_engine(engine, {name: (prompt, params) for name, prompt in prompts.items()}, 10_000)
    for name, prompt in prompts.items():
        assert ids(outputs[name]) == reference(engine.model, prompt, 150)
    assert engine.scheduler.counters.num_preemptions_total > 0
    assert all_free(engine)


def test_the_first_to_come_never_gives_way(make_engine):
    engine = make_engine(max_num_seqs=2, kv_cache_tokens=256)
    engine.add_request("first", prompt_of(60), SamplingParams(temperature=0, max_tokens=140))
    engine.add_request("last", prompt_of(60, 1), SamplingParams(temperature=0, max_tokens=140))
    order = []
    while engine.has_unfinished_requests():
        order += [output.request_id for output in engine.step() if output.finish_reason]
    assert order == ["first", "last"]


def test_sampling_goes_on_where_it_was_after_giving_way(make_engine, run_engine):
    params = [SamplingParams(seed=n, max_tokens=150, repetition_penalty=1.1) for n in range(3)]
    requests = {str(n): (prompt_of(30, n), params[n]) for n in range(3)}
    alone = {name: run_engine(make_engine(), {name: request})[name] for name, request in requests.items()}
    engine = make_engine(max_num_seqs=3, kv_cache_tokens=256)
    together = run_engine(engine, requests, 10_000)
    assert engine.scheduler.counters.num_preemptions_total > 0
    assert {name: ids(found) for name, found in together.items()} == {
        name: ids(found) for name, found in alone.items()
    }


def test_prompt_logprobs_survive_giving_way(make_engine, run_engine):
    params = SamplingParams(temperature=0, max_tokens=100, prompt_logprobs=1)
    requests = {str(n): (prompt_of(70, n), params) for n in range(3)}
    engine = make_engine(max_num_seqs=3, kv_cache_tokens=256)
    together = run_engine(engine, requests, 10_000)
    for name, (prompt, _) in requests.items():
        alone = run_engine(make_engine(), {"a": (prompt, params)})["a"]
        assert together[name][0].prompt_logprobs == alone[0].prompt_logprobs
        assert ids(together[name]) == ids(alone)


def test_a_cache_below_one_context_is_refused(make_engine):
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        make_engine(max_model_len=200, kv_cache_tokens=199)


# --- prefix cache ------------------------------------------------------------------------------


def cached(outputs):
    return outputs[0].num_cached_tokens


def test_a_second_turn_computes_only_what_is_new(make_engine, run_engine):
    engine = make_engine(max_model_len=600)
    first = prompt_of(200)
    answer = ids(run_engine(engine, {"a": (first, SamplingParams(temperature=0, max_tokens=100))})["a"])
    second = first + answer + prompt_of(30, 9)
    before = engine.model.num_computed
    outputs = run_engine(engine, {"b": (second, GREEDY)})["b"]
    assert cached(outputs) == 299 // BLOCK_SIZE * BLOCK_SIZE  # the last token written is never computed
    assert engine.model.num_computed - before == len(second) - cached(outputs) + 7
    assert ids(outputs) == reference(engine.model, second, 8)
    metrics = outputs[-1].metrics
    assert metrics.num_cached_tokens == cached(outputs)
    assert metrics.prompt_tokens_per_s == pytest.approx((len(second) - cached(outputs)) / metrics.prompt_s)
    counters = engine.scheduler.counters
    assert (counters.prefix_cache_queries, counters.prefix_cache_hits) == (530, cached(outputs))


@pytest.mark.parametrize("length, expected", [(63, 0), (64, 0), (65, 64), (128, 64), (129, 128)])
def test_the_last_token_is_always_computed(make_engine, run_engine, length, expected):
    engine = make_engine()
    prompt = prompt_of(length)
    for turn in range(2):
        outputs = run_engine(engine, {"a": (prompt, GREEDY)})["a"]
        assert cached(outputs) == expected * turn
        assert ids(outputs) == reference(engine.model, prompt, 8)


def test_one_other_token_changes_all_blocks_after_it(make_engine, run_engine):
    engine = make_engine(kv_cache_tokens=2000)
    prompt = prompt_of(190)
    run_engine(engine, {"a": (prompt, GREEDY)})
    for position, expected in ((0, 0), (63, 0), (64, 64), (130, 128)):
        other = list(prompt)
        other[position] = (other[position] + 1) % 50
        outputs = run_engine(engine, {"a": (other, GREEDY)})["a"]
        assert cached(outputs) == expected
        assert ids(outputs) == reference(engine.model, other, 8)


def test_requests_share_blocks_while_they_run(make_engine, run_engine):
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=200, kv_cache_tokens=576)
    shared = prompt_of(150)
    run_engine(engine, {"first": (shared, GREEDY)})
    requests = {str(n): ([*shared, n], SamplingParams(temperature=0, max_tokens=40)) for n in range(4)}
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
    engine.step()
    assert len(engine.scheduler.running) == 4  # twelve blocks and one to go for each, in nine
    outputs = {name: [] for name in requests}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id].append(output)
    for name, (prompt, _) in requests.items():
        assert ids(outputs[name])[-30:] == reference(engine.model, prompt, 40)[-30:]
    assert all_free(engine)


def test_log_probabilities_of_a_prompt_compute_it_all(make_engine, run_engine):
    engine = make_engine()
    prompt, params = prompt_of(150), SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
    first = run_engine(engine, {"a": (prompt, params)})["a"]
    again = run_engine(engine, {"a": (prompt, params)})["a"]
    assert cached(again) == 0
    assert again[0].prompt_logprobs == first[0].prompt_logprobs
    assert cached(run_engine(engine, {"a": (prompt, GREEDY)})["a"]) == 128


def test_random_traffic_with_a_small_cache_gives_the_plain_text(make_engine):
    """Shared beginnings, aborts and too little memory, all at once."""
    rng = random.Random(5)
    engine = make_engine(max_num_seqs=5, max_num_batched_tokens=48, max_model_len=256, kv_cache_tokens=320)
    stems = [prompt_of(130, seed) for seed in range(3)]
    outputs, prompts, added = {}, {}, 0
    while added < 60 or engine.has_unfinished_requests():
        stop = rng.random() < 0.5
        engine.interrupted = lambda stop=stop: stop
        if added < 60 and rng.random() < 0.6:
            name = str(added)
            prompts[name] = rng.choice(stems)[: rng.randrange(1, 130)] + prompt_of(
                rng.randrange(1, 40), added
            )
            params = SamplingParams(temperature=0, max_tokens=rng.randrange(1, 150), n=rng.choice([1, 1, 3]))
            engine.add_request(name, prompts[name], params)
            outputs[name], added = [], added + 1
        for output in engine.step():
            outputs[output.request_id].append(output)
        if rng.random() < 0.01 and outputs:
            engine.abort_request(rng.choice(list(outputs)))
    assert all_free(engine)
    assert engine.scheduler.counters.num_preemptions_total > 0
    assert engine.scheduler.counters.prefix_cache_hits > 0
    for name, found in outputs.items():
        for index in range(3):
            text = ids(found, index)
            assert text == reference(engine.model, prompts[name], len(text))


# --- several texts of one prompt ---------------------------------------------------------------


def test_several_texts_share_the_prompt(make_engine, run_engine):
    engine = make_engine(max_num_seqs=4)
    params = SamplingParams(n=3, seed=7, max_tokens=10)
    prompt = prompt_of(150)
    outputs = run_engine(engine, {"a": (prompt, params)})["a"]
    texts = [ids(outputs, index) for index in range(3)]
    assert [len(text) for text in texts] == [10, 10, 10]
    assert len({tuple(text) for text in texts}) == 3
    assert (engine.model.num_computed, engine.model.num_copied) == (150 + 3 * 9, 2)
    alone = run_engine(make_engine(), {"a": (prompt, SamplingParams(seed=7, max_tokens=10))})["a"]
    assert ids(alone) == texts[0]
    narrow = make_engine(max_num_seqs=1)
    outputs = run_engine(narrow, {"a": (prompt, params)})["a"]
    assert [ids(outputs, index) for index in range(3)] == texts
    assert (narrow.model.num_computed, narrow.model.num_copied) == (150 + 2 * (150 - 128) + 3 * 9, 0)
    assert all_free(engine)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128])
def test_texts_begin_apart_wherever_the_prompt_ends(make_engine, run_engine, length):
    params = SamplingParams(n=3, seed=1, max_tokens=70)
    prompt = prompt_of(length)
    engine = make_engine(max_num_seqs=3)
    outputs = run_engine(engine, {"a": (prompt, params)})["a"]
    for index in range(3):
        tokens = list(prompt)
        for output in (output for output in outputs if output.index == index):
            logits = engine.model.reference_logits(tokens)
            chosen = output.sampled.token_id
            assert float(logits[chosen]) > float(logits.max()) - 15  # the text follows from its own tokens
            tokens.append(chosen)
        alone = make_engine(max_num_seqs=1)
        assert ids(run_engine(alone, {"a": (prompt, params)})["a"], index) == tokens[length:]
    assert engine.model.num_copied == (2 if length % BLOCK_SIZE else 0)
    assert all_free(engine)


def test_aborting_a_request_ends_all_its_texts(make_engine):
    for steps in range(1, 8):
        engine = make_engine(max_num_seqs=2)
        engine.add_request("a", prompt_of(10), SamplingParams(n=4, max_tokens=50))
        for _ in range(steps):
            engine.step()
        engine.abort_request("a")
        assert not engine.has_unfinished_requests()
        assert not engine.scheduler.waiting
        assert all_free(engine)


# --- structured output -------------------------------------------------------------------------


class Countdown:
    """Allows one token after another, then nothing."""

    def __init__(self, tokens):
        self.left, self.accepted = list(tokens), []

    def allowed_mask(self):
        return torch.zeros(50, dtype=torch.bool).index_fill(
            0, torch.tensor(self.left[:1], dtype=torch.int64), True
        )

    def accept(self, token_id):
        self.accepted.append(token_id)
        assert token_id == self.left.pop(0)

    @property
    def finished(self):
        return not self.left


def constrained(engine, constraint, prompt=(1, 2), **params):
    sequence = engine.prepare("a", list(prompt), SamplingParams(**params))
    sequence.constraint = constraint
    engine.add(sequence)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize("temperature", [0, 5.0])
def test_a_grammar_decides_what_is_written_and_when_it_ends(make_engine, temperature):
    constraint = Countdown([7, 9, 7])
    outputs = constrained(make_engine(), constraint, temperature=temperature, max_tokens=20)
    assert [output.sampled.token_id for output in outputs] == [7, 9, 7] == constraint.accepted
    assert [output.finish_reason for output in outputs] == [None, None, "stop"]
    assert outputs[-1].is_text


def test_a_grammar_does_not_see_the_token_that_ends_the_text(make_engine):
    constraint = Countdown([7, 49])
    outputs = constrained(make_engine(end_token_ids={49}), constraint, max_tokens=20)
    assert (constraint.accepted, outputs[-1].finish_reason, outputs[-1].is_text) == ([7], "stop", False)


def test_a_completed_grammar_ends_before_min_tokens(make_engine):
    outputs = constrained(make_engine(end_token_ids={49}), Countdown([7, 49]), min_tokens=5, max_tokens=9)
    assert [output.sampled.token_id for output in outputs[:2]] == [7, 49]


class Broken(Countdown):
    def __init__(self, where):
        super().__init__([7, 9])
        self.where = where

    def allowed_mask(self):
        if self.where == "mask":
            raise ValueError("broken grammar")
        return super().allowed_mask() if self.where != "dead end" else torch.zeros(50, dtype=torch.bool)

    def accept(self, token_id):
        if self.where == "accept":
            raise ValueError("broken grammar")
        super().accept(token_id)


@pytest.mark.parametrize("where", ["mask", "accept", "dead end"])
def test_a_grammar_that_fails_fails_its_request_alone(make_engine, where):
    engine = make_engine(max_num_seqs=2)
    engine.add_request("other", prompt_of(9), GREEDY)
    outputs = constrained(engine, Broken(where))
    (failed,) = [output for output in outputs if isinstance(output, FailedRequest)]
    assert failed.request_id == "a"
    assert isinstance(failed.error, RequestError if where == "dead end" else ValueError)
    others = [output for output in outputs if output.request_id == "other"]
    assert ids(others) == reference(engine.model, prompt_of(9), 8)
    assert all_free(engine)
