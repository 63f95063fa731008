"""What changes a text's logits, as tensors that are kept from token to token."""

from __future__ import annotations

import torch

from hybrid.engine.sequence import Sequence


class TokenCounts:
    """Distinct tokens of a text that grows, and how often each is in it."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids = torch.empty(64, dtype=torch.int64)
        self._counts = torch.zeros(64)
        self._num_counted = 0

    def update(self, token_ids: list[int], start: int = 0) -> None:
        """Count what is new since the last call in ``token_ids[start:]``."""
        for token_id in token_ids[start + self._num_counted :]:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._ids):
                self._ids = torch.cat([self._ids, torch.empty_like(self._ids)])
                self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
            self._ids[place] = token_id
            self._counts[place] += 1
        self._num_counted = max(self._num_counted, len(token_ids) - start)

    @property
    def ids(self) -> torch.Tensor:
        """int64 ``[n]``."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> torch.Tensor:
        """float32 ``[n]``, in the order of `ids`."""
        return self._counts[: len(self._places)]


class Adjustments:
    """The tensors of one sequence.

    Attributes:
        allowed: ids that may be chosen; ``None``: all.
        ends: ids that end the text.
        bias: ids and what is added to their logits; ``None``: nothing.
        seen, written: tokens of prompt and text, and of the text alone; counted where a penalty asks for it.
    """

    def __init__(self, sequence: Sequence) -> None:
        params = sequence.params
        allowed, bias = params.allowed_token_ids, params.logit_bias
        self.allowed = None if allowed is None else torch.tensor(allowed)
        self.ends = torch.tensor(sorted(sequence.stopping_token_ids), dtype=torch.int64)
        self.bias = None
        if bias:
            values = torch.tensor(list(bias.values()), dtype=torch.float32)
            self.bias = (torch.tensor(list(bias)), values)
        self.seen, self.written = TokenCounts(), TokenCounts()


def adjustments_of(sequence: Sequence) -> Adjustments:
    """Those of ``sequence``, made when they are first asked for."""
    if sequence.adjustments is None:
        sequence.adjustments = Adjustments(sequence)
    found: Adjustments = sequence.adjustments
    return found
