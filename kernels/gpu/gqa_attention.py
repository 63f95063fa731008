"""Attention with grouped heads (GQA) over a paged cache of keys and values.

A program takes the query heads of one key head, padded to 16 rows. Splits, tiles and their order are those of
`mla_attention`: decoding cuts keys into splits of 512, a prompt takes them in one ascending pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check, check_tensor, power_of_two
from hybrid.kernels.gpu.mla_attention import BLOCK_SIZE, SPLIT, merge_launch
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work, unit_roundoff
from hybrid.kernels.gpu.target import Target, target_of

_LOG2_E = 1.4426950408889634


@triton.jit
def gqa_attention_kernel(
    q,
    keys,
    values,
    tables,
    kv_lens,
    out,
    sums,
    num_tokens,
    num_heads,
    num_kv_heads,
    table_stride,
    num_splits,
    scale_log2,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The query heads of key head ``program_id(0)`` for TOKENS tokens; ``out`` and ``sums`` as in MLA."""
    kind = q.dtype.element_ty
    kv_head = tl.program_id(0)
    group = num_heads // num_kv_heads
    r = tl.arange(0, TOKENS * HEADS)
    wanted = tl.program_id(1) * TOKENS + r // HEADS
    token = tl.minimum(wanted, num_tokens - 1)
    real = (r % HEADS < group) & (wanted < num_tokens)
    head = kv_head * group + tl.minimum(r % HEADS, group - 1)
    kv_len = tl.load(kv_lens + token)
    split = tl.program_id(2)
    begin = split * SPLIT
    end = tl.max(kv_len, axis=0)
    if SPLIT > 0:
        end = tl.minimum(end, begin + SPLIT)
    row = (token.to(tl.int64) * num_heads + head)[:, None]
    col = tl.arange(0, DIM)[None, :]
    query = tl.load(q + row * DIM + col, mask=real[:, None], other=0.0)
    table = tables + tl.program_id(1).to(tl.int64) * TOKENS * table_stride
    best = tl.full([TOKENS * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    context = tl.zeros([TOKENS * HEADS, DIM], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        slot = block * BLOCK_SIZE + start % BLOCK_SIZE + tl.arange(0, KEYS)
        at = (slot[:, None] * num_kv_heads + kv_head) * DIM + col
        k = tl.load(keys + at, mask=(key < end)[:, None], other=0.0).to(kind)
        v = tl.load(values + at, mask=(key < end)[:, None], other=0.0).to(kind)
        score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale_log2
        score = tl.where(key[None, :] < kv_len[:, None], score, float("-inf"))
        # Key 0 of a split is visible to all rows of a program: the maximum is finite from the first tile on.
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        context = tl.dot(weight.to(kind), v, context * shrink[:, None], input_precision=PRECISION)
        best = higher
    if (SPLIT == 0) | (begin < end):
        place = row * num_splits + split
        if SPLIT > 0:
            tl.store(out + place * DIM + col, context, mask=real[:, None])
            pair = sums + 2 * tl.reshape(place, [TOKENS * HEADS])
            tl.store(pair, best, mask=real)
            tl.store(pair + 1, total, mask=real)
        else:
            result = (context / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + place * DIM + col, result, mask=real[:, None])


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    heads = power_of_two(shape["group"])
    if shape["decode"]:
        return {"TOKENS": 1, "HEADS": max(16, heads), "KEYS": 64, "SPLIT": SPLIT}
    return {"TOKENS": max(1, 64 // heads), "HEADS": heads, "KEYS": 64, "SPLIT": 0}


def plan_gqa_attention(
    target: Target,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
) -> Plan:
    op, device = "gqa_attention", q.device
    num_tokens, num_heads, dim = q.shape
    num_slots, num_kv_heads, _ = keys.shape
    check_tensor(op, "q", q, (None, None, None), FLOATS, device)
    check(16 <= dim <= 256 and dim & (dim - 1) == 0, op, "a head of 16 to 256, a power of two", dim)
    check_tensor(op, "keys", keys, (None, None, dim), FLOATS, device)
    check_tensor(op, "values", values, (num_slots, num_kv_heads, dim), (keys.dtype,), device)
    check(num_slots % BLOCK_SIZE == 0, op, "whole blocks of 64 slots", num_slots)
    fits = num_heads % num_kv_heads == 0 and num_heads // num_kv_heads <= 64
    check(fits, op, "1 to 64 query heads for each key head", (num_heads, num_kv_heads))
    decode = block_tables.dim() == 2
    tables = (num_tokens, None) if decode else (None,)
    check_tensor(op, "block_tables", block_tables, tables, (torch.int32,), device, contiguous=False)
    check(block_tables.stride(-1) == 1, op, "contiguous block tables", block_tables.stride())
    check_tensor(op, "kv_lens", kv_lens, (num_tokens,), (torch.int32,), device)
    config = launch_config({"group": num_heads // num_kv_heads, "decode": decode}, q.dtype, target)
    num_splits = triton.cdiv(block_tables.shape[-1] * BLOCK_SIZE, SPLIT) if decode else 1
    out = torch.empty_like(q)
    parts, sums = out, None
    if decode:
        size = (num_tokens, num_heads, num_splits)
        parts = torch.empty(*size, dim, dtype=torch.float32, device=device)
        sums = torch.empty(*size, 2, dtype=torch.float32, device=device)
    args = {
        "q": q, "keys": keys, "values": values, "tables": block_tables, "kv_lens": kv_lens, "out": parts,
        "sums": sums, "num_tokens": num_tokens, "num_heads": num_heads, "num_kv_heads": num_kv_heads,
        "table_stride": block_tables.stride(0) if decode else 0, "num_splits": num_splits,
        "scale_log2": scale * _LOG2_E,
    }  # fmt: skip
    precision = "ieee" if q.dtype is torch.float32 else "tf32"
    constants = {"DIM": dim, "PRECISION": precision, "BLOCK_SIZE": BLOCK_SIZE, **config}
    grid = (num_kv_heads, triton.cdiv(num_tokens, config["TOKENS"]), num_splits)
    launches = [Launch(gqa_attention_kernel, grid, args, constants, num_warps=4 if decode else 8)]
    if sums is not None:
        launches.append(merge_launch(parts, sums, kv_lens, out))
    return Plan(tuple(launches), (out,))


def gqa_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``[T, heads, dim]``: each token attends to the first ``kv_lens[t]`` keys (at least 1) of its sequence.

    ``q`` is ``[T, heads, dim]``; ``keys`` and ``values`` are ``[slots, kv_heads, dim]``, and query head ``h``
    reads key head ``h // (heads / kv_heads)``. Block tables and lengths as in `mla_attention.mla_attention`.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_gqa_attention(target_of(q.device), q, keys, values, block_tables, kv_lens, scale).run()[0]


def gqa_attention_torch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // keys.shape[1]
    for token, length in enumerate(kv_lens.tolist()):
        table = (block_tables[token] if block_tables.dim() == 2 else block_tables).long()
        at = torch.arange(length)
        slots = table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        k = keys[slots].double().repeat_interleave(group, 1)
        v = values[slots].double().repeat_interleave(group, 1)
        weights = torch.softmax(torch.einsum("hd,khd->hk", q[token].double(), k) * scale, -1)
        out[token] = torch.einsum("hk,khd->hd", weights, v)
    return (out,)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    num_tokens, longest, dim = shape["num_tokens"], max(shape["kv_lens"]), shape["dim"]
    num_seqs, num_blocks = num_tokens if shape["decode"] else 1, triton.cdiv(longest, BLOCK_SIZE)
    num_slots = num_seqs * num_blocks * BLOCK_SIZE
    lens = [shape["kv_lens"][t % len(shape["kv_lens"])] for t in range(num_tokens)]
    if not shape["decode"]:
        lens = list(range(longest - num_tokens + 1, longest + 1))

    def tables() -> torch.Tensor:
        return torch.randperm(num_seqs * num_blocks, generator=make.generator)

    table_size = (num_seqs, num_blocks) if shape["decode"] else (num_blocks,)
    return {
        "q": make.normal(num_tokens, shape["heads"], dim),
        "keys": make.normal(num_slots, shape["kv_heads"], dim),
        "values": make.normal(num_slots, shape["kv_heads"], dim),
        "block_tables": make.values(table_size, torch.int32, tables),
        "kv_lens": make.values((num_tokens,), torch.int32, lambda: torch.tensor(lens)),
        "scale": dim**-0.5,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # As for MLA: the error of a score, that of rounding softmax weights, of float32 sums, of the result.
    u, dim = unit_roundoff(args["q"].dtype), args["q"].shape[-1]
    terms = float(args["q"].double().abs().sum(-1).max() * args["keys"].double().abs().max()) * args["scale"]
    delta = terms * EPS32 * (dim + 2) + 2 * EPS32 * 32
    largest, keys = float(args["values"].double().abs().max()), float(args["kv_lens"].max())
    return (largest * (2 * delta + u + EPS32 * (2 * keys + 8)) + u * refs[0].abs(),)


def _work(shape: Shape) -> Work:
    keys, seqs = max(shape["kv_lens"]), shape["num_tokens"] if shape["decode"] else 1
    moved = 4 * seqs * keys * shape["kv_heads"] * shape["dim"]
    return Work(moved, 4 * shape["num_tokens"] * shape["heads"] * keys * shape["dim"])


def _shape(decode: bool, num_tokens: int, heads: tuple[int, int], dim: int, *kv_lens: int) -> Shape:
    return {
        "decode": decode,
        "num_tokens": num_tokens,
        "heads": heads[0],
        "kv_heads": heads[1],
        "dim": dim,
        "kv_lens": kv_lens,
    }


OPS = (
    Op(
        name="gqa_decode",
        plan=plan_gqa_attention,
        reference=gqa_attention_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(_shape(True, 2, (6, 2), 32, 1, 513), _shape(True, 1, (17, 1), 16, 40)),
        production_shapes=(_shape(True, 16, (32, 8), 128, 32768), _shape(True, 16, (96, 8), 128, 32768)),
        work=_work,
    ),
    Op(
        name="gqa_prefill",
        plan=plan_gqa_attention,
        reference=gqa_attention_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(_shape(False, 19, (6, 2), 32, 70), _shape(False, 3, (2, 2), 16, 3)),
        production_shapes=(_shape(False, 2048, (32, 8), 128, 2048),),
        work=_work,
    ),
)
