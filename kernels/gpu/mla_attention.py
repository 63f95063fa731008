"""Attention over the latent cache (MLA, absorbed): every head reads the same rows of 512 + 64 numbers.

Scores are ``(q_latent · latent + q_pe · k_pe) * scale``; values are the latents themselves. K and V are
never made. The cache
is paged: a row's slot is ``block_table[position // 64] * 64 + position % 64``.

Decoding cuts the keys into splits of 512, so that few sequences fill the GPU; splits are merged in ascending
order. A prompt takes its keys in one ascending pass. Both go in tiles of 32 or 16 keys from key 0 of a split,
whatever else is in the batch: a token's result is the same bits alone and in any batch, and however a prompt
is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.cache_append import Q8_BLOCK, cache_append_torch, dequantize_rows
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work, unit_roundoff
from hybrid.kernels.gpu.target import Target, target_of

BLOCK_SIZE = 64
SPLIT = 512
_LOG2_E = 1.4426950408889634


@triton.jit
def load_rows(
    codes,
    scales,
    slot,
    there,
    row_dim,
    FIRST: tl.constexpr,
    DIM: tl.constexpr,
    QUANTIZED: tl.constexpr,
    kind: tl.constexpr,
):
    """``[keys, DIM]`` numbers of cache rows from column ``FIRST``, as ``kind``; 0 where not ``there``."""
    if QUANTIZED:
        group = tl.arange(0, DIM // 32)[None, :, None]
        col = FIRST + 32 * group + tl.arange(0, 32)[None, None, :]
        ok = there[:, None, None]
        at = slot[:, None, None]
        code = tl.load(codes + at * row_dim + col, mask=ok, other=0).to(tl.float32)
        scale = tl.load(scales + at * (row_dim // 32) + FIRST // 32 + group, mask=ok, other=0.0).to(
            tl.float32
        )
        return tl.reshape(code * scale, [slot.shape[0], DIM]).to(kind)
    else:
        col = FIRST + tl.arange(0, DIM)[None, :]
        return tl.load(codes + slot[:, None] * row_dim + col, mask=there[:, None], other=0.0).to(kind)


@triton.jit
def mla_attention_kernel(
    q_latent,
    q_pe,
    codes,
    scales,
    tables,
    kv_lens,
    out,
    sums,
    num_tokens,
    num_heads,
    q_stride,
    q_head_stride,
    table_stride,
    num_splits,
    scale_log2,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """HEADS heads of TOKENS tokens of one sequence; with SPLIT 0 over all keys, or over split
    ``program_id(2)``.

    ``out`` is ``[T, heads, splits, LATENT]``; with splits also ``sums`` ``[T, heads, splits, 2]``: maximum
    and sum.
    """
    kind = q_latent.dtype.element_ty
    r = tl.arange(0, TOKENS * HEADS)
    token = tl.minimum(tl.program_id(1) * TOKENS + r // HEADS, num_tokens - 1)
    head = tl.program_id(0) * HEADS + r % HEADS
    split = tl.program_id(2)
    real = (head < num_heads) & (tl.program_id(1) * TOKENS + r // HEADS < num_tokens)
    kv_len = tl.load(kv_lens + token)
    begin = split * SPLIT
    end = tl.max(kv_len, axis=0)
    if SPLIT > 0:
        end = tl.minimum(end, begin + SPLIT)
    row = (token.to(tl.int64) * num_heads + tl.minimum(head, num_heads - 1))[:, None]
    q = tl.load(q_latent + row * LATENT + tl.arange(0, LATENT)[None, :], mask=real[:, None], other=0.0)
    pe_row = token.to(tl.int64) * q_stride + tl.minimum(head, num_heads - 1) * q_head_stride
    pe_at = q_pe + pe_row[:, None] + tl.arange(0, ROPE)[None, :]
    pe = tl.load(pe_at, mask=real[:, None], other=0.0)
    table = tables + tl.program_id(1).to(tl.int64) * TOKENS * table_stride
    best = tl.full([TOKENS * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    context = tl.zeros([TOKENS * HEADS, LATENT], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        slot = block * BLOCK_SIZE + start % BLOCK_SIZE + tl.arange(0, KEYS)
        latent = load_rows(codes, scales, slot, key < end, LATENT + ROPE, 0, LATENT, QUANTIZED, kind)
        k_pe = load_rows(codes, scales, slot, key < end, LATENT + ROPE, LATENT, ROPE, QUANTIZED, kind)
        score = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
        score = tl.dot(pe, tl.trans(k_pe), score, input_precision=PRECISION) * scale_log2
        score = tl.where(key[None, :] < kv_len[:, None], score, float("-inf"))
        # Key 0 of a split is visible to all rows of a program, so the maximum is finite from the first tile
        # on.
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        context = tl.dot(weight.to(kind), latent, context * shrink[:, None], input_precision=PRECISION)
        best = higher
    if (SPLIT == 0) | (begin < end):
        place = row * num_splits + split
        at = out + place * LATENT + tl.arange(0, LATENT)[None, :]
        if SPLIT > 0:
            tl.store(at, context, mask=real[:, None])
            pair = sums + 2 * tl.reshape(place, [TOKENS * HEADS])
            tl.store(pair, best, mask=real)
            tl.store(pair + 1, total, mask=real)
        else:
            tl.store(at, (context / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])


@triton.jit
def mla_merge_kernel(
    parts, sums, kv_lens, out, num_heads, num_splits, LATENT: tl.constexpr, SPLIT: tl.constexpr
):
    """One head of a token: its splits in ascending order."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, LATENT)
    num_used = (tl.load(kv_lens + row // num_heads) + SPLIT - 1) // SPLIT
    best = float("-inf")
    total = 0.0
    context = tl.zeros([LATENT], tl.float32)
    for split in range(num_used):
        place = row * num_splits + split
        maximum = tl.load(sums + 2 * place)
        higher = tl.maximum(best, maximum)
        shrink, grow = tl.exp2(best - higher), tl.exp2(maximum - higher)
        context = context * shrink + tl.load(parts + place * LATENT + col) * grow
        total = total * shrink + tl.load(sums + 2 * place + 1) * grow
        best = higher
    tl.store(out + row * LATENT + col, (context / total).to(out.dtype.element_ty))


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    """16 heads by 32 keys: with 512 + 64 columns hardly more fits 99 KiB. Prompts take two tokens at once."""
    decode = shape["decode"]
    quantized = shape["quantized"]  # codes on their way to numbers take registers
    if decode or quantized:
        split, num_warps = SPLIT if decode else 0, 8 if quantized else 4
        return {"TOKENS": 1, "HEADS": 16, "KEYS": 32, "SPLIT": split, "num_warps": num_warps}
    keys = 32 if target.shared_bytes > 99 << 10 else 16
    return {"TOKENS": 2, "HEADS": 16, "KEYS": keys, "SPLIT": 0, "num_warps": 8}


def merge_launch(parts: torch.Tensor, sums: torch.Tensor, kv_lens: torch.Tensor, out: torch.Tensor) -> Launch:
    """Splits ``[T, heads, splits, dim]`` with their maxima and sums to ``[T, heads, dim]``."""
    num_tokens, num_heads, num_splits, dim = parts.shape
    args = {"parts": parts, "sums": sums, "kv_lens": kv_lens, "out": out}
    counts = {"num_heads": num_heads, "num_splits": num_splits}
    constants = {"LATENT": dim, "SPLIT": SPLIT}
    return Launch(mla_merge_kernel, (num_tokens * num_heads,), {**args, **counts}, constants, num_warps=1)


def plan_mla_attention(
    target: Target,
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
) -> Plan:
    op, device = "mla_attention", q_latent.device
    num_tokens, num_heads, latent = q_latent.shape
    rope = q_pe.shape[-1]
    check_tensor(op, "q_latent", q_latent, (None, None, None), FLOATS, device)
    check_tensor(op, "q_pe", q_pe, (num_tokens, num_heads, None), (q_latent.dtype,), device, contiguous=False)
    check(q_pe.stride(2) == 1, op, "q_pe with contiguous heads", f"strides {q_pe.stride()}")
    for name, dim in (("latent", latent), ("rope", rope)):
        check(
            dim >= 16 and dim & (dim - 1) == 0, op, f"a power of two, at least 16, as {name} dimension", dim
        )
    kinds = (torch.int8,) if scales is not None else FLOATS
    check_tensor(op, "cache", codes, (None, latent + rope), kinds, device)
    check(codes.shape[0] % BLOCK_SIZE == 0, op, "whole blocks of 64 slots", codes.shape[0])
    if scales is not None:
        check(latent % Q8_BLOCK == 0 and rope % Q8_BLOCK == 0, op, "multiples of 32 columns", (latent, rope))
        size = (codes.shape[0], (latent + rope) // Q8_BLOCK)
        check_tensor(op, "scales", scales, size, (torch.float16,), device)
    decode = block_tables.dim() == 2
    tables = (num_tokens, None) if decode else (None,)
    check_tensor(op, "block_tables", block_tables, tables, (torch.int32,), device, contiguous=False)
    check(block_tables.stride(-1) == 1, op, "contiguous block tables", block_tables.stride())
    check_tensor(op, "kv_lens", kv_lens, (num_tokens,), (torch.int32,), device)
    config = launch_config({"decode": decode, "quantized": scales is not None}, q_latent.dtype, target)
    num_warps = config.pop("num_warps")
    num_splits = triton.cdiv(block_tables.shape[-1] * BLOCK_SIZE, SPLIT) if decode else 1
    out = torch.empty_like(q_latent)
    parts, sums = out, None
    if decode:
        parts = torch.empty(num_tokens, num_heads, num_splits, latent, dtype=torch.float32, device=device)
        sums = torch.empty(num_tokens, num_heads, num_splits, 2, dtype=torch.float32, device=device)
    args = {
        "q_latent": q_latent, "q_pe": q_pe, "codes": codes, "scales": scales, "tables": block_tables,
        "kv_lens": kv_lens, "out": parts, "sums": sums, "num_tokens": num_tokens, "num_heads": num_heads,
        "q_stride": q_pe.stride(0), "q_head_stride": q_pe.stride(1),
        "table_stride": block_tables.stride(0) if decode else 0, "num_splits": num_splits,
        "scale_log2": scale * _LOG2_E,
    }  # fmt: skip
    constants = {
        "LATENT": latent,
        "ROPE": rope,
        "QUANTIZED": scales is not None,
        "PRECISION": "ieee" if q_latent.dtype is torch.float32 else "tf32",
        "BLOCK_SIZE": BLOCK_SIZE,
        **config,
    }
    head_blocks, token_blocks = (
        triton.cdiv(num_heads, config["HEADS"]),
        triton.cdiv(num_tokens, config["TOKENS"]),
    )
    grid = (head_blocks, token_blocks, num_splits)
    launches = [Launch(mla_attention_kernel, grid, args, constants, num_warps=num_warps)]
    if sums is not None:
        launches.append(merge_launch(parts, sums, kv_lens, out))
    return Plan(tuple(launches), (out,))


def mla_attention(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``[T, heads, latent]``: each token attends to the first ``kv_lens[t]`` rows (at least 1) of its
    sequence.

    ``q_latent`` is ``[T, heads, latent]``, ``q_pe`` ``[T, heads, rope]`` of the same type, perhaps a view.
    The cache is that of `cache_append`: ``codes`` ``[slots, latent + rope]`` and, for q8_0, ``scales``.
    int32 ``block_tables`` ``[T, max_blocks]`` hold a sequence for each token: decoding, with splits. A
    single one, ``[max_blocks]``, is
    that of all tokens: the chunk of a prompt.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    plan = plan_mla_attention(
        target_of(q_latent.device), q_latent, q_pe, codes, scales, block_tables, kv_lens, scale
    )
    return plan.run()[0]


def mla_attention_torch(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    latent_dim = q_latent.shape[-1]
    out = torch.zeros(q_latent.shape, dtype=torch.float64)
    for token, length in enumerate(kv_lens.tolist()):
        table = (block_tables[token] if block_tables.dim() == 2 else block_tables).long()
        at = torch.arange(length)
        slots = table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        rows = dequantize_rows(codes[slots], None if scales is None else scales[slots])
        q = torch.cat((q_latent[token], q_pe[token]), -1).double()
        out[token] = torch.softmax(q @ rows.T * scale, -1) @ rows[:, :latent_dim]
    return (out,)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    num_tokens, heads, latent, rope = (shape[k] for k in ("num_tokens", "heads", "latent", "rope"))
    dim, lens, num_blocks = latent + rope, shape["kv_lens"], triton.cdiv(max(shape["kv_lens"]), BLOCK_SIZE)
    num_seqs = num_tokens if shape["decode"] else 1
    cache_slots = num_seqs * num_blocks * BLOCK_SIZE
    quantized = shape["cache"] == "q8_0"

    def tables() -> torch.Tensor:
        return torch.randperm(num_seqs * num_blocks, generator=make.generator)

    codes, scales = make.normal(cache_slots, dim), None
    if quantized and make.real:
        rows, slots = codes.cpu(), torch.arange(cache_slots, dtype=torch.int32)
        codes = torch.zeros(cache_slots, dim, dtype=torch.int8)
        scales = torch.zeros(cache_slots, dim // Q8_BLOCK, dtype=torch.float16)
        cache_append_torch(rows, slots, codes, scales)
        codes, scales = codes.to(make.device), scales.to(make.device)
    elif quantized:
        codes = codes.to(torch.int8)
        scales = torch.empty(cache_slots, dim // Q8_BLOCK, dtype=torch.float16, device=make.device)
    kv_lens = [lens[t % len(lens)] for t in range(num_tokens)]
    if not shape["decode"]:
        kv_lens = list(range(max(lens) - num_tokens + 1, max(lens) + 1))
    return {
        "q_latent": make.normal(num_tokens, heads, latent),
        "q_pe": make.normal(num_tokens, heads, 2 * rope)[:, :, rope:],
        "codes": codes,
        "scales": scales,
        "block_tables": make.values(
            (num_seqs, num_blocks) if shape["decode"] else (num_blocks,), torch.int32, tables
        ),
        "kv_lens": make.values((num_tokens,), torch.int32, lambda: torch.tensor(kv_lens)),
        "scale": dim**-0.5,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # A score is off by delta, softmax weights by a factor e^(2 delta), their rounding to the type of q by u,
    # float32 sums by the number of terms; a row of the cache in the type of q by u where it is q8_0.
    u, dim = unit_roundoff(args["q_latent"].dtype), args["codes"].shape[1]
    rows = dequantize_rows(args["codes"], args["scales"]).abs()
    q = torch.cat((args["q_latent"], args["q_pe"]), -1).double().abs()
    terms = float(q.sum(-1).max() * rows.max()) * args["scale"]
    row_error = u if args["scales"] is not None else 0.0
    delta = terms * (EPS32 * (dim + 2) + row_error) + 2 * EPS32 * 32
    keys = float(args["kv_lens"].max())
    relative = 2 * delta + u + EPS32 * (2 * keys + 8) + row_error
    return (float(rows.max()) * relative + u * refs[0].abs(),)


def _work(shape: Shape) -> Work:
    dim, keys = shape["latent"] + shape["rope"], max(shape["kv_lens"])
    seqs = shape["num_tokens"] if shape["decode"] else 1
    row_bytes = dim + dim // 16 if shape["cache"] == "q8_0" else 2 * dim
    ops = 2 * shape["num_tokens"] * shape["heads"] * keys * (dim + shape["latent"])
    return Work(seqs * keys * row_bytes + 4 * shape["num_tokens"] * shape["heads"] * dim, ops)


def _shape(
    decode: bool, cache: str, num_tokens: int, heads: int, dims: tuple[int, int], *kv_lens: int
) -> Shape:
    return {
        "decode": decode,
        "cache": cache,
        "num_tokens": num_tokens,
        "heads": heads,
        "latent": dims[0],
        "rope": dims[1],
        "kv_lens": kv_lens,
    }


def _op(decode: bool, cache: str) -> Op:
    small, real = (64, 32), (512, 64)
    lens = ((1, 513), (40,)) if decode else ((3,), (70,))
    batches = ((16, 16, 32768), (8, 128, 32768)) if decode else ((2048, 128, 2048), (2048, 16, 2048))
    return Op(
        name=f"mla_{'decode' if decode else 'prefill'}_{cache}",
        plan=plan_mla_attention,
        reference=mla_attention_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=tuple(
            _shape(decode, cache, 3, heads, small, *kv) for heads, kv in zip((3, 17), lens, strict=True)
        ),
        production_shapes=tuple(_shape(decode, cache, t, heads, real, kv) for t, heads, kv in batches),
        work=_work,
    )


OPS = tuple(_op(decode, cache) for decode in (True, False) for cache in ("float", "q8_0"))
