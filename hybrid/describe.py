"""What is in a model file: roles, formats, bytes, and what one token touches. Reads headers only.

The *active bytes* of a token are all weights it reads: routed experts at used ÷ total, one row of
the embedding, everything else whole. Weights a token never reads (next-token-prediction layers)
count nothing. The KV cache is apart: what a token adds to it, and what each later token reads again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybrid.errors import GGUFError
from hybrid.gguf import GGUFFile, TensorInfo
from hybrid.placement.roles import ROLES, layer_of, role_of

_CACHE_ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class TensorSummary:
    """One tensor. ``active_bytes`` may be a fraction: experts count at used ÷ total."""

    info: TensorInfo
    role: str
    active_bytes: float
    active_parameters: float


@dataclass(frozen=True)
class RoleSummary:
    """All tensors of a role; ``formats`` maps a format to the bytes it takes there."""

    role: str
    num_tensors: int
    parameters: int
    n_bytes: int
    active_bytes: float
    formats: dict[str, int]


@dataclass(frozen=True)
class ModelSummary:
    """A model file. ``kv_bytes_per_token`` is None where the header does not say."""

    architecture: str
    name: str
    header_only: bool
    tensors: list[TensorSummary]
    roles: list[RoleSummary]
    num_experts: int
    num_experts_per_tok: int
    kv_format: str
    kv_bytes_per_token: int | None
    without_kernel: list[str]

    @property
    def parameters(self) -> int:
        return sum(t.info.n_elements for t in self.tensors)

    @property
    def n_bytes(self) -> int:
        return sum(t.info.n_bytes for t in self.tensors)

    @property
    def active_bytes(self) -> int:
        """Bytes of weights one token reads, rounded to whole bytes."""
        return round(sum(t.active_bytes for t in self.tensors))

    @property
    def active_parameters(self) -> int:
        return round(sum(t.active_parameters for t in self.tensors))


def summarise(
    file: GGUFFile, *, kv_format: str = "f16", has_kernel: Callable[[int], bool] = lambda _: True
) -> ModelSummary:
    """Describes an open file.

    Args:
        file: opened with or without its data.
        kv_format: ``f32``, ``f16`` or ``bf16``, for the cache's bytes.
        has_kernel: whether a tensor type id can be computed with on this machine.

    Raises:
        GGUFError: the header contradicts itself (experts used exceed experts present).
    """
    shares = _ActiveShares(file)
    tensors = [_summarise_tensor(shares, info) for info in file.tensors.values()]
    return ModelSummary(
        architecture=file.architecture,
        name=file.get("general.name", str, default=""),
        header_only=is_header_only(file),
        tensors=tensors,
        roles=[_summarise_role(role, tensors) for role in ROLES if any(t.role == role for t in tensors)],
        num_experts=shares.num_experts,
        num_experts_per_tok=max(shares.used_by_layer.values(), default=shares.used),
        kv_format=kv_format,
        kv_bytes_per_token=kv_bytes_per_token(file, kv_format),
        without_kernel=[t.info.name for t in tensors if not has_kernel(int(t.info.type))],
    )


def active_bytes(file: GGUFFile) -> int:
    """Bytes of weights one token reads."""
    shares = _ActiveShares(file)
    return round(sum(_summarise_tensor(shares, info).active_bytes for info in file.tensors.values()))


def is_header_only(file: GGUFFile) -> bool:
    """Whether the file ends before its first tensor's data."""
    first = min((t for t in file.tensors.values() if t.shard == 0), key=lambda t: t.offset, default=None)
    return first is not None and file.path.stat().st_size <= first.offset


def open_for_description(path: str | os.PathLike[str]) -> GGUFFile:
    """Opens a file with all of its tensor data or with none of it.

    Raises:
        GGUFError: malformed, or cut short within its data.
    """
    file = GGUFFile.open(path, header_only=True)
    if is_header_only(file):
        return file
    file.close()
    return GGUFFile.open(path)


class _ActiveShares:
    """Which part of each tensor of a file one token reads."""

    def __init__(self, file: GGUFFile) -> None:
        self.names = file.tensors.keys()
        key = f"{file.architecture}.expert_used_count"
        used = file.metadata.get(key, 0)
        self.num_experts = file.get(f"{file.architecture}.expert_count", int, default=0)
        self.used_by_layer: dict[int, int] = {}
        self.used = 0
        nextn_layers = file.get(f"{file.architecture}.nextn_predict_layers", int, default=0)
        # Next-token-prediction layers are the last ones, and `block_count` includes them.
        self.num_layers = file.get(f"{file.architecture}.block_count", int, default=1 << 31) - nextn_layers
        if isinstance(used, np.ndarray):
            self.used_by_layer = {layer: int(count) for layer, count in enumerate(used)}
        else:
            self.used = file.get(key, int, default=0)
        most = max(self.used_by_layer.values(), default=self.used)
        if most > self.num_experts or (self.num_experts and not most):
            raise GGUFError(
                "experts used per token contradict the number of experts",
                file=file.path,
                key=key,
                expected=f"1 to {self.num_experts}",
                found=most,
            )

    def share(self, info: TensorInfo, role: str) -> float:
        layer = layer_of(info.name)
        layer = -1 if layer is None else layer
        if role == "nextn" or self._is_unused_twin(info.name) or layer >= self.num_layers:
            return 0.0
        if role == "routed_experts" and self.num_experts:
            return self.used_by_layer.get(layer, self.used) / self.num_experts
        if role == "embedding" and len(info.shape) == 2:
            one_row = 1 / info.shape[0]
            tied = "output.weight" not in self.names
            return 1.0 + one_row if tied else one_row
        return 1.0

    def _is_unused_twin(self, name: str) -> bool:
        """Some files carry `attn_kv_b` beside its split halves; a token reads one of the two."""
        return ".attn_kv_b." in name and name.replace(".attn_kv_b.", ".attn_k_b.") in self.names


def _summarise_tensor(shares: _ActiveShares, info: TensorInfo) -> TensorSummary:
    role = role_of(info.name)
    share = shares.share(info, role)
    return TensorSummary(info, role, info.n_bytes * share, info.n_elements * share)


def _summarise_role(role: str, tensors: list[TensorSummary]) -> RoleSummary:
    mine = [t for t in tensors if t.role == role]
    formats: Counter[str] = Counter()
    for tensor in mine:
        formats[tensor.info.type.name] += tensor.info.n_bytes
    return RoleSummary(
        role=role,
        num_tensors=len(mine),
        parameters=sum(t.info.n_elements for t in mine),
        n_bytes=sum(t.info.n_bytes for t in mine),
        active_bytes=sum(t.active_bytes for t in mine),
        formats=dict(formats.most_common()),
    )


def kv_bytes_per_token(file: GGUFFile, kv_format: str = "f16") -> int | None:
    """Bytes one token adds to the cache over all layers; None if the header lacks the head sizes.

    A latent (MLA) cache holds one row of ``kv_lora_rank + rope`` for each layer, others a key and a value
    of each key/value head.
    """
    prefix = file.architecture
    layers = file.get(f"{prefix}.block_count", int, default=0)
    layers -= file.get(f"{prefix}.nextn_predict_layers", int, default=0)
    element = _CACHE_ELEMENT_BYTES[kv_format]
    latent = file.get(f"{prefix}.attention.kv_lora_rank", int, default=0)
    if latent:
        rope = file.get(f"{prefix}.rope.dimension_count", int, default=None)
        return None if rope is None else layers * (latent + rope) * element
    heads = file.metadata.get(f"{prefix}.attention.head_count_kv")
    key = file.get(f"{prefix}.attention.key_length", int, default=None)
    value = file.get(f"{prefix}.attention.value_length", int, default=None)
    if heads is None or key is None or value is None:
        return None
    all_heads = int(heads.sum()) if isinstance(heads, np.ndarray) else layers * int(heads)
    return all_heads * (key + value) * element


def shorten(value: Any, limit: int = 6) -> Any:
    """A metadata value fit for a report: long arrays and strings become their beginning and their length."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and len(value) > limit:
        return {"length": len(value), "first": [shorten(v) for v in value[:limit]]}
    if isinstance(value, str) and len(value) > 120:
        return {"length": len(value), "first": value[:100]}
    return value


def report(file: GGUFFile, summary: ModelSummary) -> dict[str, Any]:
    """The summary as plain JSON values; the keys are part of the command line's interface."""
    return {
        "file": str(file.path),
        "shards": [str(path) for path in file.paths],
        "gguf_version": file.version,
        "architecture": summary.architecture,
        "name": summary.name,
        "header_only": summary.header_only,
        "parameters": summary.parameters,
        "bytes": summary.n_bytes,
        "active_parameters_per_token": summary.active_parameters,
        "active_bytes_per_token": summary.active_bytes,
        "kv_format": summary.kv_format,
        "kv_bytes_per_token": summary.kv_bytes_per_token,
        "num_experts": summary.num_experts,
        "num_experts_per_tok": summary.num_experts_per_tok,
        "tensors_without_kernel": summary.without_kernel,
        "metadata": {key: shorten(value) for key, value in file.metadata.items()},
        "roles": [
            {
                "role": role.role,
                "tensors": role.num_tensors,
                "parameters": role.parameters,
                "bytes": role.n_bytes,
                "active_bytes_per_token": round(role.active_bytes),
                "formats": role.formats,
            }
            for role in summary.roles
        ],
        "tensors": [
            {
                "name": tensor.info.name,
                "role": tensor.role,
                "shape": list(tensor.info.shape),
                "format": tensor.info.type.name,
                "bytes": tensor.info.n_bytes,
                "shard": tensor.info.shard,
                "offset": tensor.info.offset,
            }
            for tensor in summary.tensors
        ],
    }


def formats_of(summary: ModelSummary, names: list[str]) -> Mapping[str, int]:
    """How many of the named tensors each format has."""
    wanted = set(names)
    return Counter(t.info.type.name for t in summary.tensors if t.info.name in wanted)
