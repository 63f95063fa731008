"""Log-probabilities of chosen tokens and of prompts, from the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hybrid.config import MAX_WHOLE_LOGPROBS_BYTES
from hybrid.errors import RequestError
from hybrid.outputs import Logprob, PromptLogprobs, TokenLogprobs, VocabularyLogprobs
from hybrid.sampling_params import WHOLE_VOCABULARY


def token_logprobs(logprobs: torch.Tensor, token_id: int, count: int) -> TokenLogprobs:
    """``token_id`` and the ``count`` best tokens of one position, from float32 log-probabilities ``[vocab]``.

    The mapping starts with ``token_id``. -1 for ``count`` gives every token.
    """
    if count == WHOLE_VOCABULARY:
        return VocabularyLogprobs(logprobs.numpy())
    value = logprobs[token_id]
    result = {token_id: Logprob(float(value), 1 + int((logprobs > value).sum()))}
    best = torch.topk(logprobs, count)
    for rank, (best_value, best_id) in enumerate(
        zip(best.values.tolist(), best.indices.tolist(), strict=True), 1
    ):
        result.setdefault(best_id, Logprob(best_value, rank))
    return result


def check_whole_vocabulary_size(field: str, num_rows: int, vocab_size: int) -> None:
    """Raise `RequestError` if ``num_rows`` of float32 ``[vocab_size]`` are more than the engine keeps."""
    num_bytes = num_rows * vocab_size * 4
    if num_bytes > MAX_WHOLE_LOGPROBS_BYTES:
        raise RequestError(
            f"log-probabilities of the whole vocabulary for {num_rows} tokens need too much memory; ask for "
            "a number of best tokens, or for fewer positions",
            field=field,
            expected=f"at most {MAX_WHOLE_LOGPROBS_BYTES} bytes",
            found=num_bytes,
        )


class PromptLogprobsBuilder:
    """Collects a prompt's log-probabilities while its chunks are computed, in order."""

    def __init__(self, prompt_token_ids: Sequence[int], count: int, vocab_size: int) -> None:
        self.prompt_token_ids, self.count = prompt_token_ids, count
        self._entries: list[TokenLogprobs | None] = [None]
        self._array: np.ndarray | None = None
        if count == WHOLE_VOCABULARY:
            check_whole_vocabulary_size("prompt_logprobs", len(prompt_token_ids) - 1, vocab_size)
            self._array = np.empty((len(prompt_token_ids) - 1, vocab_size), dtype=np.float32)

    def num_wanted(self, start: int, stop: int) -> int:
        """How many of the prompt positions ``start:stop`` predict a prompt token: all but the last one."""
        return max(0, min(stop, len(self.prompt_token_ids) - 1) - start)

    def add(self, start: int, logits: torch.Tensor) -> None:
        """Book the logits ``[n, vocab]`` of the prompt's positions from ``start`` on.

        Positions come in order; going back to an earlier one takes back what came after it.
        """
        logprobs = torch.log_softmax(logits, dim=-1)
        if self._array is not None:
            self._array[start : start + len(logits)] = logprobs.numpy()
            return
        targets = self.prompt_token_ids[start + 1 : start + 1 + len(logits)]
        self._entries[start + 1 :] = [
            token_logprobs(row, token_id, self.count) for row, token_id in zip(logprobs, targets, strict=True)
        ]

    def finish(self) -> PromptLogprobs | list[TokenLogprobs | None]:
        """All entries; entry 0 is ``None``."""
        return self._entries if self._array is None else PromptLogprobs(self._array)
