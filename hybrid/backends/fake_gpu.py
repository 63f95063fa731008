"""A test device that works asynchronously: the operations of `fake`, queued on streams of `fake_streams`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from hybrid.backends.base import Backend, PackedShape, RouterConfig
from hybrid.backends.fake import FakeBackend, FloatCache
from hybrid.backends.fake_streams import FakeOptions, FakeRuntime
from hybrid.backends.fake_tensor import META, DeviceTensor, plain
from hybrid.backends.source import TensorSource
from hybrid.backends.streams import hand_over
from hybrid.config import KVFormat
from hybrid.gguf import GGMLType
from hybrid.kvcache.blocks import AttentionBatch

FLOAT, INT = torch.float32, torch.int32


class FakeGpuBackend(Backend):
    """Every operation is one piece of work of the current stream."""

    device = META
    can_unpack = True
    runtime: FakeRuntime

    def __init__(
        self,
        name: str = "fakegpu:0",
        activation: Literal["f32", "q8"] = "f32",
        options: FakeOptions | None = None,
    ) -> None:
        self.name = name
        self.runtime = FakeRuntime(name, options)
        self._operations = FakeBackend(name, activation)

    def can_multiply(self, type_: GGMLType) -> bool:
        return self._operations.can_multiply(type_)

    def describe(self) -> str:
        return self.name

    def load_vector(self, source: TensorSource) -> torch.Tensor:
        return self.receive(self._operations.load_vector(source))

    def load_matrix(self, source: TensorSource) -> Any:
        return self._operations.load_matrix(source)

    def loading_done(self) -> None:
        self.runtime.synchronize()

    def weight_bytes(self, weight: Any) -> int:
        return self._operations.weight_bytes(weight)

    def allocate_stack(self, shape: PackedShape, count: int) -> Any:
        return self._operations.allocate_stack(shape, count)

    def unpack(self, stack: Any, index: int, packed: torch.Tensor) -> None:
        self._act("unpack", stack, index, packed)

    def allocate_latent_cache(self, num_blocks: int, latent_dim: int, rope_dim: int, fmt: KVFormat) -> Any:
        return self._operations.allocate_latent_cache(num_blocks, latent_dim, rope_dim, fmt)

    def copy_cache_blocks(self, cache: FloatCache, pairs: list[tuple[int, int]]) -> None:
        self._act("copy_cache_blocks", cache, pairs)

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, DeviceTensor):
            out = self.runtime.empty(x.shape, x.dtype)
            self.runtime.copy(out, x)
            return out
        if x.queue is self.runtime:
            return x
        assert isinstance(x.queue, FakeRuntime)
        return hand_over(x, x.queue, self.runtime)

    def close(self) -> None:
        self.runtime.close()

    def embed(self, token_ids: torch.Tensor, table: Any) -> torch.Tensor:
        return self._queue("embed", (len(token_ids), table.values.shape[2]), token_ids, table)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._queue("rms_norm", x.shape, x, weight, eps, residual)

    def add(self, x: torch.Tensor, sums: torch.Tensor) -> None:
        self._act("add", x, sums)

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        return self._queue("linear", (len(x), weight.values.shape[1]), x, weight)

    def mla_append(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        kv_norm: torch.Tensor,
        eps: float,
        rope: torch.Tensor,
        cache: Any,
        batch: AttentionBatch,
    ) -> None:
        self._act("mla_append", q, kv, kv_norm, eps, rope, cache, batch)

    def absorb_q(self, q: torch.Tensor, k_b: Any, nope_dim: int, *, transposed: bool) -> torch.Tensor:
        latent = k_b.values.shape[2 if transposed else 1]
        return self._queue("absorb_q", (*q.shape[:2], latent), q, k_b, nope_dim, transposed=transposed)

    def mla_attention(
        self, q: torch.Tensor, q_latent: torch.Tensor, cache: Any, batch: AttentionBatch, scale: float
    ) -> torch.Tensor:
        return self._queue("mla_attention", q_latent.shape, q, q_latent, cache, batch, scale)

    def project_v(self, context: torch.Tensor, v_b: Any) -> torch.Tensor:
        shape = len(context), context.shape[1] * v_b.values.shape[1]
        return self._queue("project_v", shape, context, v_b)

    def route(
        self, x: torch.Tensor, router: Any, bias: torch.Tensor | None, config: RouterConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = len(x), config.num_experts_per_tok
        ids, weights = self.runtime.empty(shape, INT), self.runtime.empty(shape, FLOAT)
        places = [ids.numbers, weights.numbers]
        arguments = plain(x), router, plain(bias), config

        def work() -> None:
            for place, result in zip(places, self._operations.route(*arguments), strict=True):
                place.copy_(result)

        self.runtime.launch("route", work)
        return ids, weights

    def moe(
        self,
        x: torch.Tensor,
        gate: Any,
        up: Any,
        down: Any,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        return self._queue("moe", (len(x), down.values.shape[1]), x, gate, up, down, topk_ids, topk_weights)

    def mlp(self, x: torch.Tensor, gate: Any, up: Any, down: Any) -> torch.Tensor:
        return self._queue("mlp", (len(x), down.values.shape[1]), x, gate, up, down)

    def _queue(self, name: str, shape: Sequence[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Queues an operation whose result, float32, has this shape."""
        out = self.runtime.empty(shape, FLOAT)
        self._act(name, *args, into=out.numbers, **kwargs)
        return out

    def _act(self, name: str, *args: Any, into: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Queues an operation; its result, if it has one, goes to ``into``."""
        operation, args = getattr(self._operations, name), tuple(map(_plain, args))

        def work() -> None:
            result = operation(*args, **kwargs)
            if into is not None:
                into.copy_(result)

        self.runtime.launch(name, work)


def _plain(x: Any) -> Any:
    """An argument as the plain operation takes it."""
    if isinstance(x, AttentionBatch):
        return AttentionBatch(
            *map(plain, (x.positions, x.slot_mapping, x.query_start, x.seq_lens, x.block_tables))
        )
    return plain(x)
