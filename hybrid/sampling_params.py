"""How to choose tokens and when to stop, by vLLM's names. Every value is checked when it is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hybrid.errors import RequestError
from hybrid.structured import StructuredOutputs

WHOLE_VOCABULARY = -1  # logprobs and prompt_logprobs: every token
MAX_LOGPROBS = 1000  # above this a dictionary entry for each token costs more than the whole row
MAX_STOP_STRINGS = 64
MAX_COMPLETIONS = 64
MAX_SEED = 2**63 - 1
MAX_FLOAT = sys.float_info.max
GREEDY_TEMPERATURE = 1e-5  # vLLM's: below it the temperature counts as 0


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Order: allowed ids, ``min_tokens``, ``logit_bias``, penalties, temperature, ``min_p``, ``top_k``,
    ``top_p``. Log-probabilities are those of the model, before any of these.

    Attributes:
        n: completions of one prompt, which is computed once. Each has random numbers of its own.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the likeliest tokens that together hold this probability; (0, 1].
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens below this share of the likeliest one's probability; [0, 1].
        seed: makes the request reproducible on its own. ``None``: follows from the engine's seed.
        stop: strings the text ends before.
        stop_token_ids: further tokens that end the text.
        ignore_eos: go on after the model's end tokens.
        max_tokens: ``None``: until an end token or the end of the context.
        min_tokens: no end token and no stop string before this many tokens.
        logprobs: this many best tokens, and the chosen one, at each step; -1: the whole vocabulary.
        prompt_logprobs: the same for the prompt's tokens. Needs a prompt of two tokens to say anything.
        presence_penalty: subtracted from the logit of each token written before; [-2, 2].
        frequency_penalty: subtracted for each time it was written; [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or text; > 0.
        logit_bias: token id -> what to add to its logit; [-100, 100].
        allowed_token_ids: nothing else is written.
        include_stop_str_in_output: keep the stop string.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: the form the text must have.

    Raises:
        RequestError: a value is of the wrong type or out of range, or is not supported.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._check_what()
        self._check_numbers()
        self._check_lengths()
        self._check_stops()
        self._check_token_choices()

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `RequestError` if a token id of these parameters is not below ``vocab_size``."""
        for field in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(self, field) or ():
                if token_id >= vocab_size:
                    _refuse(field, f"token ids below {vocab_size}", token_id)
        for field in ("logprobs", "prompt_logprobs"):
            count = getattr(self, field)
            if count is not None and count > vocab_size:
                _refuse(field, f"at most the {vocab_size} tokens of the vocabulary", count)

    def _check_what(self) -> None:
        _integer("n", self.n, 1, MAX_COMPLETIONS)
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            _refuse("structured_outputs", "StructuredOutputs", self.structured_outputs)

    def _check_numbers(self) -> None:
        _number("temperature", self.temperature, lambda x: x >= 0, "a number >= 0")
        _number("top_p", self.top_p, lambda x: 0 < x <= 1, "a number in (0, 1]")
        _number("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        _integer("top_k", self.top_k, -1)
        _number("presence_penalty", self.presence_penalty, lambda x: -2 <= x <= 2, "a number in [-2, 2]")
        _number("frequency_penalty", self.frequency_penalty, lambda x: -2 <= x <= 2, "a number in [-2, 2]")
        _number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "a number > 0")
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"at most max_tokens = {self.max_tokens}", self.min_tokens)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                _integer(field, getattr(self, field), WHOLE_VOCABULARY, MAX_LOGPROBS)
        for field in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, field), bool):
                _refuse(field, "True or False", getattr(self, field))

    def _check_stops(self) -> None:
        stop: Any = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if isinstance(stop, bytes) or not isinstance(stop, Sequence) or len(stop) > MAX_STOP_STRINGS:
            _refuse("stop", f"a string, or a sequence of up to {MAX_STOP_STRINGS}", self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                _refuse("stop", "strings that are not empty", text)
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids or ()))

    def _check_token_choices(self) -> None:
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                _refuse("allowed_token_ids", "at least one token id", self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                _refuse("logit_bias", "a mapping of token ids to numbers", self.logit_bias)
            _token_ids("logit_bias", tuple(self.logit_bias))
            for value in self.logit_bias.values():
                _number("logit_bias", value, lambda x: -100 <= x <= 100, "numbers in [-100, 100]")
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))


def _refuse(field: str, expected: str, found: object) -> NoReturn:
    raise RequestError("invalid sampling parameter", field=field, expected=expected, found=found)


def _number(field: str, value: Any, accepts: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(field, expected, value)
    if not (abs(value) <= MAX_FLOAT and accepts(value)):  # NaN fails too
        _refuse(field, expected, value)


def _integer(field: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    expected = f"an integer >= {minimum}" if maximum is None else f"an integer in {minimum}..{maximum}"
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(field, expected, value)
    if value < minimum or (maximum is not None and value > maximum):
        _refuse(field, expected, value)
    return value


def _token_ids(field: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        _refuse(field, "a sequence of token ids", values)
    return tuple(_integer(field, value, 0) for value in values)
