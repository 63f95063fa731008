"""The backend contract: the operations a model is made of, and the weights they take.

A backend runs operations on one device and owns the representation of weights there. Model
code calls it through the layer objects and never learns which backend it got.

Conventions for every operation:

- ``T`` is the number of tokens of the step. Activations are float32, contiguous, ``[T, ...]``, on
  ``backend.device``; results are new tensors unless the operation says "in place".
- Results for a token do not depend on the other tokens of the call, on their number or on the
  number of threads: the same token gives the same bits alone and in any batch.
- Arguments are trusted: layers check shapes once, when they are built.
- With a `runtime`, operations are queued on its current stream, host memory is not touched, and nothing of
  them waits: all of a step can be captured. Tensors of `AttentionBatch` are on ``backend.device`` too
  (`receive_batch`), and only their shapes are known to the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from hybrid.backends.source import TensorSource
from hybrid.backends.streams import Runtime
from hybrid.config import KVFormat
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.kvcache.blocks import AttentionBatch
from hybrid.placement.capabilities import matrix_bytes


@dataclass(frozen=True)
class RouterConfig:
    """How router logits become experts and weights. Names follow the DeepSeek configuration.

    Groups are scored by their maximum (softmax) or by the sum of their two best (sigmoid).
    """

    num_experts: int
    num_experts_per_tok: int
    scoring: Literal["softmax", "sigmoid"]
    num_groups: int = 1
    topk_groups: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    expert_threshold: float = 0.0  # `hybrid.moe.reduction` drops experts below it, after `route`


@dataclass(frozen=True)
class PackedShape:
    """A matrix in one piece of the CPU's packed layout (kernels/cpu/block_formats.h)."""

    type: GGMLType
    rows: int
    cols: int

    @property
    def n_bytes(self) -> int:
        return matrix_bytes(self.type, "cpu", (1, self.rows, self.cols))


class Recording(Protocol):
    """Operations kept by `Backend.record`."""

    def run(self) -> None:
        """Repeats them on the tensors they were recorded with, whatever those hold now."""


class Backend(ABC):
    """One device. Weight handles are opaque: what one backend loads, only it can use."""

    name: str
    device: torch.device
    can_record = False  # whether `record` works
    can_unpack = False  # whether `allocate_stack` and `unpack` work
    decoding = False  # whether operations are for decoded tokens, or for prompts; arithmetic may differ
    serves_handoff = (
        False  # whether streams of others may have its experts computed, see `hybrid.moe.handoff`
    )
    runtime: Runtime | None = None  # streams, where operations are queued; see `hybrid.backends.streams`

    @abstractmethod
    def can_multiply(self, type_: GGMLType) -> bool:
        """Whether `load_matrix` takes weights of this format."""

    @abstractmethod
    def describe(self) -> str:
        """The device and what decides about its kernels, for messages: "cpu (avx2)"."""

    def prepare(self, file: GGUFFile, sources: Sequence[TensorSource]) -> None:  # noqa: B027
        """Called once before the first weight: the matrices `load_matrix` will be asked for, in order, so
        that a backend may read ahead."""

    @abstractmethod
    def load_vector(self, source: TensorSource) -> torch.Tensor:
        """A norm weight or bias as float32 ``[cols]``."""

    @abstractmethod
    def load_matrix(self, source: TensorSource) -> Any:
        """A weight for `linear`, `embed`, `absorb_q`, `project_v`, or one of the three of `moe`."""

    @abstractmethod
    def loading_done(self) -> None:
        """Called once after the last weight: staging memory can go."""

    @abstractmethod
    def weight_bytes(self, weight: Any) -> int:
        """Bytes the weight occupies on the device, padding included."""

    def packed_shape(self, weight: Any) -> PackedShape:
        """Of one matrix of a stack; for `read_packed`."""
        raise NotImplementedError(f"{self.describe()} packs no weights")

    def read_packed(self, weight: Any, index: int, out: torch.Tensor) -> None:
        """Copies a matrix of a stack to ``out``, uint8 ``[n_bytes]`` on the host. Any thread may call it."""
        raise NotImplementedError(f"{self.describe()} packs no weights")

    def allocate_stack(self, shape: PackedShape, count: int) -> Any:
        """``count`` matrices for `moe`, not initialised, to be filled by `unpack`."""
        raise NotImplementedError(f"{self.describe()} unpacks no weights")

    def unpack(self, stack: Any, index: int, packed: torch.Tensor) -> None:
        """Fills a matrix of `allocate_stack` from uint8 ``[n_bytes]`` on this device."""
        raise NotImplementedError(f"{self.describe()} unpacks no weights")

    @abstractmethod
    def allocate_latent_cache(self, num_blocks: int, latent_dim: int, rope_dim: int, fmt: KVFormat) -> Any:
        """The latent cache of one layer: ``num_blocks * BLOCK_SIZE`` rows of ``latent_dim + rope_dim``."""

    def allocate_kv_cache(self, num_blocks: int, num_kv_heads: int, head_dim: int, fmt: KVFormat) -> Any:
        """Keys and values of one layer with grouped heads: ``num_blocks * BLOCK_SIZE`` rows of
        ``num_kv_heads * head_dim`` each. With q8_0, ``head_dim`` is a multiple of 32."""
        raise NotImplementedError(f"{self.describe()} has no attention with grouped heads")

    def copy_cache_blocks(self, cache: Any, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks of a layer's cache, each from the first to the second of a pair."""
        raise NotImplementedError(f"{self.describe()} copies no cache blocks")

    @abstractmethod
    def receive(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, copied to this device unless it is there already."""

    def receive_batch(self, batch: AttentionBatch) -> AttentionBatch:
        """``batch`` with its tensors on this device, copied there once."""
        return batch if self.runtime is None else batch.on(self.name, self.receive)

    def record(self) -> AbstractContextManager[Recording]:
        """Within it operations run as always and are kept with their tensors; only operations of this backend
        may touch what they work on."""
        raise NotImplementedError(f"{self.describe()} records nothing")

    @abstractmethod
    def close(self) -> None:
        """Gives everything back; the backend and its weights must not be used afterwards."""

    @abstractmethod
    def embed(self, token_ids: torch.Tensor, table: Any) -> torch.Tensor:
        """Rows of the embedding table: int32 ``[T]`` -> ``[T, hidden]``."""

    @abstractmethod
    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``y = x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

        With ``residual``: ``residual += x`` in place first, and the sum is what is normalised.
        """

    @abstractmethod
    def add(self, x: torch.Tensor, sums: torch.Tensor) -> None:
        """``sums += x`` in place, both ``[T, hidden]``."""

    @abstractmethod
    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        """``[T, cols] -> [T, rows]``, ``y = x Wᵀ``."""

    @abstractmethod
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
        """Rotate, normalise, store.

        In place: the last ``rope_dim`` of each head of ``q`` ``[T, heads, nope + rope_dim]`` are rotated.
        ``kv`` ``[T, kv_lora_rank + rope_dim]``: the latent part is RMS-normalised with ``kv_norm``, the
        rest rotated, and the row is stored at ``batch.slot_mapping``. Rotation pairs are
        interleaved (2i, 2i+1); ``rope`` is ``[max_positions, rope_dim / 2, 2]`` of (cos, sin), YaRN's
        magnitude factor included.
        """

    @abstractmethod
    def absorb_q(self, q: torch.Tensor, k_b: Any, nope_dim: int, *, transposed: bool) -> torch.Tensor:
        """``q`` ``[T, heads, nope + rope_dim]`` -> ``[T, heads, kv_lora_rank]``: its first ``nope_dim``
        columns times the key half of ``kv_b``.

        ``transposed``: ``k_b`` is ``[heads, nope, kv_lora_rank]`` (rows of ``attn_kv_b``, a transposed
        product); otherwise ``[heads, kv_lora_rank, nope]`` (``attn_k_b``).
        """

    @abstractmethod
    def mla_attention(
        self, q: torch.Tensor, q_latent: torch.Tensor, cache: Any, batch: AttentionBatch, scale: float
    ) -> torch.Tensor:
        """Causal attention over the latent cache -> ``[T, heads, kv_lora_rank]``.

        Scores are ``(q_latent · latent + q_pe · k_pe) * scale`` with ``q_pe`` the last ``rope_dim`` of ``q``;
        values are the latents themselves. Keys are taken in fixed splits of 512.
        """

    def gqa_append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: torch.Tensor,
        cache: Any,
        batch: AttentionBatch,
        *,
        halves: bool,
    ) -> None:
        """Rotate and store. In place: the first ``rope_dim`` of each head of ``q`` ``[T, heads, head_dim]``.

        ``k``, ``v`` ``[T, kv_heads, head_dim]``: ``k`` rotated likewise and ``v`` are stored at
        ``batch.slot_mapping``. Rotation pairs are (i, i + rope_dim / 2) with ``halves``, else (2i, 2i+1);
        ``rope`` as in `mla_append`.
        """
        raise NotImplementedError(f"{self.describe()} has no attention with grouped heads")

    def gqa_attention(self, q: torch.Tensor, cache: Any, batch: AttentionBatch, scale: float) -> torch.Tensor:
        """Causal attention of ``[T, heads, head_dim]`` over keys and values -> the same shape.

        Query head ``h`` sees key head ``h // (heads / kv_heads)``. Keys are taken in fixed splits of 512.
        """
        raise NotImplementedError(f"{self.describe()} has no attention with grouped heads")

    @abstractmethod
    def project_v(self, context: torch.Tensor, v_b: Any) -> torch.Tensor:
        """``[T, heads, kv_lora_rank] -> [T, heads * v_dim]``; ``v_b`` is ``[heads, v_dim, kv_lora_rank]``."""

    @abstractmethod
    def route(
        self, x: torch.Tensor, router: Any, bias: torch.Tensor | None, config: RouterConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of each token: int32 ids and float32 weights, both ``[T, num_experts_per_tok]``.

        The bias takes part in the choice, not in the weights. Ids are sorted by descending score,
        ties by ascending id.
        """

    def count_experts(self, topk_ids: torch.Tensor, counts: torch.Tensor) -> None:
        """``counts[id] += 1`` in place for int32 ids ``[T, k]``, -1 counting nowhere; ``counts`` is int64
        ``[num_experts]``."""
        ids = topk_ids.flatten().long()
        counts.scatter_add_(0, ids.clamp(min=0), (ids >= 0).long())

    @abstractmethod
    def moe(
        self,
        x: torch.Tensor,
        gate: Any,
        up: Any,
        down: Any,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Routed experts -> ``[T, hidden]``: ``Σ w · down(silu(gate x) * up x)``, summed in top-k order.

        Weights are ``[experts, ...]`` stacks, ids places in them; an id of -1 means "not here" and
        contributes nothing.
        """

    @abstractmethod
    def mlp(self, x: torch.Tensor, gate: Any, up: Any, down: Any) -> torch.Tensor:
        """A dense SwiGLU block or the shared expert -> ``[T, hidden]``."""
