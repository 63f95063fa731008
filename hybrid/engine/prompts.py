"""The forms a prompt may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hybrid.errors import RequestError
from hybrid.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]


class ParsedPrompt(NamedTuple):
    """``text`` is ``None`` where token ids were given."""

    text: str | None
    token_ids: list[int]


def parse_prompt(prompt: Any, tokenizer: Tokenizer) -> ParsedPrompt:
    """A text, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``; the engine checks the ids.

    Raises:
        RequestError: it is something else, or empty.
    """
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return ParsedPrompt(None, _token_ids(prompt["prompt_token_ids"]))
        prompt = prompt.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        expected = "a text that is not empty, {'prompt': text} or {'prompt_token_ids': ids}"
        raise RequestError("invalid prompt", field="prompt", expected=expected, found=prompt)
    return ParsedPrompt(prompt, tokenizer.encode(prompt))


def _token_ids(ids: Any) -> list[int]:
    """Prompt token ids as a list; arrays and tensors are taken too."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise RequestError(
            "invalid type", field="prompt_token_ids", expected="a sequence of token ids", found=ids
        )
    return list(values)
