"""GGUF files: reading, writing, and the numbers in their tensors. Needs numpy alone."""

from hybrid.gguf.dequantize import DEQUANTIZABLE, dequantize
from hybrid.gguf.reader import MISSING, GGUFFile, TensorInfo
from hybrid.gguf.types import TRAITS, GGMLType, TypeTraits, row_bytes, tensor_bytes

__all__ = [
    "DEQUANTIZABLE",
    "MISSING",
    "TRAITS",
    "GGMLType",
    "GGUFFile",
    "TensorInfo",
    "TypeTraits",
    "dequantize",
    "row_bytes",
    "tensor_bytes",
]
