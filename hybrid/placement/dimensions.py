"""The sizes of a model that memory and speed depend on, from its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hybrid.gguf import GGUFFile, TensorInfo
from hybrid.placement.roles import layer_of, role_of


@dataclass(frozen=True)
class Dimensions:
    """Widths are numbers, not bytes; what a header does not tell is 0.

    ``cache_width`` is what a token keeps in one layer's cache: ``kv_lora_rank`` and the rotary part, or the
    keys and values of all key/value heads. ``layers`` are those that a token passes through.
    """

    layers: tuple[int, ...]
    context_length: int
    vocab_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    v_head_dim: int
    q_lora_rank: int
    kv_lora_rank: int
    rope_dim: int
    cache_width: int
    num_experts: int
    num_experts_per_tok: int
    expert_width: int

    @property
    def nope_dim(self) -> int:
        """Columns of a query head that are not rotated."""
        return self.head_dim - self.rope_dim


def _most_kv_heads(file: GGUFFile, heads: int) -> int:
    """Of the layer that has most, where the header lists them; as many as query heads if it is silent."""
    found = file.metadata.get(f"{file.architecture}.attention.head_count_kv")
    if isinstance(found, np.ndarray):
        return int(found.max(initial=0))
    return file.get(f"{file.architecture}.attention.head_count_kv", int, default=heads)


def read_dimensions(file: GGUFFile) -> Dimensions:
    """Sizes as the tensors' shapes tell them; metadata where they do not.

    Raises:
        GGUFError: a key has the wrong type.
    """
    prefix = file.architecture

    def key(name: str) -> int:
        # Some models have a number for each layer; those are told by shapes or not at all.
        per_layer = isinstance(file.metadata.get(f"{prefix}.{name}"), np.ndarray)
        return 0 if per_layer else file.get(f"{prefix}.{name}", int, default=0)

    shapes = _first_shapes(file.tensors)
    num_layers = key("block_count") - key("nextn_predict_layers")
    found = {layer_of(name) for name in file.tensors if role_of(name) != "nextn"} - {None}
    heads = key("attention.head_count")
    latent = _first(shapes, "attn_kv_a_norm", 0)
    kv_a = _first(shapes, "attn_kv_a_mqa", 0)
    q_rows = _first(shapes, "attn_q_b", 0) or _first(shapes, "attn_q", 0)
    experts = shapes.get("ffn_down_exps", (0, 0, 0))
    head_dim = q_rows // heads if heads else 0
    v_dim = _first(shapes, "attn_output", 1) // heads if heads else 0
    hidden = _first(shapes, "token_embd", 1)
    default_dim = hidden // heads if heads else 0
    widths = [key(f"attention.{name}_length") or default_dim for name in ("key", "value")]
    plain_cache = _most_kv_heads(file, heads) * sum(widths)
    return Dimensions(
        layers=tuple(sorted(i for i in found if i is not None and (i < num_layers or not num_layers))),
        context_length=key("context_length"),
        vocab_size=_first(shapes, "token_embd", 0),
        hidden_size=hidden,
        num_heads=heads,
        head_dim=head_dim,
        v_head_dim=v_dim,
        q_lora_rank=_first(shapes, "attn_q_b", 1),
        kv_lora_rank=latent,
        rope_dim=kv_a - latent if kv_a else key("rope.dimension_count"),
        cache_width=kv_a or plain_cache,
        num_experts=experts[0],
        num_experts_per_tok=key("expert_used_count"),
        expert_width=experts[-1],
    )


def _first_shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Kind of tensor (``attn_q_b``) -> the shape of the first of them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, info in tensors.items():
        kind = name.split(".")[2] if name.startswith("blk.") and name.count(".") > 2 else name.split(".")[0]
        shapes.setdefault(kind, info.shape)
    return shapes


def _first(shapes: dict[str, tuple[int, ...]], kind: str, axis: int) -> int:
    shape = shapes.get(kind, ())
    return shape[axis] if axis < len(shape) else 0
