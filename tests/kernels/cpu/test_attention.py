"""Latent attention and cache writes against float64 numpy, and bits that must not depend on anything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hybrid.kernels import cpu

BLOCK = 64
EPS = float(np.finfo(np.float32).eps)
FORMATS = ["f32", "f16", "bf16", "q8_0"]
SCALE_BLOCK = 32
# Of fixed-point words, as `ops_table.h` has them: what caches of other formats than f32 are multiplied in.
KEY_BLOCK, WORD_LIMIT, KEY_LIMIT = 128, 32767, 4095
QUERY_SUM, WEIGHT_SUM = 2**19 - 2**15, 2**19 - 128


def address(a: np.ndarray) -> int:
    assert a.flags.c_contiguous
    return a.ctypes.data


def encode(x: np.ndarray, fmt: str) -> np.ndarray:
    """float32 to the cache's element type (bf16 as uint16), rounded to nearest even."""
    if fmt == "bf16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return x.astype(np.float16 if fmt == "f16" else np.float32)


def decode(x: np.ndarray, fmt: str) -> np.ndarray:
    if fmt == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def encode_q8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 ``[n, width]`` to int8 codes and float16 scales ``[n, ceil(width / 32)]``."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % SCALE_BLOCK))).reshape(len(x), -1, SCALE_BLOCK)
    scales = (np.abs(blocks).max(-1) / np.float32(127)).astype(np.float16)
    wide = scales.astype(np.float32)[..., None]
    codes = np.rint(np.divide(blocks, wide, where=wide > 0, out=np.zeros_like(blocks)))
    return codes.clip(-127, 127).astype(np.int8).reshape(len(x), -1)[:, : x.shape[1]], scales


class Cache:
    """Rows of a cache as the kernels lay them out, NaN until they are stored."""

    def __init__(self, num_slots: int, width: int, fmt: str) -> None:
        self.fmt = fmt
        num_scales = -(-width // SCALE_BLOCK)
        if fmt == "q8_0":
            self.data = np.zeros(num_slots * (width + 2 * num_scales), np.uint8)
            self.rows: np.ndarray = self.data[: num_slots * width].view(np.int8).reshape(-1, width)
            self.scales = self.data[num_slots * width :].view(np.float16).reshape(-1, num_scales)
            self.scales[:] = np.nan
        else:
            self.data = self.rows = encode(np.full((num_slots, width), np.nan, np.float32), fmt)

    def store(self, slots: np.ndarray, rows: np.ndarray) -> None:
        if self.fmt == "q8_0":
            self.rows[slots], self.scales[slots] = encode_q8(rows)
        else:
            self.rows[slots] = encode(rows, self.fmt)

    def read(self, slots: np.ndarray) -> np.ndarray:
        if self.fmt != "q8_0":
            return decode(self.rows[slots], self.fmt)
        scales = np.repeat(self.scales[slots].astype(np.float32), SCALE_BLOCK, -1)
        return self.rows[slots].astype(np.float32) * scales[:, : self.rows.shape[1]]


@dataclass
class Shape:
    heads: int
    latent: int
    rope: int
    fmt: str = "f16"
    nope: int = 24

    @property
    def head_dim(self) -> int:
        return self.nope + self.rope


@dataclass
class Sequence_:
    """A sequence in the cache: its blocks, and queries for its last `new` tokens."""

    length: int
    blocks: np.ndarray
    rows: np.ndarray  # decoded cache rows [length, latent + rope]
    q: np.ndarray  # [new, heads, head_dim]
    q_latent: np.ndarray  # [new, heads, latent]

    @property
    def new(self) -> int:
        return len(self.q)


class World:
    """Sequences over one paged cache with shuffled blocks and NaN wherever nothing was stored."""

    def __init__(self, shape: Shape, lengths: Sequence[tuple[int, int]], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape = shape
        counts = [-(-length // BLOCK) for length, _ in lengths]
        self.num_blocks = sum(counts) + 2
        width = shape.latent + shape.rope
        cache = Cache(self.num_blocks * BLOCK, width, shape.fmt)
        ids = iter(rng.permutation(self.num_blocks))
        self.sequences = []
        for (length, new), count in zip(lengths, counts, strict=True):
            blocks = np.array([next(ids) for _ in range(count)], np.int32)
            position = np.arange(length)
            slots = blocks[position // BLOCK].astype(np.int64) * BLOCK + position % BLOCK
            cache.store(slots, rng.standard_normal((length, width)).astype(np.float32))
            q = rng.standard_normal((new, shape.heads, shape.head_dim)).astype(np.float32)
            q_latent = rng.standard_normal((new, shape.heads, shape.latent)).astype(np.float32)
            self.sequences.append(Sequence_(length, blocks, cache.read(slots), q, q_latent))
        self.cache = cache
        self.scale = 2.0 / width**0.5

    def run(self, parts: Sequence[tuple[int, int, int]], threads: int = 2) -> np.ndarray:
        """One call on query tokens `first:stop` of sequence `s` for each (s, first, stop)."""
        shape, chosen = self.shape, [(self.sequences[s], a, b) for s, a, b in parts]
        q = np.concatenate([s.q[a:b] for s, a, b in chosen])
        q_latent = np.concatenate([s.q_latent[a:b] for s, a, b in chosen])
        positions = np.concatenate([np.arange(a, b) + s.length - s.new for s, a, b in chosen]).astype(
            np.int32
        )
        query_start = np.cumsum([0] + [b - a for _, a, b in chosen]).astype(np.int32)
        seq_lens = np.array([s.length - s.new + b for s, _, b in chosen], np.int32)
        tables = np.full((len(chosen), max(len(s.blocks) for s, _, _ in chosen) + 1), -1, np.int32)
        for row, (s, _, _) in zip(tables, chosen, strict=True):
            row[: len(s.blocks)] = s.blocks
        out = np.full((len(q), shape.heads, shape.latent), np.nan, np.float32)
        cpu.fill_scratch(0xFF)
        cpu.mla_attention(
            cpu.ThreadPool(threads, []), address(q), address(q_latent), len(q), shape.heads, shape.head_dim,
            address(self.cache.data), shape.fmt, self.num_blocks, shape.latent, shape.rope, len(chosen),
            address(positions), address(query_start), address(seq_lens), address(tables), tables.shape[1],
            self.scale, address(out),
        )  # fmt: skip
        return out

    def run_all(self, threads: int = 2) -> np.ndarray:
        return self.run([(i, 0, s.new) for i, s in enumerate(self.sequences)], threads)

    def check(self, out: np.ndarray) -> None:
        start = 0
        for s in self.sequences:
            for i in range(s.new):
                self.check_token(out[start + i], s, i)
            start += s.new

    def check_token(self, out: np.ndarray, s: Sequence_, i: int) -> None:
        expected, bound = self.expected(s, i)
        assert (np.abs(out - expected) <= bound).all()

    def expected(self, s: Sequence_, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Contexts ``[heads, latent]`` in float64, and what the kernels may be off by."""
        latent = self.shape.latent
        keys = s.rows[: s.length - s.new + i + 1].astype(np.float64)
        parts = [(s.q_latent[i], keys[:, :latent]), (s.q[i, :, self.shape.nope :], keys[:, latent:])]
        scores = sum(q.astype(np.float64) @ k.T for q, k in parts) * self.scale
        score_error = (
            sum(score_errors(q.astype(np.float64), k, self.shape.fmt) for q, k in parts) * self.scale
        )
        return attend(scores, score_error, parts[0][1], self.shape.fmt)


def key_units(keys: np.ndarray, fmt: str) -> tuple[np.ndarray, float]:
    """Fixed-point units of rows, and how many of them a number may be off: a half, and in q8_0 a quarter for
    the ratio of scales."""
    return np.abs(keys).max(-1) * (1 + 2**-10) / KEY_LIMIT, 0.80 if fmt == "q8_0" else 0.51


def score_errors(q: np.ndarray, keys: np.ndarray, fmt: str) -> np.ndarray:
    """Of products ``[heads, keys]``: half a unit of every factor, and roundings of the float steps.
    In floats, half an ulp for every column."""
    if fmt == "f32":
        return EPS * (keys.shape[1] / 2 + 8) * (np.abs(q) @ np.abs(keys).T)
    units, share = key_units(keys, fmt)
    key_error = (units * share)[None]
    query_error = np.maximum(np.abs(q).sum(-1) / QUERY_SUM, np.abs(q).max(-1) / WORD_LIMIT)[:, None] * 0.51
    terms = np.abs(q).sum(-1)[:, None] * key_error + np.abs(keys).sum(-1)[None] * query_error
    return terms + keys.shape[1] * key_error * query_error + 8 * EPS * np.abs(q @ keys.T)


def attend(
    scores: np.ndarray, score_error: np.ndarray, values: np.ndarray, fmt: str
) -> tuple[np.ndarray, np.ndarray]:
    """Contexts ``[heads, dim]`` of scores ``[heads, keys]`` in float64, and the bound of their error."""
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    # An error of a score is a relative error of its weight and of the sum.
    relative = np.expm1(2 * score_error.max(-1, keepdims=True)) + EPS * (KEY_BLOCK + 60)
    bound = relative * (p @ np.abs(values))
    if fmt == "f32":
        return p @ values, bound
    units, share = key_units(values, fmt)
    bound += (p @ (units * share))[:, None]
    for first in range(0, len(values), KEY_BLOCK):
        block = slice(first, first + KEY_BLOCK)
        weights = p[:, block] * units[block]
        unit = np.maximum(weights.max(-1) / WORD_LIMIT, weights.sum(-1) / WEIGHT_SUM)
        words = np.abs(values[block] / np.maximum(units[block], 1e-300)[:, None]).sum(0)
        bound += 0.51 * unit[:, None] * words
    return p @ values, bound


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("heads", "latent", "rope"), [(1, 64, 16), (4, 256, 32), (20, 64, 64), (3, 96, 6)])
def test_matches_float64(isa: str, heads: int, latent: int, rope: int, fmt: str) -> None:
    world = World(Shape(heads, latent, rope, fmt), [(1, 1), (65, 3), (130, 2)])
    world.check(world.run_all())


@pytest.mark.parametrize("length", [1, 63, 64, 65, 511, 512, 513, 1100])
def test_sequence_lengths(isa: str, length: int) -> None:
    world = World(Shape(4, 64, 16), [(length, 1)], seed=length)
    world.check(world.run_all())


@pytest.mark.parametrize("new", [1, 2, 3, 17, 65])
def test_token_counts(isa: str, new: int) -> None:
    world = World(Shape(4, 64, 16), [(530, new)], seed=new)
    world.check(world.run_all())


@pytest.mark.parametrize(("fmt", "error"), [("f32", 2e-6), ("f16", 1e-3), ("q8_0", 1e-3)])
def test_model_shape(fmt: str, error: float) -> None:
    world = World(Shape(16, 512, 64, fmt, nope=128), [(1100, 3), (513, 1)])
    out = world.run_all()
    world.check(out)
    # Units and roundings err either way, so that sums are far better than the bound: scores of about 2 take
    # random steps of EPS / 5 of the sum so far at each of 576 columns, 8e-7 in all.
    expected, _ = world.expected(world.sequences[0], 0)
    assert np.sqrt(((out[0] - expected) ** 2).mean() / (expected**2).mean()) < error


@pytest.mark.parametrize("fmt", ["f32", "bf16"])
def test_numbers_of_all_sizes_in_one_row(isa: str, fmt: str) -> None:
    # A query or a key of one large number comes to the limit of words, one of equal numbers to that of sums.
    world = World(Shape(4, 64, 16, fmt), [(300, 4)])
    s = world.sequences[0]
    s.q_latent[0], s.q_latent[0, :, 5] = 1e-3, 1e4
    s.q_latent[1], s.q_latent[2], s.q_latent[3] = 3.0, 0.0, 1e-38
    s.rows[:100, :64], s.rows[100:200, 7] = 2.5, 1e5
    slots = s.blocks[np.arange(300) // BLOCK].astype(np.int64) * BLOCK + np.arange(300) % BLOCK
    world.cache.store(slots, s.rows)
    s.rows = world.cache.read(slots)
    world.scale = 1e-9
    world.check(world.run_all())


@pytest.mark.usefixtures("restored_isa")
@pytest.mark.parametrize("fmt", ["f32", "bf16", "q8_0"])
def test_isas_give_equal_bits(fmt: str) -> None:
    world = World(Shape(5, 96, 16, fmt), [(600, 3), (64, 1)])
    outs = []
    for name in cpu.supported_isas():
        cpu.select_isa(name)
        outs.append(world.run_all())
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize(
    ("heads", "latent", "fmt"), [(1, 64, "f16"), (20, 64, "f32"), (20, 64, "f16"), (16, 256, "f16")]
)
def test_bits_do_not_depend_on_threads_chunks_or_mates(isa: str, heads: int, latent: int, fmt: str) -> None:
    world = World(Shape(heads, latent, 16, fmt), [(577, 70), (64, 64), (200, 1)])
    whole = world.run_all()
    assert not np.isnan(whole).any()
    for threads in (1, 3):
        np.testing.assert_array_equal(world.run_all(threads), whole)
    for first, stop in [(0, 1), (1, 18), (18, 69), (69, 70)]:
        np.testing.assert_array_equal(world.run([(0, first, stop)]), whole[first:stop])
    other_order = world.run([(2, 0, 1), (1, 5, 64), (0, 3, 9)])
    expected = np.concatenate([whole[134:135], whole[75:134], whole[3:9]])
    np.testing.assert_array_equal(other_order, expected)


def test_splits_merged_by_one_worker_or_apart_give_equal_bits() -> None:
    # Enough tokens that the states of all splits together pass 32 MiB.
    world = World(Shape(20, 512, 16), [(1090, 300)])
    whole = world.run_all()
    for token in (0, 233, 299):
        np.testing.assert_array_equal(world.run([(0, token, token + 1)]), whole[token : token + 1])


@pytest.mark.parametrize("fmt", ["f32", "f16"])
def test_later_tokens_that_are_nan_do_not_reach_earlier_ones(isa: str, fmt: str) -> None:
    world = World(Shape(4, 64, 16, fmt), [(70, 6)])
    s = world.sequences[0]
    clean = world.run_all()
    world.cache.rows[int(s.blocks[1]) * BLOCK + 3 :][:3] = np.nan  # positions 67, 68, 69
    np.testing.assert_array_equal(world.run_all()[:3], clean[:3])
    assert np.isnan(world.run_all()[3:]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": 70}, r"token 0 has position 70 in sequence 0, which has 70 tokens"),
        ({"positions": -1}, r"token 0 has position -1"),
        ({"block_tables": 99}, r"entry 0 of the block table of sequence 0 is 99; the cache has 4 blocks"),
        ({"block_tables": -1}, r"entry 0 of the block table of sequence 0 is -1"),
        ({"query_start": 1}, r"query_start must ascend from 0 to 1"),
        ({"block_table_stride": 1}, r"needs 2 blocks; its block table has 1"),
        ({"cache_format": "q4"}, r"cache format 'q4' is unknown; choose f32, f16, bf16 or q8_0"),
        ({"cache_format": "q8_0", "latent_dim": 40}, r"a latent_dim that is a multiple of 32, found 40"),
        ({"rope_dim": 3}, r"an even rope_dim"),
        ({"num_heads": 0}, r"`num_heads` must be at least 1, found 0"),
        ({"num_tokens": -1}, r"`num_tokens` must be at least 0, found -1"),
        ({"q": 0}, r"the address of `q` is null"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    floats = np.zeros(1 << 16, np.float32)
    arrays = {
        "positions": np.array([69], np.int32),
        "query_start": np.array([0, 1], np.int32),
        "seq_lens": np.array([70], np.int32),
        "block_tables": np.array([2, 1], np.int32),
    }
    arguments: dict[str, object] = {
        "pool": cpu.ThreadPool(1, []), "q": address(floats), "q_latent": address(floats), "num_tokens": 1,
        "num_heads": 2, "head_dim": 32, "cache": address(floats), "cache_format": "f16", "num_blocks": 4,
        "latent_dim": 64, "rope_dim": 16, "num_sequences": 1, "block_table_stride": 2, "scale": 1.0,
        "out": address(np.zeros(128, np.float32)),
    }  # fmt: skip
    for name, value in change.items():
        if name in arrays:
            arrays[name][0] = value
        else:
            arguments[name] = value
    arguments |= {name: address(a) for name, a in arrays.items()}
    with pytest.raises(ValueError, match=message):
        cpu.mla_attention(**arguments)


def append(shape: Shape, tokens: int, threads: int = 2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(tokens)
    width, eps = shape.latent + shape.rope, 1e-6
    q = rng.standard_normal((tokens, shape.heads, shape.head_dim)).astype(np.float32)
    kv = rng.standard_normal((tokens, width)).astype(np.float32)
    norm = rng.standard_normal(shape.latent).astype(np.float32)
    angle = rng.uniform(0, 6, (200, shape.rope // 2))
    rope = (np.stack([np.cos(angle), np.sin(angle)], -1) * 1.1).astype(np.float32)
    positions = rng.integers(0, 200, tokens).astype(np.int32)
    slots = rng.permutation(2 * BLOCK)[:tokens].astype(np.int32)
    slots[1::5] = -1
    cache = Cache(2 * BLOCK, width, shape.fmt)
    rotated, kv_before = q.copy(), kv.copy()
    cpu.fill_scratch(0xFF)
    cpu.mla_append(
        cpu.ThreadPool(threads, []), address(rotated), tokens, shape.heads, shape.head_dim, address(kv),
        address(norm), eps, address(rope), 200, address(cache.data), shape.fmt, 2, shape.latent, shape.rope,
        address(positions), address(slots),
    )  # fmt: skip
    np.testing.assert_array_equal(kv, kv_before)
    return q, rotated, kv, norm, rope[positions].astype(np.float64), slots, cache.read(np.arange(2 * BLOCK))


def rotate(x: np.ndarray, rope: np.ndarray) -> np.ndarray:
    """Complex product of interleaved pairs: x [..., dim], rope [..., dim / 2, 2]."""
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (rope[..., 0] + 1j * rope[..., 1])
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("heads", "latent", "rope"), [(1, 64, 16), (16, 512, 64), (4, 96, 6)])
@pytest.mark.parametrize("tokens", [1, 65])
def test_append_matches_float64(isa: str, heads: int, latent: int, rope: int, fmt: str, tokens: int) -> None:
    shape = Shape(heads, latent, rope, fmt)
    q, rotated, kv, norm, table, slots, cache = append(shape, tokens)
    np.testing.assert_array_equal(rotated[..., : shape.nope], q[..., : shape.nope])
    tail = q[..., shape.nope :]
    np.testing.assert_allclose(
        rotated[..., shape.nope :],
        rotate(tail, table[:, None]),
        rtol=0,
        atol=3 * EPS * 1.1 * np.abs(tail).max(),
    )
    latents = kv[:, :latent].astype(np.float64)
    latents = latents / np.sqrt((latents**2).mean(-1, keepdims=True) + 1e-6) * norm
    wanted = np.concatenate([latents, rotate(kv[:, latent:], table)], -1)
    stored = slots >= 0
    # Half a step of q8_0, whose steps are a 127th of a block's largest number, rounded to half.
    rounding = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": (1 + 2.0**-10) / 254}[fmt]
    bound = (rounding + EPS * (latent / 64 + 10)) * np.abs(wanted).max()
    np.testing.assert_allclose(cache[slots[stored]], wanted[stored], rtol=0, atol=bound)
    untouched = np.setdiff1d(np.arange(len(cache)), slots[stored])
    assert np.isnan(cache[untouched]).all()


@pytest.mark.usefixtures("restored_isa")
@pytest.mark.parametrize("fmt", FORMATS)
def test_append_bits_do_not_depend_on_threads_or_isa(fmt: str) -> None:
    shape, results = Shape(16, 512, 64, fmt), []
    for name in cpu.supported_isas():
        cpu.select_isa(name)
        results += [append(shape, 100, threads) for threads in (1, 2, 3)]
    for other in results[1:]:
        np.testing.assert_array_equal(other[1], results[0][1])
        np.testing.assert_array_equal(other[-1], results[0][-1])


@pytest.mark.parametrize(("fmt", "largest"), [("f16", 65504.0), ("bf16", 3.3e38)])
def test_cache_rounds_to_nearest_even(isa: str, fmt: str, largest: float) -> None:
    # Rotary columns with the angle zero go to the cache as they are.
    rng = np.random.default_rng(3)
    values = rng.standard_normal(4096) * 10.0 ** rng.uniform(-9, 4, 4096)
    special = [
        0.0,
        -0.0,
        6e-8,
        -3e-8,
        2.98e-8,
        6.1e-5,
        65519.0,
        65520.0,
        1e30,
        largest,
        np.inf,
        -np.inf,
        np.nan,
    ]
    halves = (np.arange(0x3800, 0x3900, dtype=np.uint16).view(np.float16)).astype(np.float64)
    ties = (halves[:-1] + halves[1:]) / 2
    kv = np.concatenate([values, special, ties]).astype(np.float32)
    kv = np.concatenate([np.ones(1, np.float32), kv, np.zeros((-len(kv)) % 2, np.float32)])
    rope_dim, ints = len(kv) - 1, np.zeros(1, np.int32)
    rope = np.tile(np.array([1.0, 0.0], np.float32), (rope_dim // 2, 1))
    cache, q = np.zeros((BLOCK, len(kv)), np.uint16), np.zeros(rope_dim, np.float32)
    cpu.mla_append(
        cpu.ThreadPool(1, []), address(q), 1, 1, rope_dim, address(kv), address(np.ones(1, np.float32)), 1e-6,
        address(rope), 1, address(cache), fmt, 1, 1, rope_dim, address(ints), address(ints),
    )  # fmt: skip
    finite = np.isfinite(kv[1:]) & np.isfinite(np.concatenate([kv[2::2, None], kv[1::2, None]], 1).ravel())
    with np.errstate(over="ignore"):
        wanted = decode(encode(kv[1:].copy(), fmt), fmt)
    got = decode(cache[0, 1:].view(np.float16) if fmt == "f16" else cache[0, 1:], fmt)
    np.testing.assert_array_equal(got[finite], wanted[finite])


def test_cache_of_codes_and_scales(isa: str) -> None:
    # Rotary columns with the angle zero go to the cache as they are; the last block has 14 of 32.
    rng = np.random.default_rng(4)
    kv = (rng.standard_normal(32 + 302) * 10.0 ** rng.uniform(-9, 4, 334)).astype(np.float32)
    kv[64:96] = 0.0
    kv[96:128] = 1e-7
    kv[128:160] = np.arange(32) - 15.5  # ties
    kv[160], kv[192], kv[224] = np.nan, np.inf, -1e30
    rope = np.tile(np.array([1.0, 0.0], np.float32), (151, 1))
    cache, q, ints = Cache(BLOCK, 334, "q8_0"), np.zeros(302, np.float32), np.zeros(1, np.int32)
    cpu.mla_append(
        cpu.ThreadPool(1, []), address(q), 1, 1, 302, address(kv), address(np.ones(32, np.float32)), 1e-6,
        address(rope), 1, address(cache.data), "q8_0", 1, 32, 302, address(ints), address(ints),
    )  # fmt: skip
    with np.errstate(over="ignore", invalid="ignore"):
        codes, scales = encode_q8(kv[None])
        finite = [index for index in range(1, 11) if index not in (5, 6, 7)]
        np.testing.assert_array_equal(cache.scales[0, finite], scales[0, finite])
        for index in finite:
            np.testing.assert_array_equal(
                cache.rows[0, 32 * index : 32 * index + 32], codes[0, 32 * index : 32 * index + 32]
            )
        assert np.isnan(cache.read(np.array([0]))[0, 160:256]).all()


def test_append_refuses_slots_and_positions_out_of_range() -> None:
    floats, zero = np.zeros(4096, np.float32), np.zeros(1, np.int32)
    a, bad = address(floats), np.array([64], np.int32)

    def call(positions: np.ndarray, slots: np.ndarray) -> None:
        cpu.mla_append(
            cpu.ThreadPool(1, []), a, 1, 1, 32, a, a, 1e-6, a, 64, a, "f16", 1, 16, 16,
            address(positions), address(slots),
        )  # fmt: skip

    call(zero, zero)
    with pytest.raises(ValueError, match="token 0 has position 64; the rotary table covers 64"):
        call(bad, zero)
    with pytest.raises(ValueError, match="stored at slot 64; the cache has 64 slots"):
        call(zero, bad)
