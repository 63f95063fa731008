"""Norms, routing and transposed products against float64 numpy, and bits that depend on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import GGMLType, dequantize, random_blocks

EPS = float(np.finfo(np.float32).eps)


def address(a: np.ndarray | None) -> int:
    assert a is None or a.flags.c_contiguous
    return 0 if a is None else a.ctypes.data


def on_every_isa(call):  # type: ignore[no-untyped-def]
    """Results of ``call`` with each ISA of the host; for tests that use `restored_isa`."""
    results = []
    for name in cpu.supported_isas():
        cpu.select_isa(name)
        results.append(call())
    return results


def norm(
    x: np.ndarray, weight: np.ndarray, residual: np.ndarray | None = None, threads: int = 2
) -> np.ndarray:
    out = np.full_like(x, np.nan)
    cpu.rms_norm(
        cpu.ThreadPool(threads, []), address(x), len(x), x.shape[1], address(weight), 1e-6, address(residual),
        address(out),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dim", [1, 15, 16, 63, 65, 576, 2048])
@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_rms_norm(isa: str, dim: int, tokens: int) -> None:
    rng = np.random.default_rng(dim)
    x, residual = rng.standard_normal((2, tokens, dim)).astype(np.float32)
    weight = rng.standard_normal(dim).astype(np.float32)

    def reference(v: np.ndarray) -> np.ndarray:
        v = v.astype(np.float64)
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) * weight

    # Relative: half the error of the sum of squares (dim / 64 chained sums and 6 folds), five roundings.
    rtol = EPS * (dim / 64 + 12) / 2 + 5 * EPS
    np.testing.assert_allclose(norm(x, weight), reference(x), rtol=rtol, atol=1e-30)
    total = residual + x
    out = norm(x, weight, residual)
    np.testing.assert_array_equal(residual, total)
    np.testing.assert_allclose(out, reference(total), rtol=rtol, atol=1e-30)


@pytest.mark.usefixtures("restored_isa")
def test_rms_norm_bits_do_not_depend_on_threads_mates_or_isa() -> None:
    rng = np.random.default_rng(1)
    x, weight = (
        rng.standard_normal((200, 1000)).astype(np.float32),
        rng.standard_normal(1000).astype(np.float32),
    )
    whole = norm(x, weight)
    for threads in (1, 3):
        np.testing.assert_array_equal(norm(x, weight, threads=threads), whole)
    np.testing.assert_array_equal(norm(x[7:8].copy(), weight), whole[7:8])
    for other in on_every_isa(lambda: norm(x, weight)):
        np.testing.assert_array_equal(other, whole)


def test_rms_norm_in_place() -> None:
    x, weight = (
        np.random.default_rng(2).standard_normal((3, 100)).astype(np.float32),
        np.ones(100, np.float32),
    )
    wanted = norm(x, weight)
    cpu.rms_norm(cpu.ThreadPool(1, []), address(x), 3, 100, address(weight), 1e-6, 0, address(x))
    np.testing.assert_array_equal(x, wanted)


def router_matrix(weight: np.ndarray) -> cpu.PackedMatrix:
    matrix = cpu.PackedMatrix(0, 1, *weight.shape)
    matrix.pack_rows(cpu.ThreadPool(1, []), 0, 0, len(weight), address(weight))
    return matrix


def route(
    logits: np.ndarray,
    k: int,
    scoring: str,
    bias: np.ndarray | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    norm_topk_prob: bool = False,
    scaling: float = 1.0,
    threads: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Routes tokens whose logits are given: the router is the identity."""
    ids, weights = np.full((len(logits), k), -7, np.int32), np.full((len(logits), k), np.nan, np.float32)
    cpu.fill_scratch(0xFF)
    cpu.route(
        cpu.ThreadPool(threads, []), router_matrix(np.eye(logits.shape[1], dtype=np.float32)),
        address(logits), len(logits), address(bias), scoring, groups, topk_groups, k, norm_topk_prob,
        scaling, address(ids), address(weights),
    )  # fmt: skip
    return ids, weights


def reference_scores(logits: np.ndarray, scoring: str) -> np.ndarray:
    x = logits.astype(np.float64)
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-x))
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_choice(choice: np.ndarray, k: int, groups: int, topk_groups: int, two_best: bool) -> np.ndarray:
    """DeepSeek's gate for one token: the k best experts of the best groups, ties by lower id."""
    by_group = choice.reshape(groups, -1)
    best = np.sort(by_group, -1)[:, ::-1]
    scores = best[:, :2].sum(-1) if two_best else best[:, 0]
    kept = np.argsort(-scores, kind="stable")[:topk_groups]
    masked = np.full_like(by_group, -np.inf)
    masked[kept] = by_group[kept]
    return np.argsort(-masked.ravel(), kind="stable")[:k]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("experts", "k", "groups", "topk_groups"),
    [(64, 6, 1, 1), (160, 6, 8, 3), (256, 8, 8, 4), (12, 3, 4, 1), (5, 5, 1, 1)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_route(
    isa: str, scoring: str, experts: int, k: int, groups: int, topk_groups: int, biased: bool
) -> None:
    rng = np.random.default_rng(experts)
    logits = (2 * rng.standard_normal((17, experts))).astype(np.float32)
    bias = rng.uniform(-0.1, 0.1, experts).astype(np.float32) if biased else None
    ids, weights = route(logits, k, scoring, bias, groups, topk_groups, True, 2.5)
    scores = reference_scores(logits, scoring)
    choice = scores + (0 if bias is None else bias)
    for t in range(len(logits)):
        # Random scores differ by more than their rounding, so the choice is exact.
        wanted = reference_choice(choice[t], k, groups, topk_groups, scoring == "sigmoid")
        np.testing.assert_array_equal(ids[t], wanted)
        picked = scores[t, wanted]
        np.testing.assert_allclose(weights[t], picked / (picked.sum() + 1e-20) * 2.5, rtol=(k + 16) * EPS)


def test_route_without_normalisation() -> None:
    logits = np.array([[1.0, 3.0, 2.0, -50.0, 80.0]], np.float32)
    ids, weights = route(logits, 2, "sigmoid", scaling=0.5)
    assert ids.tolist() == [[4, 1]]
    np.testing.assert_allclose(weights, [[0.5, 0.5 / (1 + np.exp(-3.0))]], rtol=8 * EPS)


def test_route_breaks_ties_by_lower_id() -> None:
    ids, _ = route(np.zeros((1, 16), np.float32), 4, "softmax", groups=4, topk_groups=2)
    assert ids.tolist() == [[0, 1, 2, 3]]
    bias = np.zeros(16, np.float32)
    bias[[5, 11]] = 1.0
    ids, weights = route(np.zeros((1, 16), np.float32), 4, "sigmoid", bias, norm_topk_prob=True)
    assert ids.tolist() == [[5, 11, 0, 1]]
    assert weights.tolist() == [[0.25] * 4]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_route_keeps_ids_in_range_for_any_logits(isa: str, scoring: str, value: float) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 8)).astype(np.float32)
    x = rng.standard_normal((4, 8)).astype(np.float32)
    x[1], x[2, 3] = value, value
    ids, weights = np.full((4, 4), -7, np.int32), np.full((4, 4), np.nan, np.float32)
    cpu.route(
        cpu.ThreadPool(1, []), router_matrix(weight), address(x), 4, 0, scoring, 8, 2, 4, True, 1.0,
        address(ids), address(weights),
    )  # fmt: skip
    assert ((ids >= 0) & (ids < 32)).all()
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert np.isfinite(weights[[0, 3]]).all()


@pytest.mark.usefixtures("restored_isa")
def test_route_bits_do_not_depend_on_threads_mates_or_isa() -> None:
    logits = np.random.default_rng(4).standard_normal((150, 160)).astype(np.float32)
    ids, weights = route(logits, 6, "softmax", groups=8, topk_groups=3)
    others = [route(logits, 6, "softmax", groups=8, topk_groups=3, threads=n) for n in (1, 3)]
    others += on_every_isa(lambda: route(logits, 6, "softmax", groups=8, topk_groups=3))
    for other_ids, other_weights in others:
        np.testing.assert_array_equal(other_ids, ids)
        np.testing.assert_array_equal(other_weights, weights)
    alone = route(logits[9:10].copy(), 6, "softmax", groups=8, topk_groups=3)
    np.testing.assert_array_equal(alone[1], weights[9:10])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, "1 of 3 groups cannot be chosen from 16 experts"),
        ({"groups": 4, "topk_groups": 5}, "5 of 4 groups cannot be chosen"),
        ({"k": 17}, "num_experts_per_tok is 17; it must be between 1 and 16"),
        ({"k": 5, "groups": 4, "topk_groups": 1}, "num_experts_per_tok is 5; it must be between 1 and 4"),
        ({"scoring": "relu"}, "scoring 'relu' is unknown; choose softmax or sigmoid"),
    ],
)
def test_route_refuses_what_does_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(np.zeros((1, 16), np.float32), **({"k": 2, "scoring": "softmax"} | arguments))  # type: ignore[arg-type]


def stack(kind: GGMLType, batch: int, rows: int, cols: int) -> tuple[cpu.PackedMatrix, np.ndarray]:
    data = random_blocks(kind, batch * rows, cols, np.random.default_rng(rows + cols))
    matrix, pool = cpu.PackedMatrix(int(kind), batch, rows, cols), cpu.ThreadPool(1, [])
    for b, part in enumerate(data.reshape(batch, -1)):
        matrix.pack_rows(pool, b, 0, rows, address(np.ascontiguousarray(part)))
    return matrix, dequantize(data, kind, (batch, rows, cols))


def transposed(
    matrix: cpu.PackedMatrix, x: np.ndarray, cols: int, threads: int = 2, gap: int = 3
) -> np.ndarray:
    """x [T, batch, rows + gap]: the gap is what stands between heads in the query, here NaN."""
    tokens, batch, stride = x.shape
    out = np.full((tokens, batch, cols + gap), np.nan, np.float32)
    cpu.fill_scratch(0xFF)
    cpu.linear_transposed_batched(
        cpu.ThreadPool(threads, []), matrix, address(x), tokens, batch * stride, stride, address(out),
        batch * (cols + gap), cols + gap,
    )  # fmt: skip
    assert np.isnan(out[..., cols:]).all()
    return out[..., :cols]


def inputs(tokens: int, batch: int, rows: int) -> np.ndarray:
    x = np.full((tokens, batch, rows + 3), np.nan, np.float32)
    x[..., :rows] = np.random.default_rng(tokens).standard_normal((tokens, batch, rows))
    return x


@pytest.mark.parametrize(
    "kind", [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q5_0, GGMLType.Q4_K]
)
@pytest.mark.parametrize(("batch", "rows", "cols"), [(2, 16, 256), (3, 24, 512), (1, 7, 768)])
@pytest.mark.parametrize("tokens", [1, 3, 17, 65])
def test_transposed_product(isa: str, kind: GGMLType, batch: int, rows: int, cols: int, tokens: int) -> None:
    matrix, weight = stack(kind, batch, rows, cols)
    x = inputs(tokens, batch, rows)
    out = transposed(matrix, x, cols)
    wanted = np.einsum("tbr,brc->tbc", x[..., :rows].astype(np.float64), weight.astype(np.float64))
    size = np.einsum(
        "tbr,brc->tbc", np.abs(x[..., :rows]).astype(np.float64), np.abs(weight).astype(np.float64)
    )
    # Dequantising rounds within two eps of the larger of scale and minimum; rows chain one rounding each.
    slack = 4 * EPS * np.abs(weight).max() * np.abs(x[..., :rows]).sum(-1, keepdims=True)
    assert (np.abs(out - wanted) <= EPS * (rows + 2) * size + slack).all()


@pytest.mark.parametrize("cols", [64, 96, 320])
def test_transposed_product_of_short_rows(isa: str, cols: int) -> None:
    matrix, weight = stack(GGMLType.Q8_0, 2, 32, cols)
    x = inputs(5, 2, 32)
    wanted = np.einsum("tbr,brc->tbc", x[..., :32].astype(np.float64), weight.astype(np.float64))
    atol = EPS * 40 * np.abs(weight).max() * np.abs(x[..., :32]).sum(-1).max()
    np.testing.assert_allclose(transposed(matrix, x, cols), wanted, rtol=0, atol=atol)


@pytest.mark.usefixtures("restored_isa")
def test_transposed_product_bits_do_not_depend_on_threads_mates_or_isa() -> None:
    matrix, _ = stack(GGMLType.Q4_K, 3, 24, 512)
    x = inputs(65, 3, 24)
    whole = transposed(matrix, x, 512)
    for threads in (1, 3):
        np.testing.assert_array_equal(transposed(matrix, x, 512, threads), whole)
    np.testing.assert_array_equal(transposed(matrix, x[9:10].copy(), 512), whole[9:10])
    for other in on_every_isa(lambda: transposed(matrix, x, 512)):
        np.testing.assert_array_equal(other, whole)


def test_transposed_product_refuses_rows_that_overlap() -> None:
    matrix, _ = stack(GGMLType.F32, 2, 16, 256)
    x, out = inputs(2, 2, 16), np.empty((2, 2, 256), np.float32)
    good = [19 * 2, 19, 512, 256]
    for index, (bad, problem) in enumerate(
        [(15, "token stride of x"), (-1, "batch stride"), (255, "token stride of out"), (255, "batch stride")]
    ):
        strides = [*good[:index], bad, *good[index + 1 :]]
        with pytest.raises(ValueError, match=f"linear_transposed_batched: .*{problem}"):
            cpu.linear_transposed_batched(
                cpu.ThreadPool(1), matrix, address(x), 2, *strides[:2], address(out), *strides[2:]
            )


def test_an_optional_address_must_be_aligned_too() -> None:
    x = np.zeros((1, 16), np.float32)
    with pytest.raises(ValueError, match="`residual` is not aligned"):
        cpu.rms_norm(cpu.ThreadPool(1), address(x), 1, 16, address(x), 1e-6, address(x) + 1, address(x))
