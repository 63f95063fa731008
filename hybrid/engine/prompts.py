"""The forms a prompt may have."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hybrid.errors import RequestError
from hybrid.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]
_KEYS = ("prompt", "prompt_token_ids")


class ParsedPrompt(NamedTuple):
    """``text`` is ``None`` where token ids were given."""

    text: str | None
    token_ids: list[int]


def parse_prompt(prompt: Any, tokenizer: Tokenizer) -> ParsedPrompt:
    """A text, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``; the engine checks the ids.

    Raises:
        RequestError: it is something else, has an unknown key, or is empty.
    """
    if isinstance(prompt, Mapping):
        _check_keys(prompt)
        if "prompt_token_ids" in prompt:
            return ParsedPrompt(None, _token_ids(prompt["prompt_token_ids"]))
        prompt = prompt.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        expected = "a text that is not empty, {'prompt': text} or {'prompt_token_ids': ids}"
        raise RequestError("invalid prompt", field="prompt", expected=expected, found=prompt)
    return ParsedPrompt(prompt, tokenizer.encode(prompt))


def _check_keys(prompt: Mapping[str, Any]) -> None:
    """Refuse what would be ignored: a key that is none, and a text beside token ids."""
    for key in prompt:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            expected = f"{near[0]!r}" if near else " or ".join(map(repr, _KEYS))
            raise RequestError("unknown key of a prompt", field="prompt", expected=expected, found=key)
    if len(prompt) > 1:
        raise RequestError("invalid prompt", field="prompt", expected="one of its keys", found=list(prompt))


def _token_ids(ids: Any) -> list[int]:
    """Prompt token ids as a list; arrays and tensors are taken too."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise RequestError(
            "invalid type", field="prompt_token_ids", expected="a sequence of token ids", found=ids
        )
    return list(values)
