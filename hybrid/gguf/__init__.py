"""GGUF files: reading, writing, and the numbers in their tensors. Needs numpy alone."""

from hybrid.gguf.check import TensorProblem, check_tensors, require_sound_tensors
from hybrid.gguf.dequantize import DEQUANTIZABLE, dequantize
from hybrid.gguf.quantize import QUANTIZABLE, quantize
from hybrid.gguf.random_blocks import RANDOM_TYPES, random_blocks
from hybrid.gguf.reader import MISSING, GGUFFile, TensorInfo
from hybrid.gguf.rules import ValueType
from hybrid.gguf.types import TRAITS, GGMLType, TypeTraits, row_bytes, tensor_bytes
from hybrid.gguf.writer import GGUFWriter

__all__ = [
    "DEQUANTIZABLE",
    "MISSING",
    "QUANTIZABLE",
    "RANDOM_TYPES",
    "TRAITS",
    "GGMLType",
    "GGUFFile",
    "GGUFWriter",
    "TensorInfo",
    "TensorProblem",
    "TypeTraits",
    "ValueType",
    "check_tensors",
    "dequantize",
    "quantize",
    "random_blocks",
    "require_sound_tensors",
    "row_bytes",
    "tensor_bytes",
]
