"""What one token touches: the weights it reads, and the cache it adds to."""

from __future__ import annotations

import numpy as np

from hybrid.errors import ConfigError, GGUFError
from hybrid.gguf import GGUFFile, TensorInfo
from hybrid.placement.capabilities import cache_row_bytes
from hybrid.placement.roles import layer_of


class ActiveShares:
    """Which part of each tensor of a file one token reads.

    Args:
        experts_per_token: run so many of a token's experts; ``None``: as many as the model was made for.

    Raises:
        GGUFError: the header contradicts itself (experts used exceed experts present).
        ConfigError: the model has fewer experts per token than asked for.
    """

    def __init__(self, file: GGUFFile, experts_per_token: int | None = None) -> None:
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
        if experts_per_token is not None:
            self._reduce(experts_per_token, most)

    def _reduce(self, experts_per_token: int, most: int) -> None:
        if experts_per_token > most:
            expected = f"1 to {most}, the number it was made for" if most else "a model with routed experts"
            raise ConfigError(
                f"experts per token (--experts-per-token, experts_per_token): expected {expected}, "
                f"found {experts_per_token}"
            )
        self.used = min(self.used, experts_per_token)
        self.used_by_layer = {n: min(used, experts_per_token) for n, used in self.used_by_layer.items()}

    def share(self, info: TensorInfo, role: str) -> float:
        """Bytes read ÷ bytes there: 0 where nothing is loaded, more than 1 for a tied embedding."""
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


def kv_bytes_per_token(file: GGUFFile, kv_format: str = "f16") -> int | None:
    """Bytes one token adds to the cache over all layers; None if the header lacks the head sizes.

    A latent (MLA) cache holds one row of ``kv_lora_rank + rope`` for each layer, others a key and a value
    of each key/value head.
    """
    prefix = file.architecture
    layers = file.get(f"{prefix}.block_count", int, default=0)
    layers -= file.get(f"{prefix}.nextn_predict_layers", int, default=0)
    latent = file.get(f"{prefix}.attention.kv_lora_rank", int, default=0)
    if latent:
        rope = file.get(f"{prefix}.rope.dimension_count", int, default=None)
        return None if rope is None else layers * cache_row_bytes(latent + rope, kv_format)
    heads = file.metadata.get(f"{prefix}.attention.head_count_kv")
    key = file.get(f"{prefix}.attention.key_length", int, default=None)
    value = file.get(f"{prefix}.attention.value_length", int, default=None)
    if heads is None or key is None or value is None:
        return None
    all_heads = int(heads.sum()) if isinstance(heads, np.ndarray) else layers * int(heads)
    return cache_row_bytes(all_heads * (key + value), kv_format)
