"""Bytes on each device: weights as they are stored there, cache, working memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from hybrid.config import BLOCK_SIZE
from hybrid.gguf import TRAITS, GGMLType, GGUFFile, TensorInfo
from hybrid.placement import gpu_scratch, scratch
from hybrid.placement.active import ActiveShares
from hybrid.placement.capabilities import cache_row_bytes, kind_of, matrix_bytes, vector_bytes
from hybrid.placement.dimensions import Dimensions, read_dimensions
from hybrid.placement.numa import FEED_FORWARD
from hybrid.placement.roles import layer_of, role_of

_MIB = 1 << 20
SMALLEST_BATCH = 64  # tokens of a step; fitting makes steps no smaller
STAGING_BYTES = 64 * _MIB  # of a file's rows on their way into the packed layout
# Estimates: what a CUDA context with its kernels takes (a run measures it), and the pinned ring through which
# experts of long prompts go to the GPU, there and in RAM.
CUDA_CONTEXT_BYTES = 600 * _MIB
CUDA_RING_BYTES = 256 * _MIB


@dataclass(frozen=True)
class RunSize:
    """What a run is sized for: fields of `hybrid.config.EngineConfig`, and the format of the cache."""

    max_model_len: int = 8192
    max_num_seqs: int = 1
    max_num_batched_tokens: int = 512
    kv_format: str = "f16"
    kv_cache_tokens: int | None = None

    @property
    def cache_tokens(self) -> int:
        """Tokens the cache holds, in whole blocks."""
        if self.kv_cache_tokens is not None:
            return -(-self.kv_cache_tokens // BLOCK_SIZE) * BLOCK_SIZE
        return self.max_num_seqs * -(-self.max_model_len // BLOCK_SIZE) * BLOCK_SIZE

    def smaller_batches(self) -> list[int]:
        """``max_num_batched_tokens`` halved again and again, as far as fitting may, the largest first."""
        found, least = [self.max_num_batched_tokens], max(SMALLEST_BATCH, self.max_num_seqs)
        while found[-1] // 2 >= least:
            found.append(found[-1] // 2)
        return found[1:]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file as the planner sees it.

    ``share`` is the part of it that a token reads (0: never loaded), ``parts`` the matrices
    ``[batch, rows, cols]`` it is stored as; a vector has none.
    """

    name: str
    role: str
    layer: int | None
    info: TensorInfo
    share: float
    parts: tuple[tuple[int, int, int], ...]

    @property
    def num_experts(self) -> int:
        """Experts whose weights are stacked in it; 0 for other tensors."""
        return self.info.shape[0] if self.role == "routed_experts" and len(self.info.shape) == 3 else 0

    def active_bytes(self, part: Placed) -> float:
        """Bytes of a part that a token reads, in the part's format and without padding."""
        traits = TRAITS[self.info.type if part.format is None else GGMLType[part.format]]
        whole = self.info.n_elements / traits.block_size * traits.block_bytes
        return (self.info.n_bytes if part.format is None else whole) * self.share * self.fraction(part)

    def fraction(self, part: Placed) -> float:
        """How much of the tensor a part is."""
        return 1.0 if part.experts is None else len(part.experts) / self.num_experts

    def bytes_on(self, kind: str, format_: GGMLType | None = None, num_experts: int | None = None) -> int:
        """Bytes on a device of this kind, in another format if one is given, of so many experts only."""
        if not self.share:
            return 0
        if not self.parts:
            return vector_bytes(self.info.n_elements)
        stored = self.info.type if format_ is None else format_  # F32 is 0
        parts = self.parts if num_experts is None else [(num_experts, *part[1:]) for part in self.parts]
        return sum(matrix_bytes(stored, kind, part) for part in parts)


@dataclass(frozen=True)
class Model:
    """What planning needs of a file."""

    tensors: tuple[Tensor, ...]
    dims: Dimensions

    @property
    def joint_kv_b(self) -> bool:
        return any(".attn_kv_b." in t.name and t.share for t in self.tensors)

    @property
    def staging_bytes(self) -> int:
        """The largest piece of a matrix that is read at once."""
        matrices = (
            matrix_bytes(t.info.type, "cuda", (1, *part[1:])) for t in self.tensors for part in t.parts
        )
        return min(STAGING_BYTES, max(matrices, default=0))

    def block_width(self, role: str) -> int:
        """Rows of the gate of the first dense or shared block; 0 where there is none."""
        gates = (t.info.shape[0] for t in self.tensors if t.role == role and ".ffn_gate" in t.name)
        return next(gates, 0)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes. ``scratch_bytes`` is all that is neither weights nor cache; ``scratch_parts`` says what."""

    device: str
    budget_bytes: int | None
    weights_bytes: int
    kv_cache_bytes: int
    scratch_parts: Mapping[str, int]

    @property
    def scratch_bytes(self) -> int:
        return sum(self.scratch_parts.values())

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.scratch_bytes

    @property
    def missing_bytes(self) -> int:
        """By how much the budget is exceeded; 0 where it is not."""
        return 0 if self.budget_bytes is None else max(0, self.total_bytes - self.budget_bytes)


def read_model(file: GGUFFile, experts_per_token: int | None = None) -> Model:
    """Sizes, roles and active shares of all tensors; arguments and errors are those of `ActiveShares`."""
    shares, dims = ActiveShares(file, experts_per_token), read_dimensions(file)
    if experts_per_token is not None:
        dims = replace(dims, num_experts_per_tok=min(dims.num_experts_per_tok, experts_per_token))
    tensors = []
    for name, info in file.tensors.items():
        role = role_of(name)
        tensors.append(Tensor(name, role, layer_of(name), info, shares.share(info, role), _parts(info, dims)))
    return Model(tuple(tensors), dims)


def _parts(info: TensorInfo, dims: Dimensions) -> tuple[tuple[int, int, int], ...]:
    """The matrices a tensor is loaded as: attention by heads, its joint key and value half apart, and so the
    halves of a fused gate and up."""
    shape, heads, name = info.shape, dims.num_heads, info.name
    if len(shape) == 1:
        return ()
    batch, rows, cols = (1, *shape) if len(shape) == 2 else (prod(shape[:-2]), *shape[-2:])
    if ".attn_kv_b." in name and heads:
        value_rows = rows * batch // heads - dims.nope_dim
        return (heads, dims.nope_dim, cols), (heads, value_rows, cols)
    if (".attn_k_b." in name or ".attn_v_b." in name) and heads and batch == 1:
        return ((heads, rows // heads, cols),)
    if ".ffn_gate_up_exps." in name:
        return ((batch, rows // 2, cols),) * 2
    return ((batch, rows, cols),)


class Placed(Protocol):
    """What is decided about a tensor, or about some of its experts."""

    @property
    def device(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def format(self) -> str | None: ...
    @property
    def experts(self) -> tuple[int, ...] | None: ...
    @property
    def numa(self) -> str: ...


class Divisible(Placed, Protocol):
    """What is decided about all of a tensor: its parts may be placed apart."""

    @property
    def parts(self) -> Sequence[Placed]: ...


def memory_of(
    model: Model,
    placed: Mapping[str, Divisible],
    devices: Sequence[tuple[str, int | None]],
    size: RunSize,
    num_threads: int,
    num_nodes: int = 1,
) -> dict[str, DeviceMemory]:
    """Bytes on each device, given (name, budget) of them; those in use come first in the order given.

    ``num_nodes``: NUMA nodes with workers, into as many slices feed-forward blocks are cut by `shard`."""
    weights: dict[str, int] = {}
    caches: dict[str, int] = {}
    for placement in placed.values():
        for part in placement.parts:
            weights[part.device] = weights.get(part.device, 0) + part.n_bytes
    row_bytes = cache_row_bytes(model.dims.cache_width, size.kv_format)
    for device in cache_devices(model, placed).values():
        caches[device] = caches.get(device, 0) + size.cache_tokens * row_bytes
    budgets = dict(devices)
    names = [*budgets, *(name for name in weights if name not in budgets)]
    hybrid = "cpu" in weights and any(kind_of(name) == "cuda" for name in weights)
    roles: dict[str, set[str]] = {}
    cut = {part.numa for t in model.tensors if t.role in FEED_FORWARD for part in placed[t.name].parts}
    num_slices = num_nodes if "shard" in cut else 1
    for tensor in model.tensors:
        for part in placed[tensor.name].parts if tensor.share else ():
            roles.setdefault(part.device, set()).add(tensor.role)
    return {
        name: DeviceMemory(
            name,
            budgets.get(name),
            weights.get(name, 0),
            caches.get(name, 0),
            scratch_parts(model, kind_of(name), size, num_threads, roles[name], hybrid, num_slices)
            if name in roles
            else {},
        )
        for name in names
    }


def cache_devices(model: Model, placed: Mapping[str, Placed]) -> dict[int, str]:
    """Layer -> the device of its cache, which is that of its attention."""
    found: dict[int, str] = {}
    layers = set(model.dims.layers)
    for tensor in model.tensors:
        if tensor.role == "attention" and tensor.layer in layers and tensor.name in placed:
            found.setdefault(tensor.layer or 0, placed[tensor.name].device)
    return found


def scratch_parts(
    model: Model,
    kind: str,
    size: RunSize,
    num_threads: int,
    roles: Collection[str],
    hybrid: bool,
    num_slices: int = 1,
) -> dict[str, int]:
    """Working memory of a device that holds tensors of these roles: activations, tables, kernels, staging,
    context. ``hybrid``: experts of long prompts travel from RAM to a GPU."""
    dims = model.dims
    logits = size.max_num_seqs if "output" in roles or "embedding" in roles else 0
    number_bytes = 4 if size.kv_format == "f32" else 2
    step = scratch.Step(
        size.max_num_batched_tokens, size.max_model_len, logits, num_threads, num_slices, number_bytes
    )
    attends = "attention" in roles
    parts = {"activations": scratch.activation_bytes(dims, step, attends)}
    if attends:
        parts["rotary table"] = scratch.rope_bytes(dims, size.max_model_len)
    if kind == "cpu":
        widths = {role: model.block_width(role) for role in ("dense_ffn", "shared_experts") if role in roles}
        parts["kernels"] = scratch.kernel_bytes(dims, step, roles, widths, model.joint_kv_b)
        # Loading is over before the cache is made; only what the other parts do not take counts.
        parts["staging"] = max(0, model.staging_bytes - sum(parts.values()))
        if hybrid:
            parts["upload ring"] = CUDA_RING_BYTES
    elif kind == "cuda":
        widths = {role: model.block_width(role) for role in ("dense_ffn", "shared_experts") if role in roles}
        parts["activations"] = gpu_scratch.activation_bytes(dims, step, roles, widths)
        if attends:
            captured = gpu_scratch.captured_bytes(dims, size.max_num_seqs, size.cache_tokens)
            parts["captured steps"] = captured
        parts["context"] = CUDA_CONTEXT_BYTES
        parts["upload ring"] = CUDA_RING_BYTES if hybrid else 0
    return parts
