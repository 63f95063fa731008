"""A model without weights: logits are a hash of the tokens it finds in its own cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from hybrid.config import EngineConfig
from hybrid.engine.engine import Engine
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.models.layer_steps import LayerSteps, run_layers
from hybrid.moe.reduction import ExpertCount

VOCAB = 50


@dataclass(frozen=True)
class MockConfig:
    vocab_size: int = VOCAB
    max_position_embeddings: int = 4096


class MockModel:
    """Each token's hidden state is a hash of the cached tokens up to it, so a wrong slot, block
    table, position or a token computed twice changes the text."""

    def __init__(self, vocab_size: int = VOCAB) -> None:
        self.config = MockConfig(vocab_size)
        self.num_computed = self.num_copied = 0
        self.trace: list[str] = []  # "layer" of a prompt, "decode"
        self.batches: list[list[int]] = []
        self.closed = False
        self.expert_cpu_seconds: float | None = None
        self.fail_at: int | None = None
        self.poison = False
        self.seconds, self.layer_seconds, self.num_layers = 0.0, 0.0, 3
        self._actions: dict[int, Callable[[], object]] = {}

    def on_forward(self, count: int, action: Callable[[], object]) -> None:
        """Call ``action`` in the ``count``-th forward from now."""
        self._actions[len(self.batches) + count] = action

    def allocate_cache(self, num_blocks: int) -> None:
        self.cache = torch.full((num_blocks * BLOCK_SIZE,), -1, dtype=torch.int64)

    def forward(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        return run_layers(self._forward(token_ids, batch, 0))

    def forward_layers(self, token_ids: torch.Tensor, batch: AttentionBatch) -> LayerSteps:
        return self._forward(token_ids, batch, self.num_layers)

    def _forward(self, token_ids: torch.Tensor, batch: AttentionBatch, num_layers: int) -> LayerSteps:
        time.sleep(self.seconds)
        self._actions.pop(len(self.batches), lambda: None)()
        if self.fail_at is not None and len(self.batches) >= self.fail_at:
            raise KeyboardInterrupt
        self.cache[batch.slot_mapping.long()] = token_ids.long()
        for _ in range(num_layers):
            yield "layer"
            time.sleep(self.layer_seconds)
            self.trace.append("layer")
        starts = batch.query_start.tolist()
        self.batches.append([b - a for a, b in pairwise(starts)])
        self.num_computed += len(token_ids)
        rows = []
        for s, (start, stop) in enumerate(pairwise(starts)):
            assert int(batch.seq_lens[s]) == int(batch.positions[stop - 1]) + 1
            positions = batch.positions[start:stop].tolist()
            rows += [hash(self.history(batch, s, position)) % 2**20 for position in positions]
        return torch.tensor(rows, dtype=torch.float32)[:, None]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        blocks = self.cache.view(-1, BLOCK_SIZE)
        for source, target in pairs:
            blocks[target] = blocks[source]
        self.num_copied += len(pairs)

    def history(self, batch: AttentionBatch, s: int, position: int) -> tuple[int, ...]:
        places = range(position + 1)
        slots = [int(batch.block_tables[s, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in places]
        return tuple(self.cache[slots].tolist())

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.logits_of(int(h)) for h in hidden_states[:, 0]])

    def logits_of(self, state: int) -> torch.Tensor:
        logits = 3 * torch.randn(self.config.vocab_size, generator=torch.Generator().manual_seed(state))
        return logits * float("nan") if self.poison else logits

    def reference_logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits after ``tokens``, without engine or cache."""
        return self.logits_of(hash(tuple(tokens)) % 2**20)

    def decode(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        self.trace.append("decode")
        return self.compute_logits(self.forward(token_ids, batch))

    copy_stats = None

    @property
    def expert_count(self) -> ExpertCount:
        return ExpertCount()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def make_engine():
    def make(*, end_token_ids=frozenset(), vocab_size=VOCAB, max_model_len=200, **options) -> Engine:
        config = EngineConfig(max_model_len=max_model_len, **options)
        return Engine(MockModel(vocab_size), config, end_token_ids=frozenset(end_token_ids))

    return make


@pytest.fixture
def run_engine():
    """Add requests, step until all are done: request id -> list of its token outputs."""

    def run(engine: Engine, requests: dict, max_steps: int = 1000) -> dict:
        for request_id, (prompt, params) in requests.items():
            engine.add_request(request_id, prompt, params)
        outputs: dict = {request_id: [] for request_id in requests}
        for _ in range(max_steps):
            if not engine.has_unfinished_requests():
                return outputs
            for output in engine.step():
                outputs[output.request_id].append(output)
        raise RuntimeError("the engine did not finish")

    return run
