"""CPU kernels: packed quantised matrices, products with them, and the other operations of a model.

Everything takes addresses of contiguous memory (``tensor.data_ptr()``), shapes and strides in
elements; the caller keeps the memory alive. Long calls release the GIL. Results are the same bits for
every number of tokens and threads. Wrong arguments raise ``ValueError``; a call from inside a unit of
work, or after a fork, raises ``RuntimeError``.
"""

from hybrid.kernels.cpu._cpu import (
    PackedMatrix,
    Recording,
    ThreadPool,
    add,
    cpu_features,
    current_isa,
    fill_scratch,
    gather_rows,
    has_kernel,
    isa_missing,
    isas,
    kernel_rows,
    linear,
    linear_batched,
    linear_transposed_batched,
    measure_read_bandwidth,
    mla_append,
    mla_attention,
    mlp,
    moe,
    physical_cores,
    quantize_activations,
    release_scratch,
    rms_norm,
    route,
    scratch_bytes,
    select_isa,
    supported_isas,
)

__all__ = [
    "PackedMatrix",
    "Recording",
    "ThreadPool",
    "add",
    "cpu_features",
    "current_isa",
    "fill_scratch",
    "gather_rows",
    "has_kernel",
    "isa_missing",
    "isas",
    "kernel_rows",
    "linear",
    "linear_batched",
    "linear_transposed_batched",
    "measure_read_bandwidth",
    "mla_append",
    "mla_attention",
    "mlp",
    "moe",
    "physical_cores",
    "quantize_activations",
    "release_scratch",
    "rms_norm",
    "route",
    "scratch_bytes",
    "select_isa",
    "supported_isas",
]
