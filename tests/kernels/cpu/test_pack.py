"""The packed layout against a numpy unpacking written from the GGUF block structures alone."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gguf.quants import IQ1_S
from hybrid.kernels import cpu

from hybrid.gguf import TRAITS, GGMLType

# Fields of a GGUF block in file order: (name, bytes). The names are those of ggml-common.h.
BLOCK_FIELDS = {
    "F32": [("v", 4)],
    "F16": [("v", 2)],
    "BF16": [("v", 4)],
    "Q4_0": [("d", 2), ("qs", 16)],
    "Q4_1": [("d", 2), ("m", 2), ("qs", 16)],
    "Q5_0": [("d", 2), ("qh5", 4), ("qs", 16)],
    "Q5_1": [("d", 2), ("m", 2), ("qh5", 4), ("qs", 16)],
    "Q8_0": [("d", 2), ("qs", 32)],
    "Q2_K": [("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2)],
    "Q3_K": [("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)],
    "Q4_K": [("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128)],
    "Q5_K": [("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128)],
    "Q6_K": [("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)],
    "IQ2_XXS": [("d", 2), ("qs", 64)],
    "IQ2_XS": [("d", 2), ("qs", 64), ("scales", 8)],
    "IQ3_XXS": [("d", 2), ("qs", 64), ("signs", 32)],
    "IQ1_S": [("d", 2), ("qs", 32), ("qh", 16)],
    "IQ4_NL": [("d", 2), ("qs", 16)],
    "IQ3_S": [("d", 2), ("qs", 64), ("qh", 8), ("signs", 32), ("scales", 4)],
    "IQ2_S": [("d", 2), ("qs", 64), ("qh", 8), ("scales", 8)],
    "IQ4_XS": [("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128)],
    "IQ1_M": [("qs", 32), ("qh", 16), ("scales", 8)],
    "TQ1_0": [("qs", 48), ("qh", 4), ("d", 2)],
    "TQ2_0": [("qs", 64), ("d", 2)],
    "MXFP4": [("e", 1), ("qs", 16)],
}
# Fields in packed order with the bytes that stay together.
PACKED_FIELDS = {
    "F32": [("v", 4)],
    "F16": [("v", 2)],
    "BF16": [("v", 4)],
    "Q4_0": [("qs", 4), ("d", 2)],
    "Q4_1": [("qs", 4), ("d", 2), ("m", 2)],
    "Q5_0": [("qs", 4), ("qh5", 4), ("d", 2)],
    "Q5_1": [("qs", 4), ("qh5", 4), ("d", 2), ("m", 2)],
    "Q8_0": [("qs", 4), ("d", 2)],
    "Q2_K": [("qs", 4), ("scales", 4), ("d", 2), ("dmin", 2)],
    "Q3_K": [("qs", 4), ("hmask", 4), ("scales", 4), ("d", 2)],
    "Q4_K": [("qs", 4), ("scales", 4), ("d", 2), ("dmin", 2)],
    "Q5_K": [("qs", 4), ("qh", 4), ("scales", 4), ("d", 2), ("dmin", 2)],
    "Q6_K": [("ql", 4), ("qh", 4), ("scales", 4), ("d", 2)],
    "IQ2_XXS": [("qs", 4), ("d", 2)],
    "IQ2_XS": [("qs", 4), ("scales", 4), ("d", 2)],
    "IQ3_XXS": [("qs", 4), ("signs", 4), ("d", 2)],
    "IQ4_NL": [("qs", 4), ("d", 2)],
    "IQ3_S": [("qs", 4), ("qh", 4), ("signs", 4), ("scales", 4), ("d", 2)],
    "IQ2_S": [("qs", 4), ("qh", 4), ("scales", 4), ("d", 2)],
    "IQ4_XS": [("qs", 4), ("scales_l", 4), ("scales_h", 2), ("d", 2)],
    "TQ1_0": [("qs", 4), ("qh", 4), ("d", 2)],
    "TQ2_0": [("qs", 4), ("d", 2)],
    "MXFP4": [("qs", 4), ("e", 1)],
}
RECODED_BYTES = {"IQ1_S": 920, "IQ1_M": 1024}  # of a block of 16 rows
FORMATS = sorted({row["format"] for row in cpu.kernel_rows()})


def packed_bytes(matrix: cpu.PackedMatrix) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * matrix.nbytes).from_address(matrix.address)).copy()


def restore_fifth_bits(words: np.ndarray) -> np.ndarray:
    """Bit 8c + m of the packed word is bit 4m + c of the file's."""
    bits = np.unpackbits(words, axis=-1, bitorder="little")
    c, m = np.divmod(np.arange(32), 8)
    out = np.empty_like(bits)
    out[..., 4 * m + c] = bits
    return np.packbits(out, axis=-1, bitorder="little")


def unpack(name: str, packed: np.ndarray, num_blocks: int) -> np.ndarray:
    """Packed groups to GGUF rows ``[groups * 16, num_blocks, block_bytes]``."""
    sizes = dict(BLOCK_FIELDS[name])
    if name in RECODED:
        rows = RECODED[name](packed.reshape(-1, RECODED_BYTES[name]))
        return rows.reshape(-1, num_blocks, 16, rows.shape[-1]).transpose(0, 2, 1, 3)
    group_blocks = packed.reshape(-1, num_blocks, 16 * sum(sizes.values()))
    fields, start = {}, 0
    for field, unit in PACKED_FIELDS[name]:
        count = sizes[field] // unit
        plane = group_blocks[..., start : start + 16 * sizes[field]].reshape(-1, num_blocks, count, 16, unit)
        values = plane.transpose(0, 3, 1, 2, 4).reshape(-1, num_blocks, sizes[field])
        fields[field] = restore_fifth_bits(values) if field == "qh5" else values
        start += 16 * sizes[field]
    return np.concatenate([fields[field] for field, _ in BLOCK_FIELDS[name]], axis=-1)


def unpack_trits(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``uint8`` [N, 13, 16, 4] -> 256 trits of each row ``[N, 16, 256]`` and four to spare."""
    values = planes.transpose(0, 2, 1, 3).reshape(-1, 16, 52).astype(np.uint16)
    digits = [((values * 3**n) % 256 * 3) >> 8 for n in range(5)]
    runs = [
        np.concatenate([digit[..., a:b] for digit in digits], axis=-1)
        for a, b in ((0, 32), (32, 48), (48, 52))
    ]
    trits = np.concatenate(runs, axis=-1).astype(np.uint8)
    return trits[..., :256], trits[..., 256:]


def grid_indices(trits: np.ndarray) -> np.ndarray:
    """Trits ``[..., 256]`` -> the indices into the code book of IQ1 that name eight of them each."""
    IQ1_S.init_grid()
    assert IQ1_S.grid is not None
    powers = 3 ** np.arange(8)
    numbers = (IQ1_S.grid.reshape(2048, 8).astype(np.int64) + 1) @ powers
    index_of = np.zeros(3**8, np.int64)
    index_of[numbers] = np.arange(2048)
    return index_of[trits.reshape(*trits.shape[:-1], 32, 8).astype(np.int64) @ powers]


def unpack_iq1_s(blocks: np.ndarray) -> np.ndarray:
    """Packed blocks ``[N, 920]`` -> GGUF blocks ``[N, 16, 50]``."""
    trits, free = unpack_trits(blocks[:, :832].reshape(-1, 13, 16, 4))
    index = grid_indices(trits).reshape(-1, 16, 8, 4)
    scales = blocks[:, 832:880].reshape(-1, 3, 16).astype(np.int64)
    scales = scales[:, 0] | scales[:, 1] << 8 | scales[:, 2] << 16
    early = np.concatenate([blocks[:, 880:888] & 15, blocks[:, 880:888] >> 4], axis=1)
    signs = np.concatenate([early[..., None] >> np.arange(4) & 1, free], axis=-1).astype(np.int64)
    qh = (index >> 8 << 3 * np.arange(4)).sum(-1)
    qh |= (scales[..., None] >> 3 * np.arange(8) & 7) << 12 | signs << 15
    d = blocks[:, 888:].reshape(-1, 16, 2)
    qs = index.astype(np.uint8).reshape(-1, 16, 32)
    return np.concatenate([d, qs, qh.astype("<u2").view(np.uint8).reshape(-1, 16, 16)], axis=-1)


def unpack_iq1_m(blocks: np.ndarray) -> np.ndarray:
    """Packed blocks ``[N, 1024]`` -> GGUF blocks ``[N, 16, 56]``."""
    trits, free = unpack_trits(blocks[:, :832].reshape(-1, 13, 16, 4))
    assert not free.any()
    index = grid_indices(trits)
    words = blocks[:, 832:].reshape(-1, 3, 16, 4)
    signs = np.unpackbits(words[:, 0], axis=-1, bitorder="little").reshape(-1, 16, 32)
    nibbles = (index >> 8 | signs.astype(np.int64) << 3).astype(np.uint8)
    qh = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    scales = words[:, 1:].transpose(0, 2, 1, 3).reshape(-1, 16, 8)
    return np.concatenate([index.astype(np.uint8), qh, scales], axis=-1)


RECODED = {"IQ1_S": unpack_iq1_s, "IQ1_M": unpack_iq1_m}


def test_every_format_is_described() -> None:
    assert set(FORMATS) == set(BLOCK_FIELDS) == set(PACKED_FIELDS) | set(RECODED)
    for name, size in RECODED_BYTES.items():
        assert 100 * size <= 115 * 16 * TRAITS[GGMLType[name]].block_bytes


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_layout_and_inverse(name: str, num_rows: int, pool: cpu.ThreadPool) -> None:
    kind = GGMLType[name]
    block_bytes = sum(size for _, size in BLOCK_FIELDS[name])
    block_cols = TRAITS[kind].block_size * block_bytes // TRAITS[kind].block_bytes  # BF16 packs pairs
    for num_blocks in (1, 2, 5):
        rng = np.random.default_rng(num_blocks)
        raw = rng.integers(0, 256, (2, num_rows, num_blocks, block_bytes), np.uint8)
        matrix = cpu.PackedMatrix(int(kind), 2, num_rows, num_blocks * block_cols)
        for b in range(2):
            matrix.pack_rows(pool, b, 0, num_rows, raw[b].ctypes.data)
        padded = -(-num_rows // 16) * 16
        group_block_bytes = RECODED_BYTES.get(name, 16 * block_bytes)
        assert matrix.nbytes == 2 * padded // 16 * num_blocks * group_block_bytes
        rows = unpack(name, packed_bytes(matrix), num_blocks).reshape(2, padded, num_blocks, block_bytes)
        np.testing.assert_array_equal(rows[:, :num_rows], raw)
        assert not rows[:, num_rows:].any()
        for b in range(2):
            back = np.full_like(raw[b], 0xA5)
            matrix.unpack_rows(b, 0, num_rows, back.ctypes.data)
            np.testing.assert_array_equal(back, raw[b])


def test_ranges_pack_and_unpack_alone(pool: cpu.ThreadPool) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (40, 144), np.uint8)
    matrix = cpu.PackedMatrix(GGMLType.Q4_K, 1, 40, 256)
    assert not packed_bytes(matrix).any()
    matrix.pack_rows(pool, 0, 32, 8, raw[32:].ctypes.data)
    matrix.pack_rows(pool, 0, 0, 32, raw.ctypes.data)
    matrix.pack_rows(pool, 0, 16, 0, raw.ctypes.data)
    back = np.zeros((24, 144), np.uint8)
    matrix.unpack_rows(0, 16, 24, back.ctypes.data)
    np.testing.assert_array_equal(back, raw[16:])


@pytest.mark.parametrize(
    ("batch_index", "row_start", "num_rows", "message"),
    [
        (2, 0, 16, "batch_index"),
        (-1, 0, 16, "batch_index"),
        (0, 8, 16, "row_start must be a multiple of 16"),
        (0, 0, 8, "num_rows must be a multiple of 16"),
        (0, 0, 41, "outside the matrix"),
        (0, 32, 9, "outside the matrix"),
        (0, -16, 16, "outside the matrix"),
        (0, 0, -16, "outside the matrix"),
        (0, 2**62, 2**62, "outside the matrix"),
    ],
)
def test_bad_ranges(
    pool: cpu.ThreadPool, batch_index: int, row_start: int, num_rows: int, message: str
) -> None:
    matrix = cpu.PackedMatrix(GGMLType.Q8_0, 2, 40, 64)
    raw = np.zeros(40 * 68, np.uint8)
    with pytest.raises(ValueError, match=message):
        matrix.pack_rows(pool, batch_index, row_start, num_rows, raw.ctypes.data)
    with pytest.raises(ValueError, match=message):
        matrix.unpack_rows(batch_index, row_start, num_rows, raw.ctypes.data)
    with pytest.raises(ValueError, match="null"):
        matrix.pack_rows(pool, 0, 0, 16, 0)


@pytest.mark.parametrize(
    ("kind", "batch", "rows", "cols", "message"),
    [
        (9999, 1, 16, 256, "ggml type 9999"),
        (GGMLType.Q4_K, 1, 16, 255, "blocks of 256"),
        (GGMLType.Q4_K, 0, 16, 256, "at least 1"),
        (GGMLType.Q4_K, 1, 0, 256, "at least 1"),
        (GGMLType.F32, 1, 16, -4, "at least 1"),
        (GGMLType.F32, 2**40, 2**40, 2**10, "overflows"),
        (GGMLType.F32, 1, 1, 2**62, "overflows"),
    ],
)
def test_bad_shapes(kind: int, batch: int, rows: int, cols: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.PackedMatrix(int(kind), batch, rows, cols)


def test_more_memory_than_there_is() -> None:
    with pytest.raises(MemoryError):
        cpu.PackedMatrix(GGMLType.F32, 1, 2**40, 2**18)
