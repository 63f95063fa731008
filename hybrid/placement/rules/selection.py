"""Rules against a model's tensors: which rule decides about what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hybrid.placement.memory import Tensor
from hybrid.placement.rules.rule import Rule


@dataclass(frozen=True)
class Claim:
    """A rule that decides about a tensor, or about ``experts`` of a stack, ascending; ``None``: all of it."""

    rule: Rule
    experts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Selection:
    """First match wins, for each expert of a stack by itself.

    Attributes:
        matched: for each rule, the tensors it fits, whether an earlier one has them or not.
        claims: tensor -> the rules that decide about it; one that no rule fits is not there.
        open_experts: stack that rules divide -> experts that none of them fits.
    """

    matched: Sequence[set[str]] = ()
    claims: Mapping[str, tuple[Claim, ...]] = field(default_factory=dict)
    open_experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def select(rules: Sequence[Rule], tensors: Sequence[Tensor]) -> Selection:
    """Matches every rule with every tensor.

    Raises:
        PlacementError: a regex takes too long.
    """
    matched = [rule.matching(tensors) for rule in rules]
    claims: dict[str, tuple[Claim, ...]] = {}
    open_experts: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        fitting = [rule for rule, names in zip(rules, matched, strict=True) if tensor.name in names]
        if not fitting:
            continue
        claims[tensor.name], left = _divide(fitting, tensor.num_experts)
        if left:
            open_experts[tensor.name] = left
    return Selection(matched, claims, open_experts)


def _divide(fitting: Sequence[Rule], num_experts: int) -> tuple[tuple[Claim, ...], tuple[int, ...]]:
    """Claims of rules in their order, and the experts that are left."""
    if fitting[0].experts is None:
        return (Claim(fitting[0]),), ()
    claims: list[Claim] = []
    left = tuple(range(num_experts))
    for rule in fitting:
        wanted = rule.experts
        taken = left if wanted is None else tuple(expert for expert in left if expert in wanted)
        if taken:
            claims.append(Claim(rule, taken if len(taken) < num_experts else None))
            left = tuple(expert for expert in left if expert not in set(taken))
        if not left:
            break
    return tuple(claims), left
