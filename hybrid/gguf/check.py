"""Looking for damage in tensor data: scales that are NaN or infinite, and tensors of zeros alone.

Reads the whole file, so it runs on request (`--check-tensors`) and not when a file is opened. A tensor
of zeros is what a sparse file holds where a download never wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.errors import GGUFError
from hybrid.gguf.fields import F16_FIELDS, U8, iq1_m_scale
from hybrid.gguf.reader import GGUFFile, TensorInfo
from hybrid.gguf.types import TRAITS, GGMLType

_STEP_BYTES = 8 << 20
_F16_EXPONENT, _BF16_EXPONENT, _F32_EXPONENT = 0x7C00, 0x7F80, 0x7F800000
_F64_EXPONENT = 0x7FF0 << 48
_MXFP4_NAN = 0xFF  # e8m0 in the OCP Microscaling specification

Bad = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TensorProblem:
    """Damage in one tensor. ``offset`` is where in its file the first bad block begins."""

    tensor: TensorInfo
    problem: str
    offset: int


def check_tensors(file: GGUFFile) -> Iterator[TensorProblem]:
    """Reads every tensor and yields what is wrong, at most one problem for each.

    Raises:
        GGUFError: the data cannot be read.
    """
    buffer = np.empty(_STEP_BYTES, dtype=np.uint8)
    for info in file.tensors.values():
        problem = _check_tensor(file, info, buffer)
        if problem is not None:
            yield problem


def require_sound_tensors(file: GGUFFile) -> None:
    """Raises `GGUFError` for the first damaged tensor of a file."""
    for found in check_tensors(file):
        path, name = file.paths[found.tensor.shard], found.tensor.name
        raise GGUFError("tensor data is damaged", file=path, tensor=name, offset=found.offset,
                        expected="finite scales and data that is not all zero", found=found.problem,
                        hint="Download or quantise the file again.")  # fmt: skip


def _check_tensor(file: GGUFFile, info: TensorInfo, buffer: U8) -> TensorProblem | None:
    traits = TRAITS[info.type]
    bad_blocks = _BAD_BLOCKS.get(info.type)
    width = traits.block_bytes
    step = _STEP_BYTES // width * width
    all_zero = True
    for start in range(0, info.n_bytes, step):
        count = min(step, info.n_bytes - start)
        file.read_into(info.name, buffer, start, count)
        all_zero = all_zero and not buffer[:count].any()
        if bad_blocks is None:
            continue
        bad = np.flatnonzero(bad_blocks(buffer[:count].reshape(-1, width)))
        if bad.size:
            where = "value" if traits.block_size == 1 else "block scale"
            at = start + int(bad[0]) * width
            return TensorProblem(info, f"a NaN or infinite {where}", info.offset + at)
    # Biases, norms and padding may be zero; a matrix may not.
    if all_zero and len(info.shape) > 1:
        return TensorProblem(info, "nothing but zeros", info.offset)
    return None


def _all_ones(bits: npt.NDArray[np.unsignedinteger], exponent: int) -> Bad:
    """Whether a float's exponent is that of NaN and infinity."""
    mask = bits.dtype.type(exponent)
    found: Bad = (bits & mask) == mask
    return found


def _f16_bad(offsets: tuple[int, ...]) -> Callable[[U8], Bad]:
    def bad(blocks: U8) -> Bad:
        fields = [blocks[:, at : at + 2].view(np.uint16)[:, 0] for at in offsets]
        found: Bad = np.logical_or.reduce([_all_ones(field, _F16_EXPONENT) for field in fields])
        return found

    return bad


def _iq1_m_bad(blocks: U8) -> Bad:
    return _all_ones(iq1_m_scale(blocks), _F16_EXPONENT)


def _mxfp4_bad(blocks: U8) -> Bad:
    return np.equal(blocks[:, 0], _MXFP4_NAN)


def _f32_bad(blocks: U8) -> Bad:
    return _all_ones(blocks.view(np.uint32)[:, 0], _F32_EXPONENT)


def _bf16_bad(blocks: U8) -> Bad:
    return _all_ones(blocks.view(np.uint16)[:, 0], _BF16_EXPONENT)


def _f64_bad(blocks: U8) -> Bad:
    return _all_ones(blocks.view(np.uint64)[:, 0], _F64_EXPONENT)


# Types that are missing here have no field that could be NaN, or no decoder.
_BAD_BLOCKS: dict[GGMLType, Callable[[U8], Bad]] = {
    GGMLType.F64: _f64_bad,
    GGMLType.F32: _f32_bad,
    GGMLType.F16: _f16_bad((0,)),
    GGMLType.BF16: _bf16_bad,
    GGMLType.IQ1_M: _iq1_m_bad,
    GGMLType.MXFP4: _mxfp4_bad,
    **{kind: _f16_bad(offsets) for kind, offsets in F16_FIELDS.items()},
}
