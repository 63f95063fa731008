"""Attention with grouped heads against float64 numpy, and bits that must not depend on anything else.

Caches of every format, and appending, are compared with the reference backend in `tests/backends`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hybrid.kernels import cpu

BLOCK, KEY_BLOCK = 64, 128
EPS = float(np.finfo(np.float32).eps)


def address(a: np.ndarray) -> int:
    assert a.flags.c_contiguous
    return a.ctypes.data


class World:
    """Sequences of (length, new tokens) over one paged cache, NaN wherever nothing was stored."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        lengths: Sequence[tuple[int, int]],
        seed: int = 0,
        fmt: str = "f16",
    ) -> None:
        rng = np.random.default_rng(seed)
        self.fmt = fmt
        self.heads, self.kv_heads, self.dim, self.lengths = heads, kv_heads, dim, lengths
        counts = [-(-length // BLOCK) for length, _ in lengths]
        self.num_blocks = sum(counts) + 1
        blocks = rng.permutation(self.num_blocks).astype(np.int32)
        self.tables = np.split(blocks, np.cumsum(counts))[:-1]
        dtype = np.float32 if fmt == "f32" else np.float16
        self.caches = np.full((2, self.num_blocks * BLOCK, kv_heads, dim), np.nan, dtype)
        for s, (length, _) in enumerate(lengths):
            self.caches[:, self.slots(s)] = rng.standard_normal((2, length, kv_heads, dim))
        self.queries = [rng.standard_normal((new, heads, dim)).astype(np.float32) for _, new in lengths]
        self.scale = 2.0 / dim**0.5

    def slots(self, s: int) -> np.ndarray:
        position = np.arange(self.lengths[s][0])
        return self.tables[s][position // BLOCK].astype(np.int64) * BLOCK + position % BLOCK

    def run(self, parts: Sequence[tuple[int, int, int]], threads: int = 2) -> np.ndarray:
        """One call on new tokens `first:stop` of sequence `s` for each (s, first, stop)."""
        q = np.concatenate([self.queries[s][a:b] for s, a, b in parts])
        firsts = [self.lengths[s][0] - self.lengths[s][1] for s, _, _ in parts]
        positions = np.concatenate(
            [np.arange(first + a, first + b) for first, (_, a, b) in zip(firsts, parts, strict=True)]
        ).astype(np.int32)
        starts = np.cumsum([0] + [b - a for _, a, b in parts]).astype(np.int32)
        lens = np.array([first + b for first, (_, _, b) in zip(firsts, parts, strict=True)], np.int32)
        tables = np.full((len(parts), max(map(len, self.tables))), -1, np.int32)
        for row, (s, _, _) in zip(tables, parts, strict=True):
            row[: len(self.tables[s])] = self.tables[s]
        out = np.full_like(q, np.nan)
        cpu.fill_scratch(0xFF)
        cpu.gqa_attention(
            cpu.ThreadPool(threads, []), address(q), len(q), self.heads, self.kv_heads, self.dim,
            address(self.caches[0]), address(self.caches[1]), self.fmt, self.num_blocks, len(parts),
            address(positions), address(starts), address(lens), address(tables), tables.shape[1], self.scale,
            address(out),
        )  # fmt: skip
        return out

    def run_all(self, threads: int = 2) -> np.ndarray:
        return self.run([(s, 0, new) for s, (_, new) in enumerate(self.lengths)], threads)

    def check(self, out: np.ndarray) -> None:
        rows = iter(out)
        for s, (length, new) in enumerate(self.lengths):
            keys, values = self.caches[:, self.slots(s)].astype(np.float64)
            for i in range(new):
                seen, found = length - new + i + 1, next(rows)
                for h in range(self.heads):
                    kv = h // (self.heads // self.kv_heads)
                    self.check_row(found[h], self.queries[s][i, h], keys[:seen, kv], values[:seen, kv])

    def check_row(self, found: np.ndarray, q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        q = q.astype(np.float64)
        scores = keys @ q * self.scale
        p = np.exp(scores - scores.max())
        p /= p.sum()
        largest = np.abs(values).max()
        error, units = self.score_error(q, keys, scores), 0.0
        if self.fmt != "f32":
            # Half a unit of a value, and of every weight in a block of keys.
            units = largest * 0.51 * (1 / 4095 + KEY_BLOCK * (1 / 32767 + 1 / (2**19 - KEY_BLOCK)))
        bound = largest * (np.expm1(2 * error.max()) + EPS * (KEY_BLOCK + 60)) + units
        assert (np.abs(found - p @ values) <= bound).all()

    def score_error(self, q: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> np.ndarray:
        if self.fmt == "f32":  # half an ulp for every column
            return EPS * (self.dim / 2 + 8) * (np.abs(keys) @ np.abs(q)) * self.scale
        # Half a unit of a key (12 bits of its largest number) and of the query (its words add up to 2^19).
        key_error = 0.51 * np.abs(keys).max(-1) / 4095
        query_error = 0.51 * max(np.abs(q).sum() / (2**19 - 2**15), np.abs(q).max() / 32767)
        error = np.abs(q).sum() * key_error + np.abs(keys).sum(-1) * query_error
        return (error + self.dim * key_error * query_error) * self.scale + 8 * EPS * np.abs(scores)


@pytest.mark.parametrize("fmt", ["f32", "f16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(1, 1, 64), (8, 2, 128), (6, 6, 40), (20, 1, 96), (40, 2, 64)]
)
def test_matches_float64(isa: str, heads: int, kv_heads: int, dim: int, fmt: str) -> None:
    world = World(heads, kv_heads, dim, [(1, 1), (65, 3), (300, 2)], fmt=fmt)
    world.check(world.run_all())


@pytest.mark.parametrize("length", [1, 63, 64, 127, 128, 129, 511, 512, 513, 1100])
def test_sequence_lengths(isa: str, length: int) -> None:
    world = World(4, 2, 64, [(length, 1)], seed=length)
    world.check(world.run_all())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (34, 2)])
def test_bits_do_not_depend_on_threads_chunks_or_mates(isa: str, heads: int, kv_heads: int) -> None:
    world = World(heads, kv_heads, 64, [(577, 70), (64, 64), (200, 1)])
    whole = world.run_all()
    assert not np.isnan(whole).any()
    for threads in (1, 3):
        np.testing.assert_array_equal(world.run_all(threads), whole)
    for first, stop in [(0, 1), (1, 18), (18, 69), (69, 70)]:
        np.testing.assert_array_equal(world.run([(0, first, stop)]), whole[first:stop])
    other_order = world.run([(2, 0, 1), (1, 5, 64), (0, 3, 9)])
    expected = np.concatenate([whole[134:135], whole[75:134], whole[3:9]])
    np.testing.assert_array_equal(other_order, expected)


@pytest.mark.usefixtures("restored_isa")
@pytest.mark.parametrize("fmt", ["f32", "f16"])
def test_isas_give_equal_bits(fmt: str) -> None:
    world = World(10, 2, 96, [(600, 3), (64, 1)], fmt=fmt)
    outs = []
    for name in cpu.supported_isas():
        cpu.select_isa(name)
        outs.append(world.run_all())
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("fmt", ["f32", "f16"])
@pytest.mark.parametrize("which", [0, 1])
def test_later_tokens_that_are_nan_do_not_reach_earlier_ones(isa: str, which: int, fmt: str) -> None:
    world = World(4, 2, 64, [(70, 6)], fmt=fmt)
    clean = world.run_all()
    world.caches[which, world.slots(0)[67:]] = np.nan
    np.testing.assert_array_equal(world.run_all()[:3], clean[:3])
    assert np.isnan(world.run_all()[3:]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, r"gqa_attention: every key head needs the same number .* found 4 and 3 heads"),
        ({"num_kv_heads": 0}, r"found 4 and 0 heads"),
        ({"head_dim": 0}, r"at least one block and one column; found 4 blocks, head_dim 0"),
        ({"cache_format": "q8_0", "head_dim": 40}, r"a head_dim that is a multiple of 32, found 40"),
        ({"block_table_stride": 1}, r"gqa_attention: sequence 0 needs 2 blocks; its block table has 1"),
        ({"num_tokens": -1}, r"`num_tokens` must be at least 0, found -1"),
        ({"values": 0}, r"the address of `values` is null"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    floats, out = np.zeros(1 << 15, np.float32), np.zeros(128, np.float32)
    ints = {
        "positions": np.array([69], np.int32),
        "query_start": np.array([0, 1], np.int32),
        "seq_lens": np.array([70], np.int32),
        "block_tables": np.array([2, 1], np.int32),
    }
    arguments: dict[str, object] = {
        "pool": cpu.ThreadPool(1, []), "q": address(floats), "num_tokens": 1, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 32, "keys": address(floats), "values": address(floats),
        "cache_format": "f16", "num_blocks": 4, "num_sequences": 1, "block_table_stride": 2, "scale": 1.0,
        "out": address(out),
    }  # fmt: skip
    arguments |= {name: address(a) for name, a in ints.items()} | change
    with pytest.raises(ValueError, match=message):
        cpu.gqa_attention(**arguments)


def test_append_refuses_what_does_not_fit() -> None:
    floats, zero = np.zeros(4096, np.float32), np.zeros(1, np.int32)
    a = address(floats)

    def call(rope_dim: int, positions: np.ndarray, slots: np.ndarray) -> None:
        cpu.gqa_append(
            cpu.ThreadPool(1, []), a, 1, 2, 1, 32, a, a, a, rope_dim, 64, False, a, a, "f16", 1,
            address(positions), address(slots),
        )  # fmt: skip

    bad = np.array([64], np.int32)
    call(32, zero, zero)
    with pytest.raises(ValueError, match="rope_dim must be even and at most head_dim 32, found 34"):
        call(34, zero, zero)
    with pytest.raises(ValueError, match="token 0 has position 64; the rotary table covers 64"):
        call(32, bad, zero)
    with pytest.raises(ValueError, match="stored at slot 64; the cache has 64 slots"):
        call(32, zero, bad)
