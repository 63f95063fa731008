"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

from hybrid.outputs import CompletionOutput, Logprob, TokenLogprobs
from hybrid.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no infinity


def chat_logprobs(completion: CompletionOutput, tokenizer: Tokenizer, top: int) -> list[dict[str, Any]]:
    """``logprobs.content`` of a chat completion: an entry for each token but the end token."""
    entries = []
    for token_id, row in _rows(completion, tokenizer):
        best = [_token(tokenizer, each, item.logprob) for each, item in _best(row, top)]
        entries.append({**_token(tokenizer, token_id, row[token_id].logprob), "top_logprobs": best})
    return entries


class TextLogprobs:
    """``logprobs`` of a text completion; offsets count characters from the start of the choice's text."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer, self._top, self._offset = tokenizer, top, 0

    def of(self, completion: CompletionOutput) -> dict[str, Any]:
        """The entries of a completion, or of what a stream adds to it."""
        found = self._empty()
        for token_id, row in _rows(completion, self._tokenizer):
            self._append(found, token_id, row)
        return found

    def of_prompt(
        self, token_ids: Sequence[int], rows: Sequence[TokenLogprobs | None] | None
    ) -> dict[str, Any]:
        """The entries of a prompt that is repeated in front of the text; the first token has none."""
        found = self._empty()
        for token_id, row in zip(token_ids, rows or [None] * len(token_ids), strict=True):
            self._append(found, token_id, row)
        return found

    def _empty(self) -> dict[str, Any]:
        return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}

    def _append(self, found: dict[str, Any], token_id: int, row: TokenLogprobs | None) -> None:
        text = _text(self._tokenizer, token_id)
        found["text_offset"].append(self._offset)
        found["tokens"].append(text)
        found["token_logprobs"].append(None if row is None else _finite(row[token_id].logprob))
        best = () if row is None else _best(row, self._top)
        top = {_text(self._tokenizer, each): _finite(item.logprob) for each, item in best}
        found["top_logprobs"].append(None if row is None else top)
        self._offset += len(text)


def _rows(completion: CompletionOutput, tokenizer: Tokenizer) -> Iterator[tuple[int, TokenLogprobs]]:
    for token_id, row in zip(completion.token_ids, completion.logprobs or (), strict=True):
        if completion.finish_reason is None or not tokenizer.is_control(token_id):
            yield token_id, row


def _best(row: TokenLogprobs, top: int) -> list[tuple[int, Logprob]]:
    return heapq.nsmallest(top, row.items(), key=lambda item: item[1].rank)


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token_id)
    return {
        "token": _text(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": list(spelled),
    }


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # NaN too
