"""Damaged tensor data: NaN or infinite scales, and holes of unfinished downloads.

Faults are numbered as in `test_hostile`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hybrid.errors import GGUFError
from hybrid.gguf import RANDOM_TYPES, TRAITS, GGMLType, GGUFFile, GGUFWriter, dequantize, random_blocks
from hybrid.gguf.check import check_tensors, require_sound_tensors
from hybrid.gguf.fields import F16_FIELDS, set_iq1_m_scale

WITH_FLOAT_SCALES = sorted(RANDOM_TYPES - {GGMLType.NVFP4, GGMLType.MXFP4})


def write(path: Path, blocks: np.ndarray, kind: GGMLType, shape: tuple[int, ...]) -> Path:
    with GGUFWriter(path) as writer:
        writer.add_tensor("good", (2, 32), GGMLType.Q8_0)
        writer.add_tensor("t", shape, kind)
        writer.write_tensor("good", random_blocks(GGMLType.Q8_0, 2, 32, np.random.default_rng(0)))
        writer.write_tensor("t", blocks)
    return path


def damage(blocks: np.ndarray, kind: GGMLType, block: int) -> None:
    """Makes the last scale field of a block infinite."""
    if kind is GGMLType.F32:
        blocks.view(np.float32)[block] = np.inf
    elif kind is GGMLType.BF16:
        blocks.view(np.uint16)[block] = 0x7FC0
    elif kind is GGMLType.F16:
        blocks.view(np.float16)[block] = np.nan
    elif kind is GGMLType.IQ1_M:
        set_iq1_m_scale(blocks[block : block + 1], np.array([0x7C00], dtype=np.uint16))
    else:
        at = F16_FIELDS[kind][-1]
        blocks[block, at : at + 2] = (0x00, 0xFC)


@pytest.mark.parametrize("kind", WITH_FLOAT_SCALES, ids=lambda t: t.name)
def test_hostile_22_infinite_scale(tmp_path: Path, kind: GGMLType) -> None:
    shape = (5, 512)
    blocks = random_blocks(kind, *shape, np.random.default_rng(1)).reshape(-1, TRAITS[kind].block_bytes)
    with GGUFFile.open(write(tmp_path / "good.gguf", blocks, kind, shape)) as file:
        assert list(check_tensors(file)) == []
        require_sound_tensors(file)
    damage(blocks, kind, 7)
    assert not np.isfinite(dequantize(blocks, kind, shape)).all()
    with GGUFFile.open(write(tmp_path / "bad.gguf", blocks, kind, shape)) as file:
        with pytest.raises(GGUFError, match="damaged") as caught:
            require_sound_tensors(file)
        assert caught.value.tensor == "t" and "NaN or infinite" in str(caught.value.found)
        assert caught.value.offset == file.tensors["t"].offset + 7 * TRAITS[kind].block_bytes


def test_hostile_22_mxfp4_nan_exponent(tmp_path: Path) -> None:
    blocks = random_blocks(GGMLType.MXFP4, 4, 64, np.random.default_rng(1)).reshape(-1, 17)
    blocks[3, 0] = 255
    with GGUFFile.open(write(tmp_path / "m.gguf", blocks, GGMLType.MXFP4, (4, 64))) as file:
        (found,) = check_tensors(file)
        assert found.tensor.name == "t" and found.offset == file.tensors["t"].offset + 51


def test_hostile_22_hole_in_a_sparse_file(tmp_path: Path) -> None:
    blocks = np.zeros((64, 1024), dtype=np.float32)
    with GGUFFile.open(write(tmp_path / "m.gguf", blocks, GGMLType.F32, blocks.shape)) as file:
        (found,) = check_tensors(file)
        assert found.problem == "nothing but zeros"


def test_zero_vectors_are_fine(tmp_path: Path) -> None:
    with GGUFFile.open(write(tmp_path / "m.gguf", np.zeros(64, np.float32), GGMLType.F32, (64,))) as file:
        assert list(check_tensors(file)) == []


def test_double_precision(tmp_path):
    values = np.ones((1, 32))
    for bad in (np.nan, -np.inf):
        values[0, 7] = bad
        with GGUFFile.open(write(tmp_path / "m.gguf", values.view(np.uint8), GGMLType.F64, (1, 32))) as file:
            assert [problem.tensor.name for problem in check_tensors(file)] == ["t"]
