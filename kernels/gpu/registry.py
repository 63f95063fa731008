"""Every operation of the GPU, by name: what tests, ahead-of-time compilation and benchmarks follow."""

from __future__ import annotations

from hybrid.kernels.gpu import (
    cache_append,
    expand,
    gemm,
    gemv,
    gemv_float,
    quantize_activations,
    rms_norm,
    rotary,
    swiglu,
)
from hybrid.kernels.gpu.op import Op

MODULES = (
    rms_norm,
    rotary,
    swiglu,
    cache_append,
    quantize_activations,
    gemv,
    gemv_float,
    expand,
    gemm,
    mla_attention,
)

OPS: dict[str, Op] = {op.name: op for module in MODULES for op in module.OPS}
