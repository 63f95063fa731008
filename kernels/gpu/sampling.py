"""A token for each row of logits: temperature, top-k, top-p, min-p, from uniform numbers that the caller
gives.

Three filters are thresholds on the same order of logits, so nothing is sorted: the smallest logit that
top-k, then top-p and min-p admit is found by bisection on the order of float32 numbers, 32 steps that are
exact. Tokens equal to the threshold stay together. The draw walks the vocabulary in its own order. The same
row and number give the same token in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.launch import Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import Make, Op, Shape, Work
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def number_of(order):
    """The float32 at a place in the order of all float32 numbers: int32, ascending."""
    bits = tl.where(order >= 0, order, order ^ 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def order_of(x):
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def mass_above(row, vocab, threshold, largest, inverse, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits are at least ``threshold``, or with COUNT false the sum of their exponentials."""
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, vocab, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        weight = tl.full([BLOCK], 1.0, tl.float32) if COUNT else tl.exp((x - largest) * inverse)
        total += tl.where((x >= threshold) & (at < vocab), weight, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def sample_kernel(logits, temperatures, top_ks, top_ps, min_ps, uniforms, ids, vocab, BLOCK: tl.constexpr):
    """One program for each row."""
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * vocab
    temperature = tl.load(temperatures + number)
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, vocab, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        maximum = tl.maximum(maximum, tl.load(row + at, mask=at < vocab, other=float("-inf")))
    largest = tl.max(maximum, axis=0)
    # Temperature 0 is greedy: the first of the largest.
    greedy = temperature == 0.0
    inverse = 1.0 / tl.where(greedy, 1.0, temperature)
    threshold = tl.where(greedy, largest, float("-inf"))
    min_p = tl.load(min_ps + number)
    if min_p > 0.0:
        threshold = tl.maximum(threshold, largest + tl.log(min_p) * temperature)
    top_k = tl.load(top_ks + number)
    if (top_k > 0) & (top_k < vocab):
        # The largest threshold that admits top_k: admitting is monotone, so halve what lies between.
        low, high = (
            order_of(tl.full([1], -3.0e38, tl.float32)).to(tl.int64),
            order_of(tl.full([1], 0.0, tl.float32) + largest).to(tl.int64),
        )
        for _ in range(33):
            middle = low + (high - low + 1) // 2
            bound = tl.sum(number_of(middle.to(tl.int32)), axis=0)
            enough = mass_above(row, vocab, bound, largest, inverse, True, BLOCK) >= top_k
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
        threshold = tl.maximum(threshold, tl.sum(number_of(low.to(tl.int32)), axis=0))
    top_p = tl.load(top_ps + number)
    mass = mass_above(row, vocab, threshold, largest, inverse, False, BLOCK)
    if top_p < 1.0:
        wanted = top_p * mass
        low, high = (
            order_of(tl.full([1], -3.0e38, tl.float32)).to(tl.int64),
            order_of(tl.full([1], 0.0, tl.float32) + largest).to(tl.int64),
        )
        for _ in range(33):
            middle = low + (high - low + 1) // 2
            bound = tl.sum(number_of(middle.to(tl.int32)), axis=0)
            enough = mass_above(row, vocab, bound, largest, inverse, False, BLOCK) >= wanted
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
        threshold = tl.maximum(threshold, tl.sum(number_of(low.to(tl.int32)), axis=0))
        mass = mass_above(row, vocab, threshold, largest, inverse, False, BLOCK)
    target = tl.where(greedy, 0.0, tl.load(uniforms + number) * mass)
    # The first admitted token whose cumulative mass exceeds the target; by rounding there may be none: then
    # the last.
    before = 0.0
    found = vocab
    last = 0
    for begin in range(0, vocab, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        admitted = (x >= threshold) & (at < vocab)
        weight = tl.where(admitted, tl.exp((x - largest) * inverse), 0.0)
        cumulative = before + tl.cumsum(weight, axis=0)
        hit = admitted & (cumulative > target)
        found = tl.minimum(found, tl.min(tl.where(hit, at, vocab), axis=0))
        last = tl.maximum(last, tl.max(tl.where(admitted, at, 0), axis=0))
        before += tl.sum(weight, axis=0)
    tl.store(ids + number, tl.where(found < vocab, found, last))


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"BLOCK": 4096}


def plan_sample(
    target: Target,
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    uniforms: torch.Tensor,
) -> Plan:
    num_rows, vocab = logits.shape
    check_tensor("sample", "logits", logits, (None, None), (torch.float32,), logits.device)
    check(vocab > 0, "sample", "a vocabulary", vocab)
    numbers = {"temperatures": temperatures, "top_ps": top_ps, "min_ps": min_ps, "uniforms": uniforms}
    for name, tensor in numbers.items():
        check_tensor("sample", name, tensor, (num_rows,), (torch.float32,), logits.device)
    check_tensor("sample", "top_ks", top_ks, (num_rows,), (torch.int32,), logits.device)
    config = launch_config({}, logits.dtype, target)
    ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    args = {"logits": logits, **numbers, "top_ks": top_ks, "ids": ids, "vocab": vocab}
    return Plan((Launch(sample_kernel, (num_rows,), args, config, num_warps=16),), (ids,))


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """Int32 ``[n]`` token ids for float32 ``[n, vocab]`` logits with a finite maximum.

    All others are ``[n]``: temperatures (0 is greedy), int32 top_ks (0 or less is all), top_ps, min_ps, and
    uniforms in [0, 1). top_k and min_p come first; top_p then keeps the fewest of the likeliest that hold
    that share of what is left. Tokens as likely as the last one kept are kept, too.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    plan = plan_sample(target_of(logits.device), logits, temperatures, top_ks, top_ps, min_ps, uniforms)
    return plan.run()[0]


def sample_torch(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    uniforms: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    ids = []
    numbers = (t.tolist() for t in (temperatures, top_ks, top_ps, min_ps, uniforms))
    for row, temperature, k, p, min_p, uniform in zip(logits.double(), *numbers, strict=True):
        if temperature == 0:
            ids.append(int(row.argmax()))
            continue
        weight = ((row - row.max()) / temperature).exp()
        kept = weight >= min_p
        if 0 < k < len(row):
            kept &= row >= row.topk(k).values[-1]
        weight = torch.where(kept, weight, 0.0)
        if p < 1:
            values, order = row.sort(descending=True)
            before = weight[order].cumsum(0) - weight[order]
            last = values[before < p * weight.sum()][-1]
            weight = torch.where(row >= last, weight, 0.0)
        above = (weight.cumsum(0) > uniform * weight.sum()) & (weight > 0)
        ids.append(int(above.nonzero()[0]))
    return (torch.tensor(ids, dtype=torch.int32),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    n = shape["num_rows"]

    def listed(*values: float) -> torch.Tensor:
        dtype = torch.int32 if isinstance(values[0], int) else torch.float32
        return make.values((n,), dtype, lambda: torch.tensor([values[i % len(values)] for i in range(n)]))

    return {
        "logits": make.normal(n, shape["vocab"], dtype=torch.float32, scale=2.0),
        "temperatures": listed(1.0, 0.0, 0.7, 1.3, 0.9),
        "top_ks": listed(0, 0, 5, 40, 1),
        "top_ps": listed(1.0, 0.9, 0.8, 1.0, 0.5, 0.95, 0.9),
        "min_ps": listed(0.0, 0.0, 0.0, 0.05),
        "uniforms": make.uniform(n),
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # Ids are equal unless a boundary lies within the rounding of a float32 sum: about one row in a million.
    return (0.0,)


OPS = (
    Op(
        name="sample",
        plan=plan_sample,
        reference=sample_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=({"num_rows": 7, "vocab": 5000}, {"num_rows": 2, "vocab": 10}),
        production_shapes=({"num_rows": 16, "vocab": 129280}, {"num_rows": 16, "vocab": 102400}),
        work=lambda s: Work(4 * s["num_rows"] * s["vocab"]),
        any_dtype=False,
    ),
)
