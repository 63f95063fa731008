"""What each kind of device can compute with, and how many bytes weights and cache take there.

A pure table: the planner asks it about machines that are not this one. Tests prove the CPU part equal to the
kernels' own table and to the bytes of packed matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from hybrid.gguf import DEQUANTIZABLE, QUANTIZABLE, TRAITS, GGMLType

ISAS = ("scalar", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx")
GROUP_ROWS = 16  # rows that are packed together; the last group of a matrix is padded

# Every ISA has a kernel for each of these. Float weights multiply float32 activations, the others int8.
FLOAT_FORMATS = frozenset((GGMLType.F32, GGMLType.F16, GGMLType.BF16))
CPU_FORMATS = FLOAT_FORMATS | {
    GGMLType.Q4_0,
    GGMLType.Q4_1,
    GGMLType.Q5_0,
    GGMLType.Q5_1,
    GGMLType.Q8_0,
    GGMLType.Q2_K,
    GGMLType.Q3_K,
    GGMLType.Q4_K,
    GGMLType.Q5_K,
    GGMLType.Q6_K,
    GGMLType.IQ1_S,
    GGMLType.IQ1_M,
    GGMLType.IQ2_XXS,
    GGMLType.IQ2_XS,
    GGMLType.IQ2_S,
    GGMLType.IQ3_XXS,
    GGMLType.IQ3_S,
    GGMLType.IQ4_NL,
    GGMLType.IQ4_XS,
    GGMLType.TQ1_0,
    GGMLType.TQ2_0,
    GGMLType.MXFP4,
}
# Bytes of a block's fields, each of which is a plane of a matrix on a GPU (`kernels/gpu/formats.py`).
CUDA_PLANES: dict[GGMLType, tuple[int, ...]] = {
    GGMLType.Q8_0: (32, 2),
    GGMLType.Q6_K: (128, 64, 16, 2),
    GGMLType.Q5_K: (128, 32, 12, 4),
    GGMLType.Q4_K: (128, 12, 4),
    GGMLType.Q3_K: (64, 32, 12, 2),
    GGMLType.Q2_K: (64, 16, 4),
    GGMLType.Q4_0: (16, 2),
    GGMLType.Q5_0: (16, 4, 2),
    GGMLType.IQ4_XS: (128, 2, 4, 2),
    GGMLType.IQ4_NL: (16, 2),
}
CUDA_FORMATS = FLOAT_FORMATS | CUDA_PLANES.keys()
_PLANE_ALIGNMENT = 16
# Columns that a kernel takes at once, where they are more than a block.
_CUDA_COLUMNS = {GGMLType.Q4_0: 64, GGMLType.Q5_0: 64, GGMLType.IQ4_NL: 64}

# Columns of a row must be a multiple of this where it is not the format's own block.
_PACKED_COLUMNS = {GGMLType.BF16: 2}

# Bytes of 16 rows of a packed block, where the CPU codes weights anew: trits instead of a code book.
_RECODED_GROUP_BYTES = {GGMLType.IQ1_S: 920, GGMLType.IQ1_M: 1024}

_CACHE_BITS: dict[str, int] = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8}
_Q8_BLOCK = 32  # numbers that share a float16 scale in a q8_0 cache row


def kind_of(device: str) -> str:
    """``cpu``, ``cuda`` or ``fake``: a device's name up to its number. ``fakegpu:N`` holds what ``fake:N``
    does."""
    return device.partition(":")[0].removesuffix("gpu")


def can_multiply(format_: GGMLType, kind: str, isa: str = "scalar") -> bool:
    """Whether a device of this kind has kernels for matrices of a format. ``isa`` is asked of CPUs alone."""
    if kind == "cpu":
        return isa in ISAS and format_ in CPU_FORMATS
    return format_ in (CUDA_FORMATS if kind == "cuda" else DEQUANTIZABLE)


def columns_problem(format_: GGMLType, kind: str, cols: int) -> str | None:
    """Why kernels of a format that a device has do not take rows of ``cols`` weights; ``None`` if they do."""
    multiple = _CUDA_COLUMNS.get(format_, 1) if kind == "cuda" else 1
    if cols % multiple:
        return f"kernels of {format_.name} on a GPU take rows of a multiple of {multiple} weights, not {cols}"
    return None


def quantizing_problem(source: GGMLType, target: GGMLType, cols: int) -> str | None:
    """Why rows of ``cols`` weights cannot change formats while loading; ``None`` if they can."""
    if target is source:
        return None
    if target not in QUANTIZABLE:
        known = ", ".join(sorted(type_.name for type_ in QUANTIZABLE if can_multiply(type_, "cpu")))
        return f"there is no quantiser for {target.name}; choose one of {known}"
    if source not in DEQUANTIZABLE:
        return f"the file's {source.name} cannot be read as numbers"
    if cols % block_cols(target):
        block = block_cols(target)
        return f"its rows of {cols} weights are no whole blocks of {target.name}, which have {block}"
    return None


def block_cols(format_: GGMLType) -> int:
    """Columns a row of a packed matrix is a multiple of."""
    return _PACKED_COLUMNS.get(format_, TRAITS[format_].block_size)


def matrix_bytes(format_: GGMLType, kind: str, shape: Sequence[int]) -> int:
    """Bytes of a matrix stack ``[batch, rows, cols]`` on a device.

    On the CPU the rows of each matrix are padded to groups of 16, and IQ1 takes 15 % more; on a GPU the
    planes of a stack are padded to 16 bytes; the test device ``fake`` keeps float32.
    """
    batch, rows, cols = shape
    if kind == "fake":
        return prod(shape) * 4
    traits = TRAITS[format_]
    row_bytes = cols // traits.block_size * traits.block_bytes + traits.row_meta_bytes
    if kind == "cuda":
        num_blocks = batch * rows * cols // traits.block_size
        planes = CUDA_PLANES.get(format_)
        sizes = [batch * rows * row_bytes] if planes is None else [n * num_blocks for n in planes]
        return sum(-(-n // _PLANE_ALIGNMENT) * _PLANE_ALIGNMENT for n in sizes)
    if kind != "cpu":
        return batch * rows * row_bytes
    group_bytes = GROUP_ROWS * row_bytes
    if format_ in _RECODED_GROUP_BYTES:
        group_bytes = cols // traits.block_size * _RECODED_GROUP_BYTES[format_]
    return batch * -(-rows // GROUP_ROWS) * group_bytes


def cache_problem(kind: str, latent_dim: int, rope_dim: int, format_: str) -> str | None:
    """Why a device cannot keep a latent cache of these widths; ``None`` if it can."""
    if kind != "cuda":
        return None
    for name, dim in (("latent", latent_dim), ("rotary", rope_dim)):
        if dim < 16 or dim & (dim - 1):
            return f"the GPU's attention takes a power of two, at least 16, as {name} width, not {dim}"
    if format_ == "q8_0" and rope_dim % _Q8_BLOCK:
        return f"q8_0 has a scale for {_Q8_BLOCK} numbers, and the rotary part has {rope_dim}; take f16"
    return None


def vector_bytes(num_elements: int) -> int:
    """Norms and biases are float32 everywhere."""
    return num_elements * 4


def cache_row_bytes(width: int, format_: str) -> int:
    """Bytes of a cache row of ``width`` numbers; ``q8_0`` has a float16 scale for every 32 of them."""
    scales = -(-width // _Q8_BLOCK) * 2 if format_ == "q8_0" else 0
    return width * _CACHE_BITS[format_] // 8 + scales
