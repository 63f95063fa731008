"""GGUF files: reading, writing, and the numbers in their tensors. Needs numpy alone."""

from hybrid.gguf.reader import MISSING, GGUFFile, TensorInfo
from hybrid.gguf.types import TRAITS, GGMLType, TypeTraits, row_bytes, tensor_bytes

__all__ = [
    "MISSING",
    "TRAITS",
    "GGMLType",
    "GGUFFile",
    "TensorInfo",
    "TypeTraits",
    "row_bytes",
    "tensor_bytes",
]
