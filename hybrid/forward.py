"""A model and one sequence, without scheduling or sampling: for measuring and for scoring texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from hybrid.engine.torch_threads import single_torch_thread
from hybrid.errors import CapacityError
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.kvcache.pool import blocks_for

if TYPE_CHECKING:
    from hybrid.engine.model_runner import CausalLM

_LOGITS_ROWS = 64  # rows of logits at once: 33 MB of a vocabulary of 130,000


class SingleSequence:
    """Feeds token ids to a model one after another.

    Args:
        model: its cache, already allocated, holds ``max_tokens``.
        max_tokens: the longest sequence.
        chunk: tokens the model is given at once.

    Attributes:
        length: tokens in the cache.
    """

    def __init__(self, model: CausalLM, max_tokens: int, chunk: int = 512) -> None:
        self.model, self.max_tokens, self.chunk = model, max_tokens, chunk
        self.length = 0
        num_blocks = blocks_for(max_tokens)
        self._slots = torch.arange(num_blocks * BLOCK_SIZE, dtype=torch.int32)
        self._block_table = torch.arange(num_blocks, dtype=torch.int32)[None]

    @property
    def vocab_size(self) -> int:
        size: int = self.model.config.vocab_size
        return size

    def rewind(self, length: int = 0) -> None:
        """Forgets all but the first ``length`` tokens."""
        self.length = min(self.length, length)

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> Iterator[torch.Tensor]:
        """Appends tokens; yields float32 hidden states ``[n, hidden]`` of successive pieces of them.

        Raises:
            CapacityError: they do not fit the sequence.
        """
        ids = self._checked(token_ids)
        for start in range(0, len(ids), self.chunk):
            piece = ids[start : start + self.chunk]
            with single_torch_thread():
                hidden_states = self.model.forward(piece, self._batch(len(piece)))
            self.length += len(piece)
            yield hidden_states

    def _checked(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> torch.Tensor:
        if self.length + len(token_ids) > self.max_tokens:
            raise CapacityError(
                f"{self.length + len(token_ids)} tokens do not fit a sequence of {self.max_tokens}"
            )
        return torch.as_tensor(np.asarray(token_ids, dtype=np.int32))

    def _batch(self, num_tokens: int) -> AttentionBatch:
        # One sequence in consecutive blocks: a token's slot is its position.
        slots = self._slots[self.length : self.length + num_tokens]
        end = self.length + num_tokens
        return AttentionBatch(
            positions=slots,
            slot_mapping=slots,
            query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=self._block_table[:, : blocks_for(end)],
        )

    @torch.inference_mode()
    def next_logits(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> torch.Tensor:
        """Appends tokens, at least one; float32 logits ``[1, vocab_size]`` of what follows the last of them.

        Raises:
            CapacityError: they do not fit the sequence.
            ValueError: there is none.
        """
        if not len(token_ids):
            raise ValueError("next_logits: expected at least one token id, found none")
        if len(token_ids) == 1:
            with single_torch_thread():
                logits = self.model.decode(self._checked(token_ids), self._batch(1))
            self.length += 1
            return logits
        for hidden_states in self.extend(token_ids):
            last = hidden_states[-1:]
        return self.model.compute_logits(last)

    @torch.inference_mode()
    def logits(self, token_ids: npt.NDArray[np.int32], first: int) -> Iterator[npt.NDArray[np.float32]]:
        """Logits of positions ``first`` to ``len - 2`` of these tokens alone, in pieces ``[n, vocab]``."""
        self.rewind()
        start = 0
        for hidden_states in self.extend(token_ids[:-1]):
            wanted = hidden_states[max(0, first - start) :]
            start += len(hidden_states)
            for row in range(0, len(wanted), _LOGITS_ROWS):
                yield self.model.compute_logits(wanted[row : row + _LOGITS_ROWS]).numpy()
