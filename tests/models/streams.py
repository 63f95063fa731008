"""Decode steps over test devices with streams, and what they must be equal to."""

from __future__ import annotations

from typing import Any

import torch

from hybrid.backends.base import Backend
from hybrid.backends.cpu import CpuBackend
from hybrid.backends.fake_gpu import FakeGpuBackend
from hybrid.backends.fake_streams import FakeOptions
from hybrid.backends.registry import create_backend
from hybrid.kvcache.blocks import AttentionBatch
from hybrid.models.loader import Model

NUM_BLOCKS = 8


class RoundingCpu(CpuBackend):
    """Experts get hidden states as bfloat16, as those do that are handed over."""

    def moe(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return super().moe(x.to(torch.bfloat16).float(), *args)


def creator(options: FakeOptions | None = None) -> Any:
    """A `create_backend` whose devices with streams behave as ``options`` say."""

    def create(device: str, num_threads: int | None = None) -> Backend:
        if device.startswith("fakegpu"):
            return FakeGpuBackend(device, options=options)
        return RoundingCpu(num_threads) if device == "cpu" else create_backend(device, num_threads)

    return create


def experts_in_ram(*devices: str, layers: int = 3) -> dict[str, Any]:
    """Rules: routed experts on the CPU, the rest over devices by layers; what is of no layer on the first,
    but for the output, which is on the last."""
    share = -(-layers // len(devices))
    rules: list[Any] = [({"role": "routed_experts"}, "cpu"), ({"role": ["output"]}, devices[-1])]
    rules.append(({"name": "output_norm.weight"}, devices[-1]))
    for number, device in enumerate(devices[1:], 1):
        last = min(layers, (number + 1) * share) - 1
        rules.append(({"layers": f"{number * share}-{last}"}, device))
    rules.append(({"name": "*"}, devices[0]))
    return {
        "version": 1,
        "rules": [{"select": select, "place": {"device": device}} for select, device in rules],
    }


class Decoding:
    """Texts of a model, one block each, that move to other blocks before every step."""

    def __init__(self, model: Model, num_seqs: int, seed: int = 0) -> None:
        self.model, self.num_seqs, self.position = model, num_seqs, 0
        self._generator = torch.Generator().manual_seed(seed)
        model.allocate_cache(NUM_BLOCKS)

    def step(self) -> torch.Tensor:
        """Logits ``[num_seqs, vocab]`` after a random token of each text."""
        here = self.position % 2 * self.num_seqs
        there = self.num_seqs - here
        pairs = [(there + s, here + s) for s in range(self.num_seqs)]
        vocab = self.model.config.vocab_size
        ids = torch.randint(0, vocab, (self.num_seqs,), generator=self._generator, dtype=torch.int32)
        positions = torch.full((self.num_seqs,), self.position, dtype=torch.int32)
        tables = torch.tensor([[here + s] for s in range(self.num_seqs)], dtype=torch.int32)
        batch = AttentionBatch(
            positions=positions,
            slot_mapping=tables[:, 0] * 64 + positions,
            query_start=torch.arange(self.num_seqs + 1, dtype=torch.int32),
            seq_lens=positions + 1,
            block_tables=tables,
        )
        with torch.inference_mode():
            self.model.copy_blocks(pairs)
            logits = self.model.decode(ids, batch)
        self.position += 1
        return logits

    def steps(self, count: int) -> torch.Tensor:
        """Logits ``[count, num_seqs, vocab]``."""
        return torch.stack([self.step() for _ in range(count)])
