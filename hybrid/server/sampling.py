"""From the fields of a request to `SamplingParams`."""

from __future__ import annotations

from typing import Any

from hybrid.sampling_params import SamplingParams
from hybrid.server.errors import refuse
from hybrid.server.protocol import MAX_CHOICES, GenerationBody, ResponseFormat
from hybrid.structured import StructuredOutputs

_WAYS = ("json", "regex", "choice", "grammar", "json_object")


def num_choices(body: GenerationBody) -> int:
    """``n``, within bounds."""
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_CHOICES:
        refuse(f"n: expected 1 to {MAX_CHOICES}, found {n}", "n")
    return n


def sampling_params(
    body: GenerationBody,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    response_format: ResponseFormat | None = None,
    tool_grammar: str | None = None,
    after: str | None = None,
    keep_special_tokens: bool = False,
) -> SamplingParams:
    """What a request asks for. Checks a schema of any size: not for the event loop.

    Args:
        tool_grammar: of tool calls that are forced.
        after: a form that is asked for holds for what follows this marker.
        keep_special_tokens: whatever the request says, special tokens are part of the text.

    Raises:
        ApiError, RequestError: a value is invalid or not supported.
    """
    given = {
        name: getattr(body, name)
        for name in (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "n",
        )
        if getattr(body, name) is not None
    }  # fmt: skip
    return SamplingParams(
        **given,
        seed=body.seed,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_logit_bias(body.logit_bias),
        allowed_token_ids=body.allowed_token_ids,
        include_stop_str_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens and not keep_special_tokens,
        structured_outputs=_structured(body.structured_outputs, response_format, tool_grammar, after),
    )


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    bias = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 12):
            refuse(f"logit_bias: expected token ids as names, found {name[:40]!r}", "logit_bias")
        bias[int(name)] = value
    return bias


def _structured(
    given: dict[str, Any] | None,
    response_format: ResponseFormat | None,
    tool_grammar: str | None,
    after: str | None,
) -> StructuredOutputs | None:
    """The constraint on the text, or ``None``; never one that is quietly left out."""
    constraint, field = _from_format(response_format), "response_format"
    if given is not None:
        if constraint is not None:
            refuse("give response_format or structured_outputs, not both", "structured_outputs")
        constraint, field = given, "structured_outputs"
        if len(given) != 1 or next(iter(given)) not in _WAYS:
            refuse(f"{field}: expected one of {', '.join(_WAYS)}, found {list(given)[:8]}", field)
        if given.get("json_object") is False:
            constraint = None
    if tool_grammar is not None:
        if constraint is not None:
            refuse(f"give {field}, or tool calls that are forced or single, not both", field)
        constraint = {"grammar": tool_grammar}
    if constraint is None:
        return None
    if after is not None:
        constraint = {**constraint, "after": after}
    return StructuredOutputs(**constraint)


def _from_format(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return {"json_object": True}
    schema = (response_format.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        refuse("response_format.json_schema.schema: expected a JSON schema", "response_format")
    return {"json": schema}
