"""Every operation of the GPU, by name: what tests, ahead-of-time compilation and benchmarks follow."""

from __future__ import annotations

from importlib import import_module

from hybrid.kernels.gpu.op import Op

MODULES = (
    "rms_norm",
    "rotary",
    "swiglu",
    "cache_append",
    "quantize_activations",
    "gemv",
    "gemv_float",
    "expand",
    "gemm",
    "gemm_float",
    "transposed",
    "combine",
    "experts",
    "mla_attention",
    "gqa_attention",
    "route",
    "sampling",
    "unpack",
    "unpack_float",
)

OPS: dict[str, Op] = {
    op.name: op for name in MODULES for op in import_module(f"hybrid.kernels.gpu.{name}").OPS
}
