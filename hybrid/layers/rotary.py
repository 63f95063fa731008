"""Rotary position embedding: the table of cosines and sines, with YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class YarnConfig:
    """Context extension by YaRN (Peng et al. 2023, arXiv:2309.00071).

    ``log_multiplier`` is GGUF's `rope.scaling.yarn_log_multiplier`: a tenth of the configuration's
    ``mscale_all_dim``. DeepSeek models set ``mscale`` equal to it, which leaves the rotation's magnitude at 1
    and scales the softmax instead; without it the magnitude takes the factor.
    """

    factor: float
    original_context_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0 if self.log_multiplier else 0.1 * math.log(self.factor) + 1.0

    @property
    def softmax_scale(self) -> float:
        """What the attention scale is multiplied by."""
        return (self.log_multiplier * math.log(self.factor) + 1.0) ** 2


def inverse_frequencies(dim: int, base: float, yarn: YarnConfig | None) -> torch.Tensor:
    """Radians a position, float64 ``[dim / 2]``."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    plain = base**-exponents
    if yarn is None:
        return plain

    def dimension_of(rotations: float) -> float:
        """Where a dimension turns that often over the original context."""
        return dim * math.log(yarn.original_context_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain / yarn.factor * interpolated + plain * (1 - interpolated)


def rope_table(num_positions: int, dim: int, base: float, yarn: YarnConfig | None) -> torch.Tensor:
    """Float32 ``[num_positions, dim / 2, 2]`` of (cos, sin), YaRN's magnitude included."""
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * inverse_frequencies(dim, base, yarn)
    magnitude = 1.0 if yarn is None else yarn.magnitude
    return (torch.stack((angles.cos(), angles.sin()), dim=-1) * magnitude).float().contiguous()
