"""Expert layers against a numpy model of their arithmetic, and bits that must not depend on anything else.

The model rounds activations to int8 exactly as the kernels do and computes the rest in float64. A code
of the hidden row may come out one off where float32 errors reach a rounding boundary; the model
finds those columns and allows for them, and for nothing else of that size. So that these stay few, the
float32 results of gate and up are taken from `linear`, after they were compared with float64 too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import TRAITS, GGMLType, dequantize, random_blocks

EPS = float(np.finfo(np.float32).eps)
FLOATS = {GGMLType.F32, GGMLType.F16, GGMLType.BF16}
F32, F16, BF16 = GGMLType.F32, GGMLType.F16, GGMLType.BF16
Q4_K, Q5_0, Q6_K, Q8_0 = GGMLType.Q4_K, GGMLType.Q5_0, GGMLType.Q6_K, GGMLType.Q8_0


def address(a: np.ndarray) -> int:
    assert a.flags.c_contiguous
    return a.ctypes.data


@dataclass
class Weight:
    kind: GGMLType
    packed: cpu.PackedMatrix
    alone: list[cpu.PackedMatrix]  # each expert by itself
    values: np.ndarray  # float64 [experts, rows, cols]

    def round_input(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The input the kernels multiply by, and the size of one int8 code; x float64 [..., cols]."""
        if self.kind in FLOATS:
            return x, np.zeros_like(x)
        steps = np.zeros_like(x)
        rounded = np.zeros_like(x)
        for start in range(0, x.shape[-1], 256):
            part = x[..., start : start + 256].astype(np.float32)
            largest = np.abs(part).max(-1, keepdims=True)
            with np.errstate(divide="ignore"):
                inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
            step = (largest / np.float32(127)).astype(np.float64)
            rounded[..., start : start + 256] = np.rint(part * inverse) * step
            steps[..., start : start + 256] = step
        return rounded, steps

    def multiply(self, expert: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """W x in float64 and a bound on the kernel's error: a rounding or two for each block."""
        w = self.values[expert]
        chain = w.shape[1] / TRAITS[self.kind].block_size
        if self.kind in FLOATS:
            return x @ w.T, EPS / 2 * (chain + 2) * (np.abs(x) @ np.abs(w).T)
        return x @ w.T, EPS * (2 * chain + 8) * (np.abs(x).sum(-1, keepdims=True) * np.abs(w).max())

    def linear(self, expert: int, x: np.ndarray) -> np.ndarray:
        """W x as the kernels give it, compared with float64; x float32."""
        out = np.full((len(x), self.values.shape[1]), np.nan, np.float32)
        cpu.linear(
            cpu.ThreadPool(1, []),
            self.alone[expert],
            address(x),
            len(x),
            x.shape[1],
            address(out),
            out.shape[1],
        )
        wanted, bound = self.multiply(expert, self.round_input(x.astype(np.float64))[0])
        assert (np.abs(out - wanted) <= bound).all()
        return out.astype(np.float64)


def make_weight(kind: GGMLType, experts: int, rows: int, cols: int, rng: np.random.Generator) -> Weight:
    data = random_blocks(kind, experts * rows, cols, rng, 1 / cols**0.5)
    packed, pool = cpu.PackedMatrix(int(kind), experts, rows, cols), cpu.ThreadPool(1, [])
    alone = [cpu.PackedMatrix(int(kind), 1, rows, cols) for _ in range(experts)]
    for e, part in enumerate(data.reshape(experts, -1)):
        packed.pack_rows(pool, e, 0, rows, address(np.ascontiguousarray(part)))
        alone[e].pack_rows(pool, 0, 0, rows, address(np.ascontiguousarray(part)))
    return Weight(kind, packed, alone, dequantize(data, kind, (experts, rows, cols)).astype(np.float64))


class Layer:
    def __init__(
        self,
        kinds: tuple[GGMLType, GGMLType, GGMLType],
        experts: int,
        hidden: int,
        intermediate: int,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.gate = make_weight(kinds[0], experts, intermediate, hidden, rng)
        self.up = make_weight(kinds[1], experts, intermediate, hidden, rng)
        self.down = make_weight(kinds[2], experts, hidden, intermediate, rng)
        self.experts, self.hidden, self.intermediate = experts, hidden, intermediate

    def inputs(self, tokens: int, k: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((tokens, self.hidden)).astype(np.float32)
        ids = rng.permuted(np.tile(np.arange(self.experts, dtype=np.int32), (tokens, 1)), axis=1)[
            :, :k
        ].copy()
        return x, ids, rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)

    def run(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, threads: int = 2) -> np.ndarray:
        out = np.full_like(x, np.nan)
        cpu.fill_scratch(0xFF)
        cpu.moe(
            cpu.ThreadPool(threads, []), self.gate.packed, self.up.packed, self.down.packed, address(x),
            len(x), address(ids), address(weights), ids.shape[1], address(out),
        )  # fmt: skip
        return out

    def run_mlp(self, x: np.ndarray, threads: int = 2) -> np.ndarray:
        out = np.full_like(x, np.nan)
        cpu.fill_scratch(0xFF)
        cpu.mlp(
            cpu.ThreadPool(threads, []),
            self.gate.packed,
            self.up.packed,
            self.down.packed,
            address(x),
            len(x),
            address(out),
        )
        return out

    def expert(self, e: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One expert's outputs for float32 rows x in float64, and the bound on the kernel's error."""
        gate, up = self.gate.linear(e, x), self.up.linear(e, x)
        h = gate / (1 + np.exp(-gate)) * up
        h_error = 6 * EPS * np.abs(h)  # an exponential, a sum, a division and a product
        rounded, step = self.down.round_input(h)
        y, y_error = self.down.multiply(e, rounded)
        if self.down.kind in FLOATS:
            return y, y_error + h_error @ np.abs(self.down.values[e]).T
        with np.errstate(divide="ignore", invalid="ignore"):
            code = np.where(step > 0, np.abs(h) / step, 0)
            shift = np.where(step > 0, 2 * h_error.max(-1, keepdims=True) / step, 0) + 254 * EPS
        off_by_one = np.abs(code % 1 - 0.5) <= shift
        columns = np.where(off_by_one, step, 0) + np.abs(rounded) * shift / 127
        return y, y_error + columns @ np.abs(self.down.values[e]).T

    def check(self, out: np.ndarray, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> None:
        wanted, bound = np.zeros(x.shape), np.zeros(x.shape)
        for e in range(self.experts):
            tokens, slots = np.nonzero(ids == e)
            if len(tokens) == 0:
                continue
            y, error = self.expert(e, x[tokens])
            w = weights[tokens, slots].astype(np.float64)[:, None]
            np.add.at(wanted, tokens, w * y)
            np.add.at(bound, tokens, w * (error + 8 * EPS * np.abs(y)))
        assert not np.isnan(out).any()
        assert (np.abs(out - wanted) <= bound).all(), np.abs((out - wanted) / np.maximum(bound, 1e-30)).max()
        # The bound is below even what leaving out the int8 rounding would change.
        if wanted.any():
            assert np.median(bound) < 4e-3 * wanted.std()


KINDS = [
    (Q4_K, Q4_K, Q5_0),
    (Q4_K, Q6_K, Q8_0),
    (Q8_0, Q8_0, Q8_0),
    (F16, F16, F16),
    (Q8_0, BF16, F32),
    (F32, Q4_K, Q8_0),
]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(k.name for k in kinds))
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_moe_matches_the_model(isa: str, kinds: tuple[GGMLType, GGMLType, GGMLType], tokens: int) -> None:
    layer = Layer(kinds, experts=6, hidden=256, intermediate=352)
    x, ids, weights = layer.inputs(tokens, k=3)
    layer.check(layer.run(x, ids, weights), x, ids, weights)


@pytest.mark.parametrize(("hidden", "intermediate"), [(40, 24), (64, 32), (96, 288), (1024, 256)])
@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_widths_that_fill_no_block_or_group(isa: str, hidden: int, intermediate: int, tokens: int) -> None:
    kind = F16 if hidden % 32 or intermediate % 32 else Q8_0
    layer = Layer((kind, kind, kind), 4, hidden, intermediate)
    x, ids, weights = layer.inputs(tokens, k=2)
    layer.check(layer.run(x, ids, weights), x, ids, weights)


@pytest.mark.parametrize("tokens", [1, 40])
def test_k_quantised_down(isa: str, tokens: int) -> None:
    layer = Layer((Q4_K, Q4_K, Q6_K), 4, 512, 512)
    x, ids, weights = layer.inputs(tokens, k=2)
    layer.check(layer.run(x, ids, weights), x, ids, weights)


@pytest.mark.usefixtures("restored_isa")
def test_isas_give_equal_bits() -> None:
    for kinds in KINDS[:4]:
        layer = Layer(kinds, 6, 256, 352)
        x, ids, weights = layer.inputs(30, k=3)
        outs = []
        for name in cpu.supported_isas():
            cpu.select_isa(name)
            outs.append(layer.run(x, ids, weights))
        for out in outs[1:]:
            np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("kinds", [KINDS[0], KINDS[3]], ids=["rounded", "plain"])
def test_bits_do_not_depend_on_threads_batch_or_order(
    isa: str, kinds: tuple[GGMLType, GGMLType, GGMLType]
) -> None:
    layer = Layer(kinds, 6, 256, 608)
    x, ids, weights = layer.inputs(65, k=3)
    ids[5, 1], ids[9] = -1, -1
    whole = layer.run(x, ids, weights)
    for threads in (1, 3, 12):  # more threads make units smaller than a block of 256 rows
        np.testing.assert_array_equal(layer.run(x, ids, weights, threads), whole)
        for first, stop in [(0, 1), (3, 20), (5, 6)]:
            part = layer.run(
                x[first:stop].copy(), ids[first:stop].copy(), weights[first:stop].copy(), threads
            )
            np.testing.assert_array_equal(part, whole[first:stop])
    order = np.random.default_rng(0).permutation(65)
    np.testing.assert_array_equal(layer.run(x[order], ids[order], weights[order]), whole[order])


def test_repeated_calls_take_no_more_memory() -> None:
    layer = Layer(KINDS[0], 6, 256, 352)
    few, many = layer.inputs(1, k=3), layer.inputs(65, k=3)
    for _ in range(3):
        layer.run(*few)
        layer.run(*many)
    held = cpu.scratch_bytes()
    for _ in range(5):
        layer.run(*many)
        layer.run(*few)
    assert cpu.scratch_bytes() == held > 0
    cpu.release_scratch()
    assert cpu.scratch_bytes() < held


def test_left_out_and_repeated_experts(isa: str) -> None:
    layer = Layer(KINDS[0], 6, 256, 352)
    x, ids, weights = layer.inputs(4, k=3)
    ids[:] = [[-1, -1, -1], [2, -1, 4], [-1, 0, -1], [1, 1, 5]]
    out = layer.run(x, ids, weights)
    assert (out[0] == 0).all()
    layer.check(out, x, ids, weights)
    nothing = layer.run(x, np.full_like(ids, -1), weights)
    assert (nothing == 0).all()


@pytest.mark.parametrize("bad", [-2, 6, 2**31 - 1])
def test_ids_out_of_range_are_refused_before_any_work(bad: int) -> None:
    layer = Layer(KINDS[2], 6, 64, 32)
    x, ids, weights = layer.inputs(3, k=2)
    ids[2, 1] = bad
    out = np.full_like(x, 7.0)
    with pytest.raises(ValueError, match=rf"token 2, slot 1 is {bad}; it must be -1 or one of the 6 experts"):
        cpu.moe(
            cpu.ThreadPool(2, []), layer.gate.packed, layer.up.packed, layer.down.packed, address(x), 3,
            address(ids), address(weights), 2, address(out),
        )  # fmt: skip
    assert (out == 7.0).all()


def test_a_nan_token_stays_alone(isa: str) -> None:
    layer = Layer(KINDS[0], 6, 256, 352)
    x, ids, weights = layer.inputs(5, k=3)
    clean = layer.run(x, ids, weights)
    x[2, 17] = np.nan
    out = layer.run(x, ids, weights)
    assert np.isnan(out[2]).all()
    np.testing.assert_array_equal(np.delete(out, 2, 0), np.delete(clean, 2, 0))


def test_zero_input_gives_zero(isa: str) -> None:
    layer = Layer(KINDS[0], 6, 256, 352)
    _, ids, weights = layer.inputs(3, k=3)
    assert (layer.run(np.zeros((3, 256), np.float32), ids, weights) == 0).all()


# Several experts' worth of pairs, more than one share of an expert, more than one slice of down.
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 65, 300])
def test_mlp(isa: str, tokens: int) -> None:
    layer = Layer((Q4_K, Q4_K, Q5_0), 1, 256, 352)
    x = layer.inputs(tokens, k=1)[0]
    out = layer.run_mlp(x)
    layer.check(out, x, np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32))
    for threads in (1, 3, 12):
        np.testing.assert_array_equal(layer.run_mlp(x, threads), out)


def test_results_of_down_taken_by_slices() -> None:
    layer = Layer((Q8_0, Q8_0, Q8_0), 1, 512, 32)
    x = np.tile(layer.inputs(300, k=1)[0], (110, 1))  # 33,000 rows of 512 floats pass the slice's limit
    out = layer.run_mlp(x)
    np.testing.assert_array_equal(out, np.tile(layer.run_mlp(x[:300].copy()), (110, 1)))


def test_tokens_taken_by_chunks() -> None:
    layer = Layer((Q8_0, Q8_0, Q8_0), 4, 64, 32)
    tokens, k = 33_000, 64  # 64 slots of 32 hidden columns: about 4 KB of scratch a token
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((tokens, 64)).astype(np.float32), np.ones((tokens, k), np.float32)
    ids = np.full((tokens, k), -1, np.int32)
    ids[:, 5] = rng.integers(-1, 4, tokens)
    out = layer.run(x, ids, weights)
    np.testing.assert_array_equal(out, layer.run(x, ids[:, 5:6].copy(), weights[:, :1].copy()))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            [(2, 32, 64), (2, 32, 64), (2, 64, 64)],
            r"found gate \[2, 32, 64\], up \[2, 32, 64\], down \[2, 64, 64\]",
        ),
        ([(2, 32, 64), (2, 64, 64), (2, 64, 32)], r"gate and up must be \[experts, intermediate, hidden\]"),
        ([(2, 32, 64), (2, 32, 64), (3, 64, 32)], r"down \[3, 64, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: list[tuple[int, int, int]], message: str) -> None:
    matrices = [cpu.PackedMatrix(int(Q8_0), *shape) for shape in shapes]
    floats, ids = np.zeros(4096, np.float32), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match=message):
        cpu.moe(
            cpu.ThreadPool(1, []),
            *matrices,
            address(floats),
            1,
            address(ids),
            address(floats),
            2,
            address(floats),
        )


def test_mlp_refuses_a_stack_and_null_addresses() -> None:
    floats = np.zeros(4096, np.float32)
    up, down = cpu.PackedMatrix(int(Q8_0), 2, 32, 64), cpu.PackedMatrix(int(Q8_0), 2, 64, 32)
    pool = cpu.ThreadPool(1, [])
    with pytest.raises(ValueError, match="mlp: takes a single expert"):
        cpu.mlp(pool, up, up, down, address(floats), 1, address(floats))
    with pytest.raises(ValueError, match="mlp: the address of `out` is null"):
        cpu.mlp(pool, up, up, down, address(floats), 1, 0)
    with pytest.raises(ValueError, match="moe: `k` must be at least 1, found 0"):
        cpu.moe(pool, up, up, down, address(floats), 1, address(floats), address(floats), 0, address(floats))
