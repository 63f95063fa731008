"""Every sampling parameter is checked when it is given."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid.errors import HybridError, RequestError
from hybrid.sampling_params import SamplingParams

NUMBERS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
INTEGERS = ["n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"]
BAD = {
    "n": [0, 65, 1.0, True, "1"],
    "temperature": [-0.1, math.nan, math.inf, 10**400, "1", None, True],
    "top_p": [0, -0.5, 1.1, math.nan, "x", None],
    "top_k": [-2, 1.5, math.nan, None, True],
    "min_p": [-0.1, 1.1, math.nan, None],
    "seed": [-1, 2**63, 1.0, "0", True],
    "stop": ["", [""], ["a", 1], 5, b"x", ["a"] * 65],
    "stop_token_ids": [[-1], ["a"], 3, "12", [1.0], [True]],
    "ignore_eos": [1, "yes", None],
    "max_tokens": [0, -1, 1.5, True, "9"],
    "min_tokens": [-1, 1.5, None],
    "logprobs": [-2, 1001, 1.0, True],
    "prompt_logprobs": [-2, 1001, "5"],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.nan],
    "repetition_penalty": [0, -1, math.nan, math.inf],
    "logit_bias": [[1], {-1: 1.0}, {"1": 1.0}, {1: 101}, {1: math.nan}, {1: None}],
    "allowed_token_ids": [[], [-1], "12", 7, [1.5]],
    "include_stop_str_in_output": [0, None],
    "skip_special_tokens": [0, None],
    "structured_outputs": [{"json": {}}, 0],
}


def test_every_field_has_bad_values_here():
    assert set(BAD) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{field: value})
    assert refused.value.field == field
    assert refused.value.found == value or value != value or isinstance(value, list | dict)
    assert refused.value.expected in str(refused.value)


@pytest.mark.parametrize(
    "good",
    [
        {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 1},
        {"stop": "a"},
        {"stop": None, "stop_token_ids": None},
        {"logprobs": -1, "prompt_logprobs": 0},
        {"seed": 2**63 - 1},
        {"max_tokens": 3, "min_tokens": 3},
        {"logit_bias": {5: -100}},
    ],
)
def test_good_values_are_taken(good):
    SamplingParams(**good)


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=3)


def test_sequences_become_tuples_and_nothing_can_change():
    stop = ["a"]
    params = SamplingParams(stop=stop, stop_token_ids=[1])
    stop.append("b")
    assert params.stop_strings == ("a",)
    assert params.stop_token_ids == (1,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers() | st.text(max_size=2), max_size=3),
    st.dictionaries(st.integers() | st.text(max_size=2), st.floats() | st.none(), max_size=3),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(BAD)), ANYTHING, max_size=4))
def test_anything_gives_good_parameters_or_a_clear_error(values):
    try:
        params = SamplingParams(**values)
    except HybridError as error:
        assert error.field in values
        return
    assert all(math.isfinite(getattr(params, name)) for name in NUMBERS)
    assert 0 < params.top_p <= 1
    assert all(type(getattr(params, name)) in (int, type(None)) for name in INTEGERS)
    assert all(isinstance(text, str) and text for text in params.stop_strings)
