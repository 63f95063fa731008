"""Experts of each token from router logits: softmax, or sigmoid with a bias; groups chosen first where there
are any.

Softmax families (DeepSeek-V2) score a group by its maximum, sigmoid families (V3) by the sum of its two best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.launch import Launch, Plan, check, check_tensor, power_of_two
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work
from hybrid.kernels.gpu.target import Target, target_of

_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def choose(values, index, size: tl.constexpr):
    """The largest value's index, the lowest of equals; values are finite or, once chosen, -infinity."""
    largest = tl.max(tl.max(values, axis=1), axis=0)
    return tl.min(tl.min(tl.where(values == largest, index, size), axis=1), axis=0)


@triton.jit
def route_kernel(
    logits,
    bias,
    ids,
    weights,
    num_experts,
    num_groups,
    topk_groups,
    k,
    scaling,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program for each token; experts are a tile of groups."""
    token = tl.program_id(0).to(tl.int64)
    width = num_experts // num_groups
    group, place = tl.arange(0, GROUPS)[:, None], tl.arange(0, WIDTH)[None, :]
    expert = group * width + place
    real = (group < num_groups) & (place < width)
    x = tl.load(logits + token * num_experts + expert, mask=real, other=float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        powers = tl.exp(x - tl.max(tl.max(x, axis=1), axis=0))
        scores = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=real, other=0.0)
    # NaN is the last choice, as on the CPU; places without an expert are none.
    choice = tl.where(real, tl.where(choice == choice, choice, _LOWEST), float("-inf"))
    if GROUPS > 1:
        best = tl.max(choice, axis=1)
        if SIGMOID:
            at = tl.min(tl.where(choice == best[:, None], place, WIDTH), axis=1)
            best += tl.max(tl.where(place == at[:, None], float("-inf"), choice), axis=1)
        best = best[:, None]
        chosen = group < 0
        for _ in range(topk_groups):
            taken = choose(best, group, GROUPS)
            chosen = chosen | (group == taken)
            best = tl.where(group == taken, float("-inf"), best)
        choice = tl.where(chosen, choice, float("-inf"))
    total = 0.0
    for i in range(k):
        taken = choose(choice, expert, GROUPS * WIDTH)
        # Padding places repeat the numbers of other groups' experts.
        hit = (expert == taken) & real
        score = tl.sum(tl.sum(tl.where(hit, scores, 0.0), axis=1), axis=0)
        total += score
        tl.store(ids + token * k + i, taken)
        tl.store(weights + token * k + i, score * scaling)
        choice = tl.where(hit, float("-inf"), choice)
    if NORMALISE:
        tl.debug_barrier()
        for i in range(k):
            weight = tl.load(weights + token * k + i)
            tl.store(weights + token * k + i, weight / (total + 1e-20))


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    width = shape["num_experts"] // shape["num_groups"]
    return {"GROUPS": power_of_two(shape["num_groups"]), "WIDTH": power_of_two(width)}


def plan_route(
    target: Target,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    scoring: str,
    num_groups: int = 1,
    topk_groups: int = 1,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
) -> Plan:
    num_tokens, num_experts = logits.shape
    check_tensor("route", "logits", logits, (None, None), (torch.float32,), logits.device)
    if bias is not None:
        check_tensor("route", "bias", bias, (num_experts,), (torch.float32,), logits.device)
    check(scoring in ("softmax", "sigmoid"), "route", "softmax or sigmoid", scoring)
    fits = num_groups >= 1 and num_experts % num_groups == 0 and 1 <= topk_groups <= num_groups
    groups = f"{topk_groups} of {num_groups}"
    check(fits, "route", f"groups of equal size among {num_experts} experts, and at least one chosen", groups)
    eligible = num_experts // num_groups * topk_groups
    check(1 <= k <= eligible, "route", f"1 to {eligible} experts a token", k)
    two_best = scoring == "sigmoid" and num_groups > 1
    check(
        not two_best or num_experts // num_groups >= 2, "route", "groups of two experts or more", num_groups
    )
    config = launch_config({"num_experts": num_experts, "num_groups": num_groups}, logits.dtype, target)
    ids = torch.empty(num_tokens, k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, k, dtype=torch.float32, device=logits.device)
    args = {
        "logits": logits, "bias": bias, "ids": ids, "weights": weights, "num_experts": num_experts,
        "num_groups": num_groups, "topk_groups": topk_groups, "k": k, "scaling": float(routed_scaling_factor),
    }  # fmt: skip
    flags = {"SIGMOID": scoring == "sigmoid", "HAS_BIAS": bias is not None, "NORMALISE": norm_topk_prob}
    return Plan(
        (Launch(route_kernel, (num_tokens,), args, {**flags, **config}, num_warps=1),), (ids, weights)
    )


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    scoring: str,
    num_groups: int = 1,
    topk_groups: int = 1,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Int32 ids and float32 weights ``[T, k]`` from float32 logits ``[T, num_experts]``.

    The bias, float32 ``[num_experts]``, takes part in the choice, not in the weights. Ids are sorted by
    descending choice, ties by ascending id.

    Raises:
        ValueError: a shape, type or number does not fit.
    """
    ids, weights = plan_route(
        target_of(logits.device), logits, bias, k, scoring, num_groups, topk_groups, norm_topk_prob,
        routed_scaling_factor,
    ).run()  # fmt: skip
    return ids, weights


def route_torch(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    scoring: str,
    num_groups: int = 1,
    topk_groups: int = 1,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    x = logits.double()
    scores = x.sigmoid() if scoring == "sigmoid" else x.softmax(-1)
    choice = scores if bias is None else scores + bias.double()
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.amax(-1) if scoring == "softmax" else grouped.topk(2, -1).values.sum(-1)
        chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :topk_groups]
        keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
        choice = torch.where(keep[..., None], grouped, -torch.inf).flatten(1)
    ids = choice.argsort(dim=-1, descending=True, stable=True)[:, :k]
    weights = scores.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids.int(), weights * routed_scaling_factor


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    # Few different logits: equal ones are frequent, others are far enough apart to be told apart by any
    # exponential.
    logits = (make.normal(shape["num_tokens"], shape["num_experts"], dtype=torch.float32) * 8).round() / 8
    sigmoid = shape["scoring"] == "sigmoid"
    bias = make.normal(shape["num_experts"], dtype=torch.float32, scale=0.1) if sigmoid else None
    return {
        "logits": logits,
        "bias": bias,
        "k": shape["k"],
        "scoring": shape["scoring"],
        "num_groups": shape["groups"][0],
        "topk_groups": shape["groups"][1],
        "norm_topk_prob": sigmoid,
        "routed_scaling_factor": 2.5 if sigmoid else 1.0,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # The exponential: its argument's rounding times log2(e), 2 ulp of the instruction; sums of positive
    # terms; quotients.
    largest = float(args["logits"].abs().max())
    relative = EPS32 * (2 * 1.5 * 2 * largest + 2 + args["logits"].shape[1] / 2 + args["k"] + 8)
    return (0.0, relative * refs[1])


def _shape(num_tokens: int, num_experts: int, k: int, scoring: str, groups: tuple[int, int]) -> Shape:
    return {
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "k": k,
        "scoring": scoring,
        "groups": groups,
    }


OPS = (
    Op(
        name="route",
        plan=plan_route,
        reference=route_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(
            _shape(4, 24, 6, "softmax", (1, 1)),
            _shape(4, 60, 6, "softmax", (6, 2)),
            _shape(4, 64, 8, "sigmoid", (8, 4)),
            _shape(3, 48, 48, "sigmoid", (1, 1)),
        ),
        production_shapes=(
            _shape(16, 256, 8, "sigmoid", (8, 4)),
            _shape(16, 64, 6, "softmax", (1, 1)),
            _shape(16, 160, 6, "softmax", (8, 3)),
            _shape(16, 384, 8, "sigmoid", (1, 1)),
        ),
        work=lambda s: Work(4 * s["num_tokens"] * (s["num_experts"] + 2 * s["k"])),
        any_dtype=False,
    ),
)
