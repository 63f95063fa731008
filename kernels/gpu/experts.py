"""A stack of experts that lies on the device, whole: gate and up, SwiGLU, down, and the sum by weights.

The launches and their grids depend on shapes alone and nothing is read back, so that a captured graph holds
it. Slots are sorted by expert once for the three products, and summed in the order of top-k: a token has the
same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.dequantize_torch import dense
from hybrid.kernels.gpu.formats import FORMATS, QuantizedMatrix
from hybrid.kernels.gpu.gemm import align_slots, plan_gemm
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work, unit_roundoff
from hybrid.kernels.gpu.random_matrix import random_matrix
from hybrid.kernels.gpu.swiglu import plan_swiglu
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def weighted_sum_kernel(slots, weights, out, dim, K: tl.constexpr, COLS: tl.constexpr):
    """COLS columns of a token: its K slots in ascending order."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for k in range(K):
        weight = tl.load(weights + token * K + k)
        total += weight * tl.load(slots + (token * K + k) * dim + col, mask=col < dim, other=0.0).to(
            tl.float32
        )
    tl.store(out + token * dim + col, total, mask=col < dim)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"COLS": 512}


def plan_experts(
    target: Target,
    x: torch.Tensor,
    gate: QuantizedMatrix,
    up: QuantizedMatrix,
    down: QuantizedMatrix,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
) -> Plan:
    op, device = "experts", x.device
    num_tokens, dim = x.shape
    check_tensor(op, "x", x, (None, None), FLOATS, device)
    check_tensor(op, "topk_ids", topk_ids, (num_tokens, None), (torch.int32,), device)
    k = topk_ids.shape[1]
    check_tensor(op, "topk_weights", topk_weights, (num_tokens, k), (torch.float32,), device)
    inner = (gate.batch, gate.rows, gate.cols)
    check((up.batch, up.rows, up.cols) == inner, op, f"up of {inner}", (up.batch, up.rows, up.cols))
    wanted = (gate.batch, dim, gate.rows)
    check(
        (down.batch, down.rows, down.cols) == wanted,
        op,
        f"down of {wanted}",
        (down.batch, down.rows, down.cols),
    )
    aligned = align_slots(topk_ids, gate.batch)
    gates = plan_gemm(target, x, gate, topk_ids, aligned=aligned)
    ups = plan_gemm(target, x, up, topk_ids, aligned=aligned)
    hidden = plan_swiglu(target, gates.results[0], ups.results[0])
    slots = topk_ids.reshape(-1, 1)
    downs = plan_gemm(target, hidden.results[0], down, slots, torch.float32, aligned=aligned)
    out = torch.empty(num_tokens, dim, dtype=torch.float32, device=device)
    config = launch_config({}, x.dtype, target)
    args = {"slots": downs.results[0], "weights": topk_weights, "out": out, "dim": dim}
    grid = (num_tokens, triton.cdiv(dim, config["COLS"]))
    total = Launch(weighted_sum_kernel, grid, args, {"K": k, **config})
    launches = (*gates.launches, *ups.launches, *hidden.launches, *downs.launches, total)
    return Plan(launches, (out,))


def experts(
    x: torch.Tensor,
    gate: QuantizedMatrix,
    up: QuantizedMatrix,
    down: QuantizedMatrix,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
) -> torch.Tensor:
    """``[T, dim]`` to float32 ``[T, dim]`` through the experts that each token chose, in five launches.

    ``gate`` and ``up`` are ``[experts, intermediate, dim]``, ``down`` ``[experts, dim, intermediate]``;
    ``topk_ids`` int32 and ``topk_weights`` float32 ``[T, k]``. An id of -1 is not here and gives nothing.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_experts(target_of(x.device), x, gate, up, down, topk_ids, topk_weights).run()[0]


def _products(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(len(ids), weights.shape[1], dtype=torch.float64)
    for expert in ids[ids >= 0].unique():
        out[ids == expert] = x[ids == expert] @ weights[expert].T
    return out


def experts_torch(
    x: torch.Tensor,
    gate: QuantizedMatrix,
    up: QuantizedMatrix,
    down: QuantizedMatrix,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    ids, rows = topk_ids.flatten(), x.double().repeat_interleave(topk_ids.shape[1], 0)
    gates, ups = (_products(rows, dense(w).double(), ids) for w in (gate, up))
    hidden = torch.nn.functional.silu(gates) * ups
    slots = _products(hidden, dense(down).double(), ids).unflatten(0, topk_ids.shape)
    return ((slots * topk_weights[..., None].double()).sum(1),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    tokens, dim, inner, batch, k = (shape[key] for key in ("num_tokens", "dim", "inner", "batch", "k"))
    return {
        "x": make.normal(tokens, dim),
        "gate": random_matrix(make, shape["format"], batch, inner, dim),
        "up": random_matrix(make, shape["format"], batch, inner, dim),
        "down": random_matrix(make, shape["format"], batch, dim, inner),
        "topk_ids": make.integers(-1, batch, tokens, k),
        "topk_weights": make.uniform(tokens, k),
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # As in `gemm`, to first order: a product is off by its steps times the sum of magnitudes, and by rounding
    # weights and its result to the type of x. |silu(g)| <= |g| and |silu'| <= 1.1 carry it through.
    u = 2 * unit_roundoff(args["x"].dtype)
    steps = EPS32 * (2 * max(args["gate"].cols, args["down"].cols) + 8)
    ids, k = args["topk_ids"].flatten(), args["topk_ids"].shape[1]
    rows = args["x"].double().abs().repeat_interleave(k, 0)
    sizes = [_products(rows, dense(args[n], magnitude=True).double(), ids) for n in ("gate", "up")]
    gate, up = sizes
    error = (u + steps) * 4 * gate * up + 1e-6
    down = dense(args["down"], magnitude=True).double()
    moved = _products(error, down, ids) + (u + steps) * _products(gate * up, down, ids)
    weights = args["topk_weights"].double()[..., None]
    return (1.1 * (moved.unflatten(0, (-1, k)) * weights).sum(1) + 1e-6,)


def _work(shape: Shape) -> Work:
    slots = shape["num_tokens"] * shape["k"]
    used = min(shape["batch"], slots)
    weights = 3 * shape["dim"] * shape["inner"]
    fmt = FORMATS[shape["format"]]
    moved = used * weights // fmt.block_cols * fmt.plane_bytes + 2 * slots * (
        3 * shape["inner"] + 4 * shape["dim"]
    )
    return Work(moved, 2 * weights * slots)


OPS = (
    Op(
        name="experts",
        plan=plan_experts,
        reference=experts_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=({"format": "Q8_0", "num_tokens": 3, "dim": 64, "inner": 96, "batch": 3, "k": 2},),
        production_shapes=(
            {"format": "Q4_K", "num_tokens": 512, "dim": 7168, "inner": 2048, "batch": 32, "k": 8},
            {"format": "IQ2_XXS", "num_tokens": 16, "dim": 7168, "inner": 2048, "batch": 64, "k": 8},
        ),
        work=_work,
        any_dtype=False,
        targets=(86, 90),
    ),
)
