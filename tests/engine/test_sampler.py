"""The sampler against plain implementations over the whole sorted vocabulary."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.engine.adjustments import TokenCounts
from hybrid.engine.sampler import Sampler, adjust_logits, candidates, draw
from hybrid.engine.sequence import Sequence
from hybrid.sampling_params import SamplingParams


def make_sequence(params, prompt=(1, 2), output=(), end=frozenset()):
    sequence = Sequence("r", list(prompt), params, end_token_ids=end, max_tokens=100)
    sequence.seed(params.seed or 0)
    sequence.token_ids += output
    return sequence


def plain_filter(scaled: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after min_p, top_k, top_p, one after the other on float64, ties broken by nothing."""
    order = np.argsort(-scaled, kind="stable")
    values = scaled[order].astype(np.float64)
    probabilities = np.exp(values - values[0])
    probabilities /= probabilities.sum()
    keep = probabilities >= params.min_p * probabilities[0]
    if params.top_k > 0:
        keep[params.top_k :] = False
    probabilities = np.where(keep, probabilities, 0)
    probabilities /= probabilities.sum()
    if params.top_p < 1:  # at 1, rounding of the sum would cut the tail
        keep &= np.cumsum(probabilities) - probabilities < params.top_p
    probabilities = np.where(keep, probabilities, 0)
    result = np.zeros_like(probabilities)
    result[order] = probabilities / probabilities.sum()
    return result


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 3000),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    top_k=st.sampled_from([0, -1, 1, 5, 300, 5000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)
def test_candidates_are_those_of_the_plain_filters(seed, vocab_size, spread, top_k, top_p, min_p):
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    scaled = spread * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))
    probabilities, ids = candidates(scaled, params)
    found = torch.zeros(vocab_size)
    found[torch.arange(vocab_size) if ids is None else ids] = probabilities / probabilities.sum()
    expected = plain_filter(scaled.numpy(), params)
    # A token on the border of top_p or min_p may fall on either side by rounding.
    wrong = np.flatnonzero((found.numpy() > 0) != (expected > 0))
    assert len(wrong) <= 1
    # exp of a float32 difference: relative error eps times the size of the exponent, and a border token.
    slack = expected[wrong].sum() + found[wrong].sum().item()
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=slack + 1e-9)


def test_draws_follow_the_probabilities():
    scaled = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    generator = torch.Generator().manual_seed(1)
    for params, expected in (
        (SamplingParams(), [0.5, 0.25, 0.125, 0.125]),
        (SamplingParams(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (SamplingParams(top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
        (SamplingParams(min_p=0.3), [2 / 3, 1 / 3, 0, 0]),
    ):
        counts = Counter(draw(scaled, params, generator) for _ in range(4000))
        for token_id, probability in enumerate(expected):
            deviation = math.sqrt(4000 * probability * (1 - probability))
            assert abs(counts[token_id] - 4000 * probability) <= 4 * deviation


def test_a_masked_token_is_never_drawn():
    scaled = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    generator = torch.Generator().manual_seed(0)
    for params in (SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.999999)):
        assert {draw(scaled, params, generator) for _ in range(200)} == {1, 3}


def test_zero_temperature_is_greedy():
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    for temperature in (0, 0.0, 9e-6):
        params = SamplingParams(temperature=temperature)
        tokens = Sampler().sample(logits, [make_sequence(params) for _ in range(3)])
        assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


def test_a_low_temperature_is_almost_greedy():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    token = Sampler().sample(logits, [make_sequence(SamplingParams(temperature=1e-4))])[0]
    assert token.token_id == int(logits.argmax())


def test_rows_with_different_parameters_do_not_disturb_each_other():
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    kinds = [SamplingParams(seed=1), SamplingParams(temperature=0), SamplingParams(seed=2, top_p=0.5)]
    together = Sampler().sample(logits, [make_sequence(params) for params in kinds])
    for i, params in enumerate(kinds):
        assert Sampler().sample(logits[i : i + 1], [make_sequence(params)])[0] == together[i]


def test_penalties_by_hand():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 3.0])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    sequence = make_sequence(params, prompt=[0, 1], output=[1, 1, 4])
    # 0: 2/2; 1: -2*2 - 2*0.25 - 0.5; 4: 3/2 - 0.25 - 0.5; 2 and 3 were never seen.
    assert adjust_logits(logits, sequence).tolist() == [1.0, -5.0, 1.0, 0.5, 0.75]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5, 3.0]


def test_bias_allowed_ids_and_min_tokens_by_hand():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 3.0])
    inf = math.inf
    params = SamplingParams(logit_bias={1: 5.0, 4: -100.0})
    assert adjust_logits(logits, make_sequence(params)).tolist() == [2.0, 3.0, 1.0, 0.5, -97.0]
    params = SamplingParams(allowed_token_ids=[1, 3], logit_bias={3: 1.0, 4: 50.0})
    assert adjust_logits(logits, make_sequence(params)).tolist() == [-inf, -2.0, -inf, 1.5, -inf]
    params = SamplingParams(min_tokens=1, stop_token_ids=[0])
    waiting = make_sequence(params, end=frozenset({4}))
    assert adjust_logits(logits, waiting).tolist() == [-inf, -2.0, 1.0, 0.5, -inf]
    assert adjust_logits(logits, make_sequence(params, output=[1], end=frozenset({4}))) is logits


def test_logprobs_start_with_the_chosen_token_and_keep_their_rank():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    params = SamplingParams(logprobs=2, allowed_token_ids=[0])
    token = Sampler().sample(logits, [make_sequence(params)])[0]
    assert list(token.logprobs) == [0, 1, 2]
    assert [entry.rank for entry in token.logprobs.values()] == [4, 1, 2]
    expected = (logits[0] - logits[0].logsumexp(0)).tolist()
    assert token.logprob == pytest.approx(expected[0], abs=1e-6)
    assert [entry.logprob for entry in token.logprobs.values()] == pytest.approx(
        [expected[0], expected[1], expected[2]], abs=1e-6
    )


def test_a_large_vocabulary_is_not_sorted_for_one_token(monkeypatch):
    sizes = []
    topk = torch.topk
    monkeypatch.setattr(torch, "topk", lambda values, k: sizes.append(k) or topk(values, k))
    logits = 4 * torch.randn(130_000, generator=torch.Generator().manual_seed(0))
    candidates(logits, SamplingParams(top_p=0.5))
    candidates(logits, SamplingParams(top_k=40, top_p=0.95))
    candidates(logits, SamplingParams(min_p=0.05))
    assert max(sizes) <= 2048


def test_counts_of_a_text_that_grows():
    counts, generator = TokenCounts(), random.Random(0)
    tokens = [generator.randrange(300) for _ in range(1000)]
    for length in (0, 3, 4, 500, 500, 1000):
        counts.update(tokens[:length], 3)
        expected = Counter(tokens[3:length])
        assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == expected
