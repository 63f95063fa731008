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

from hybrid.gguf import GGUFFile, TensorInfo
from hybrid.placement.active import ActiveShares, kv_bytes_per_token
from hybrid.placement.roles import ROLES, role_of


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
    file: GGUFFile,
    *,
    kv_format: str = "f16",
    has_kernel: Callable[[int], bool] = lambda _: True,
) -> ModelSummary:
    """Describes an open file.

    Args:
        file: opened with or without its data.
        kv_format: one of `hybrid.config.KV_FORMATS`, for the cache's bytes.
        has_kernel: whether a tensor type id can be computed with on this machine.

    Raises:
        GGUFError: the header contradicts itself (experts used exceed experts present).
    """
    shares = ActiveShares(file)
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


def model_type(file: GGUFFile, num_parameters: int) -> str:
    """``deepseek2 15.7B Q4_K_M``: architecture, parameters, the file's label or its most common format."""
    import gguf  # for the labels alone

    sizes: dict[str, int] = {}
    for info in file.tensors.values():
        sizes[info.type.name] = sizes.get(info.type.name, 0) + info.n_bytes
    label = max(sizes, key=lambda name: sizes[name], default="?")
    stated = file.metadata.get("general.file_type")
    if isinstance(stated, int) and stated in list(gguf.LlamaFileType):
        label = gguf.LlamaFileType(stated).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    if num_parameters >= 1e9:
        size = f"{num_parameters / 1e9:.1f}B"
    else:
        size = f"{num_parameters / 1e6:.1f}M"
    return f"{file.architecture} {size} {label}"


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


def _summarise_tensor(shares: ActiveShares, info: TensorInfo) -> TensorSummary:
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
        "roles": [_role_report(role) for role in summary.roles],
        "tensors": [_tensor_report(tensor) for tensor in summary.tensors],
    }


def _role_report(role: RoleSummary) -> dict[str, Any]:
    return {
        "role": role.role,
        "tensors": role.num_tensors,
        "parameters": role.parameters,
        "bytes": role.n_bytes,
        "active_bytes_per_token": round(role.active_bytes),
        "formats": role.formats,
    }


def _tensor_report(tensor: TensorSummary) -> dict[str, Any]:
    info = tensor.info
    return {
        "name": info.name,
        "role": tensor.role,
        "shape": list(info.shape),
        "format": info.type.name,
        "bytes": info.n_bytes,
        "shard": info.shard,
        "offset": info.offset,
    }


def formats_of(summary: ModelSummary, names: list[str]) -> Mapping[str, int]:
    """How many of the named tensors each format has."""
    wanted = set(names)
    return Counter(t.info.type.name for t in summary.tensors if t.info.name in wanted)
