"""Matrices in parts: what lies where, the same results, and that workers read their group's part alone.

Nodes are -1 here: parts and groups of workers need no second node. Where pages are is tested in `tests/numa`.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import TRAITS, GGMLType, dequantize, random_blocks

EPS = float(np.finfo(np.float32).eps)
Q4_K, Q6_K, Q8_0, F32, BF16 = (GGMLType[name] for name in ("Q4_K", "Q6_K", "Q8_0", "F32", "BF16"))
TWO = [-1, -1]
GROUPS = [[0, 1], [0, 0, 1], [0, 1, 1, 1], [0]]


def address(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def workers(groups: list[int]) -> cpu.ThreadPool:
    return cpu.ThreadPool(len(groups), [], groups)


class Raw:
    """GGUF bytes of a stack, and matrices made of them."""

    def __init__(self, kind: GGMLType, batch: int, rows: int, cols: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.kind, self.shape = kind, (batch, rows, cols)
        self.data = random_blocks(kind, batch * rows, cols, rng, 1 / cols**0.5).reshape(batch, rows, -1)

    def matrix(
        self, division: str = "none", cuts: list[int] | None = None, parts: int = 2
    ) -> cpu.PackedMatrix:
        nodes = [] if division == "none" else [-1] * parts
        packed = cpu.PackedMatrix(int(self.kind), *self.shape, division, nodes, cuts or [])
        pool = workers([0, 1])
        for b in range(self.shape[0]):
            packed.pack_rows(pool, b, 0, self.shape[1], address(np.ascontiguousarray(self.data[b])))
        return packed

    def values(self) -> np.ndarray:
        return dequantize(self.data.reshape(-1), self.kind, self.shape).astype(np.float64)


def corrupt(matrix: cpu.PackedMatrix, part: int) -> None:
    """Other bytes in one part: 0x11 is a finite scale in every format tested."""
    found = matrix.parts[part]
    ctypes.memset(found["address"], 0x11, found["nbytes"])


def linear(pool: cpu.ThreadPool, matrix: cpu.PackedMatrix, x: np.ndarray) -> np.ndarray:
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    cpu.linear(pool, matrix, address(x), len(x), x.shape[1], address(out), matrix.rows)
    return out


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


# --- what lies where -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("division", "cuts"),
    [("copies", []), ("batch", [0, 2, 5]), ("rows", [0, 32, 72]), ("cols", [0, 512, 768])],
)
@pytest.mark.parametrize("kind", [Q4_K, Q8_0, BF16])
def test_every_division_holds_the_whole_matrix(kind: GGMLType, division: str, cuts: list[int]) -> None:
    raw = Raw(kind, 5, 72, 768)
    packed = raw.matrix(division, cuts)
    for b in range(5):
        back = np.zeros_like(raw.data[b])
        packed.unpack_rows(b, 0, 72, address(back))
        assert (back == raw.data[b]).all()
    whole = raw.matrix().nbytes
    assert packed.nbytes == (2 * whole if division == "copies" else whole)
    assert packed.nbytes == sum(part["nbytes"] for part in packed.parts)


def test_parts_say_what_they_hold() -> None:
    packed = Raw(Q4_K, 2, 40, 768).matrix("cols", [0, 512, 768])
    first, second = packed.parts
    assert (first["cols"], second["cols"]) == ((0, 512), (512, 768))
    assert first["rows"] == second["rows"] == (0, 40)
    assert first["nbytes"] == 2 * second["nbytes"]


@pytest.mark.parametrize(
    ("division", "nodes", "cuts", "problem"),
    [
        ("halves", TWO, [], "unknown"),
        ("copies", [], [], "node for each part"),
        ("rows", TWO, [0, 16], "one entry more"),
        ("rows", TWO, [0, 24, 64], "multiples of 16"),
        ("rows", TWO, [0, 64, 64], "ascend"),
        ("rows", TWO, [0, 16, 48], "lead from 0 to 64"),
        ("cols", TWO, [0, 128, 512], "multiples of 256"),
        ("copies", TWO, [0, 1, 2], "one entry more"),
        ("copies", [-1] * 65, [], "at most 64"),
    ],
)
def test_wrong_layout_is_refused(division: str, nodes: list[int], cuts: list[int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        cpu.PackedMatrix(int(Q4_K), 2, 64, 512, division, nodes, cuts)


# --- products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("division", "cuts"), [("copies", []), ("rows", [0, 144, 200])])
def test_products_have_the_bits_of_one_piece(
    isa: str, groups: list[int], tokens: int, division: str, cuts: list[int]
) -> None:
    raw, x = Raw(Q4_K, 1, 200, 512), normal(tokens, 512)
    wanted = linear(cpu.ThreadPool(1), raw.matrix(), x)
    assert (linear(workers(groups), raw.matrix(division, cuts), x) == wanted).all()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("operation", ["linear_batched", "linear_transposed_batched"])
@pytest.mark.parametrize(("division", "cuts"), [("copies", []), ("batch", [0, 3, 4]), ("rows", [0, 16, 48])])
def test_batched_products_have_the_bits_of_one_piece(
    groups: list[int], operation: str, division: str, cuts: list[int]
) -> None:
    raw = Raw(Q8_0, 4, 48, 64)
    inner, outer = (64, 48) if operation == "linear_batched" else (48, 64)
    x = normal(9, 4, inner)

    def run(pool: cpu.ThreadPool, matrix: cpu.PackedMatrix) -> np.ndarray:
        out = np.full((9, 4, outer), np.nan, np.float32)
        getattr(cpu, operation)(pool, matrix, address(x), 9, 4 * inner, inner, address(out), 4 * outer, outer)
        return out

    assert (run(workers(groups), raw.matrix(division, cuts)) == run(cpu.ThreadPool(1), raw.matrix())).all()


@pytest.mark.parametrize(("division", "cuts"), [("copies", []), ("rows", [0, 32, 50])])
def test_gathered_rows_are_those_of_one_piece(division: str, cuts: list[int]) -> None:
    raw = Raw(Q6_K, 1, 50, 256)
    ids = np.arange(50, dtype=np.int32)[::-1].copy()
    out = np.full((50, 256), np.nan, np.float32)
    cpu.gather_rows(workers([0, 1]), raw.matrix(division, cuts), address(ids), 50, address(out))
    assert (out == raw.values()[0][::-1].astype(np.float32)).all()


def test_a_corrupt_copy_changes_the_rows_of_its_workers_alone() -> None:
    raw, x = Raw(Q4_K, 1, 512, 256), normal(2, 256)
    pool = workers([0, 0, 1])
    right = linear(pool, raw.matrix("copies"), x)
    changed = []
    for part in range(2):
        matrix = raw.matrix("copies")
        corrupt(matrix, part)
        changed.append((linear(pool, matrix, x) != right).any(axis=0))
    assert (changed[0] ^ changed[1]).all()
    # One thread of three is in the second group, whose units are the last.
    assert changed[1].sum() == pytest.approx(512 / 3, abs=16 * 2)
    assert not changed[1][: 512 - changed[1].sum()].any()


def test_a_corrupt_slice_changes_its_rows_alone() -> None:
    raw, x = Raw(Q4_K, 1, 512, 256), normal(1, 256)
    right = linear(workers([0, 1]), raw.matrix("rows", [0, 320, 512]), x)
    matrix = raw.matrix("rows", [0, 320, 512])
    corrupt(matrix, 1)
    changed = (linear(workers([0, 1]), matrix, x) != right)[0]
    assert changed[320:].all() and not changed[:320].any()


def test_columns_are_for_feed_forward_layers_alone() -> None:
    matrix, x, out = (
        Raw(Q4_K, 1, 32, 512).matrix("cols", [0, 256, 512]),
        normal(1, 512),
        np.zeros(32, np.float32),
    )
    ids = np.zeros(1, np.int32)
    pool = workers([0, 1])
    with pytest.raises(ValueError, match="divided by columns"):
        cpu.linear(pool, matrix, address(x), 1, 512, address(out), 32)
    with pytest.raises(ValueError, match="divided by columns"):
        cpu.gather_rows(pool, matrix, address(ids), 1, address(x))


# --- expert layers ---------------------------------------------------------------------------------


class Experts:
    def __init__(
        self, width: int, kinds: tuple[GGMLType, GGMLType] = (Q4_K, Q6_K), experts: int = 6, hidden: int = 512
    ) -> None:
        self.experts, self.hidden, self.width = experts, hidden, width
        self.gate = Raw(kinds[0], experts, width, hidden, 1)
        self.up = Raw(kinds[0], experts, width, hidden, 2)
        self.down = Raw(kinds[1], experts, hidden, width, 3)

    def layer(self, mode: str, cuts: list[int] | None = None) -> list[cpu.PackedMatrix]:
        if mode == "shard":
            assert cuts
            parts = len(cuts) - 1
            sides = [w.matrix("rows", cuts, parts) for w in (self.gate, self.up)]
            return [*sides, self.down.matrix("cols", cuts, parts)]
        return [w.matrix(mode) for w in (self.gate, self.up, self.down)]

    def inputs(self, tokens: int, k: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(11)
        ids = np.stack([rng.permutation(self.experts)[:k] for _ in range(tokens)]).astype(np.int32)
        ids[0, 1] = -1
        return normal(tokens, self.hidden), ids, rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)

    def run(self, pool: cpu.ThreadPool, layer: list[cpu.PackedMatrix], tokens: int) -> np.ndarray:
        x, ids, weights = self.inputs(tokens)
        out = np.full_like(x, np.nan)
        cpu.fill_scratch(0xFF)
        cpu.moe(pool, *layer, address(x), tokens, address(ids), address(weights), ids.shape[1], address(out))
        return out

    def reassociation_bound(self, tokens: int, parts: int) -> np.ndarray:
        """How far sums of the same terms in another order may be apart.

        The terms of an output are the products of down's blocks, weighted: ``n`` of them, so two orders
        differ by at most ``2 γ(n) Σ|terms|``. Terms are bounded by the sum of absolute products, which
        sub-blocks with minimums of their own (K-quants) at most double.
        """
        x, ids, weights = self.inputs(tokens)
        pool = cpu.ThreadPool(1)
        bound = np.zeros((tokens, self.hidden))
        down = np.abs(self.down.values())
        for t in range(tokens):
            for slot, expert in enumerate(ids[t]):
                if expert < 0:
                    continue
                gate, up = (
                    linear(pool, one(w, expert), x[t : t + 1])[0].astype(np.float64)
                    for w in (self.gate, self.up)
                )
                hidden = np.abs(gate / (1 + np.exp(-gate)) * up)
                # Codes round by half a step of 1/127 of the largest; scales of blocks are at most it.
                step = np.abs(hidden).max() / 127
                bound[t] += weights[t, slot] * (down[expert] @ (hidden + step))
        blocks = 2 * self.width // TRAITS[self.down.kind].block_size
        terms = ids.shape[1] * (blocks + parts) + 2
        return 2 * EPS / 2 * terms * 4 * bound


def one(raw: Raw, index: int) -> cpu.PackedMatrix:
    matrix = cpu.PackedMatrix(int(raw.kind), 1, *raw.shape[1:])
    matrix.pack_rows(cpu.ThreadPool(1), 0, 0, raw.shape[1], address(np.ascontiguousarray(raw.data[index])))
    return matrix


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_copies_give_the_bits_of_one_piece(isa: str, groups: list[int], tokens: int) -> None:
    experts = Experts(768)
    wanted = experts.run(cpu.ThreadPool(1), experts.layer("none"), tokens)
    assert (experts.run(workers(groups), experts.layer("copies"), tokens) == wanted).all()


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize(
    ("width", "cuts"), [(768, [0, 512, 768]), (1408, [0, 768, 1408]), (768, [0, 256, 512, 768])]
)
def test_slices_differ_by_the_order_of_sums_alone(isa: str, tokens: int, width: int, cuts: list[int]) -> None:
    experts = Experts(width, (Q4_K, Q8_0) if width % 256 else (Q4_K, Q6_K))
    whole = experts.run(cpu.ThreadPool(1), experts.layer("none"), tokens)
    parts = len(cuts) - 1
    sliced = experts.run(workers([i % parts for i in range(parts + 1)]), experts.layer("shard", cuts), tokens)
    assert (np.abs(sliced.astype(np.float64) - whole) <= experts.reassociation_bound(tokens, parts)).all()
    assert (sliced != whole).any()


@pytest.mark.parametrize("kinds", [(Q4_K, Q6_K), (F32, BF16), (Q8_0, F32)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_slices_do_not_depend_on_the_workers(kinds: tuple[GGMLType, GGMLType], tokens: int) -> None:
    experts = Experts(768, kinds)
    layer = experts.layer("shard", [0, 512, 768])
    first, *others = (experts.run(workers(groups), layer, tokens) for groups in GROUPS)
    assert all((other == first).all() for other in others)


def test_a_corrupt_copy_of_down_changes_its_workers_rows_alone() -> None:
    experts = Experts(256)
    pool = workers([0, 1])
    right = experts.run(pool, experts.layer("copies"), 1)[0]
    layer = experts.layer("copies")
    corrupt(layer[2], 1)
    changed = experts.run(pool, layer, 1)[0] != right
    assert changed[256:].all() and not changed[:256].any()


@pytest.mark.parametrize(
    ("gate", "down", "problem"),
    [
        (("rows", [0, 128, 512]), ("cols", [0, 256, 512]), "multiple of 256"),
        (("cols", [0, 256, 512]), ("none", None), "cut by rows"),
        (("none", None), ("rows", [0, 256, 512]), "cut by rows"),
    ],
)
def test_layers_cut_elsewhere_are_refused(
    gate: tuple[str, list[int] | None], down: tuple[str, list[int] | None], problem: str
) -> None:
    experts = Experts(512)
    sides = [w.matrix(*gate) for w in (experts.gate, experts.up)]
    with pytest.raises(ValueError, match=problem):
        experts.run(workers([0, 1]), [*sides, experts.down.matrix(*down)], 1)


def test_gate_and_up_cut_apart_are_refused() -> None:
    experts = Experts(768)
    layer = [experts.gate.matrix("rows", [0, 256, 768]), experts.up.matrix("rows", [0, 512, 768])]
    with pytest.raises(ValueError, match="same rows"):
        experts.run(workers([0, 1]), [*layer, experts.down.matrix()], 1)


# --- groups of workers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "problem"),
    [([0], "one entry for each"), ([1, 0], "begin with 0"), ([0, 2], "without gaps"), ([0, 64], "below 64")],
)
def test_wrong_groups_are_refused(groups: list[int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        cpu.ThreadPool(2, [], groups)


def test_groups_get_units_by_their_workers() -> None:
    assert workers([0, 0, 0, 1]).split(100) == [75, 100]
    assert workers([0, 1]).split(1) == [0, 1]
