"""What rules cannot mean for a model and a machine: each problem with its place and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hybrid.gguf import GGMLType
from hybrid.placement.capabilities import can_multiply, columns_problem, kind_of, quantizing_problem
from hybrid.placement.machine import Machine
from hybrid.placement.memory import Model, Tensor
from hybrid.placement.numa import node_of
from hybrid.placement.rules.ranges import ranges_of
from hybrid.placement.rules.rule import Rule, RuleSet
from hybrid.placement.rules.selection import Selection
from hybrid.placement.rules.values import listed

# Tensors of one role and layer that are computed by one device.
_TOGETHER = ("attention", "router", "dense_ffn", "shared_experts", "routed_experts")


@dataclass(frozen=True)
class Subject:
    """What rules are checked against. ``file``: the model's name for messages."""

    model: Model
    machine: Machine
    file: str
    architecture: str


def problems(rule_set: RuleSet, selection: Selection, subject: Subject) -> Iterator[str]:
    """Messages that begin with a place, those that explain others first."""
    yield from _architecture(rule_set, subject)
    yield from _devices(rule_set, subject.machine)
    pairs = list(zip(rule_set.rules, selection.matched, strict=True))
    # A flag may stand for several rules.
    useful = {rule.origin for rule, matched in pairs if matched}
    for rule in rule_set.rules:
        outside = [] if rule.optional else list(_outside(rule, subject))
        yield from outside
        if rule.origin not in useful and not outside and not rule.optional:
            why = _why_nothing(rule, subject)
            yield f"{rule.origin}: this rule matches no tensor of {subject.file}: {why}"
    yield from _shadowed(rule_set, selection)
    yield from _formats(selection, subject)
    yield from _apart(selection, subject.model)
    yield from _left_open(rule_set, selection, subject.model)
    yield from _sections(rule_set, subject)


def _architecture(rule_set: RuleSet, subject: Subject) -> Iterator[str]:
    allowed = rule_set.architectures
    if allowed is not None and subject.architecture not in allowed:
        yield (
            f"{rule_set.where('architecture')}: architecture: these rules are for {listed(sorted(allowed))}, "
            f"but {subject.file} is {subject.architecture}; take rules for it, or auto"
        )


def _devices(rule_set: RuleSet, machine: Machine) -> Iterator[str]:
    named = {rule.where("device"): rule.device for rule in rule_set.rules}
    if rule_set.kv_cache.device is not None:
        named[rule_set.where("kv_cache.device")] = rule_set.kv_cache.device
    if rule_set.experts.cache is not None:
        named[rule_set.where("experts.cache.device")] = rule_set.experts.cache.device
    there = [device.name for device in machine.devices]
    for where, device in named.items():
        if device not in there and kind_of(device) not in ("cpu", "fake"):
            yield (
                f"{where}: device: there is no {device} on this machine, which has {listed(there)}; "
                f"`hybrid plan --vram {device}=24GiB` plans for one"
            )
    for rule in rule_set.rules:
        node = node_of(rule.numa)
        if node is not None and node not in machine.node_ids:
            ids = ", ".join(map(str, machine.node_ids))
            yield (
                f"{rule.where('numa')}: numa: expected a NUMA node of this machine, which has {ids}, "
                f"found {rule.numa!r}"
            )


def _outside(rule: Rule, subject: Subject) -> Iterator[str]:
    """Layers and experts that the model lacks, if the file names them."""
    layers = {tensor.layer for tensor in subject.model.tensors if tensor.layer is not None}
    experts = max((tensor.num_experts for tensor in subject.model.tensors), default=0)
    for key, ranges, count in (
        ("layers", rule.layers, max(layers, default=-1) + 1),
        ("experts", rule.experts, experts),
    ):
        beyond = ranges.beyond(count) if ranges is not None and key in rule.origins else None
        if beyond is not None:
            has = f"has {key} 0-{count - 1}" if count else f"has no {key}"
            yield (
                f"{rule.where(key)}: {key}: {beyond} is out of range, {subject.file} {has}; "
                f"name fewer, or set optional: true"
            )


def _why_nothing(rule: Rule, subject: Subject) -> str:
    """Which condition fits nothing by itself, or that they exclude one another."""
    tensors = subject.model.tensors
    roles = sorted({tensor.role for tensor in tensors})
    if rule.roles is not None and not rule.roles & set(roles):
        return f"it has no {listed(sorted(rule.roles))}, its roles are {listed(roles)}"
    for key, pattern in (("name", rule.name), ("regex", rule.regex)):
        if pattern is None:
            continue
        by_name = key == "name"
        alone = replace(Rule(rule.device, rule.origin), name=pattern if by_name else None)
        alone = replace(alone, regex=None if by_name else pattern)
        if not alone.matching(tensors):
            near = difflib.get_close_matches(pattern, [t.name for t in tensors], n=1, cutoff=0.3)
            hint = f"; a name that is near is {near[0]!r}" if near else ""
            return f"no name fits the {key} {pattern!r}{hint}"
    if rule.roles is not None and rule.layers is not None:
        has = ranges_of(t.layer for t in tensors if t.role in rule.roles and t.layer is not None)
        where = f"are in layers {has}" if has.spans else "are in no layer"
        return f"its {listed(sorted(rule.roles))} {where}; select others, or set optional: true"
    if rule.experts is not None:
        return "only routed experts are divided; select them alone"
    return "no tensor fits all conditions at once; name fewer"


def _shadowed(rule_set: RuleSet, selection: Selection) -> Iterator[str]:
    deciding = {claim.rule.origin for claims in selection.claims.values() for claim in claims}
    for rule, matched in zip(rule_set.rules, selection.matched, strict=True):
        if not matched or rule.origin in deciding:
            continue
        claims = (claim for name in sorted(matched) for claim in selection.claims[name])
        takers = {claim.rule.origin: claim.rule for claim in claims}.values()
        # Overriding an included rule is what including is for.
        if all(taker.depth >= rule.depth for taker in takers):
            yield (
                f"{rule.origin}: this rule decides nothing: all {len(matched)} tensors that it matches are "
                f"taken by {' and '.join(taker.origin for taker in takers)}; put it above, or remove it"
            )


def _formats(selection: Selection, subject: Subject) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for tensor in subject.model.tensors:
        if not tensor.share or not tensor.parts:
            continue
        for claim in selection.claims.get(tensor.name, ()):
            problem = _format_problem(tensor, claim.rule, subject.machine)
            if problem:
                found.setdefault((claim.rule.where("format"), problem), []).append(tensor.name)
    for (where, problem), names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{where}: format: {names[0]}{more}: {problem}"


def _format_problem(tensor: Tensor, rule: Rule, machine: Machine) -> str | None:
    source = tensor.info.type
    target = source if rule.format is None else GGMLType[rule.format]
    problem = quantizing_problem(source, target, tensor.info.shape[-1])
    if problem:
        return problem
    if can_multiply(target, kind_of(rule.device), machine.isa):
        problem = columns_problem(target, kind_of(rule.device), tensor.parts[0][2])
        return problem and f"{problem}; leave them on the cpu"
    ways = "leave them on the cpu" if rule.device != "cpu" else "take a file in other formats"
    return f"{target.name} has no kernel on {rule.device}; give the rule another format, or {ways}"


def _apart(selection: Selection, model: Model) -> Iterator[str]:
    groups: dict[tuple[str, int | None], list[Tensor]] = {}
    for tensor in model.tensors:
        if tensor.role in _TOGETHER and tensor.share:
            groups.setdefault((tensor.role, tensor.layer), []).append(tensor)
    told: set[tuple[str, str]] = set()
    for (role, _), tensors in groups.items():
        owners = {tensor.name: _owners(tensor, selection) for tensor in tensors}
        divided = any(len(found) > 1 for found in owners.values())
        for first, second, expert in _differing(owners, tensors, divided and role == "routed_experts"):
            one, other = (_owner(owners[name], expert) for name in (first, second))
            key = (one.origin if one else "", other.origin if other else "")
            if key not in told:
                told.add(key)
                yield _apart_message((first, one), (second, other), expert if divided else None)


def _owners(tensor: Tensor, selection: Selection) -> tuple[Rule | None, ...]:
    """For each expert the rule that decides, or one entry where the tensor is not divided."""
    claims = selection.claims.get(tensor.name, ())
    if not claims or claims[0].experts is None:
        return (claims[0].rule if claims else None,)
    found: list[Rule | None] = [None] * tensor.num_experts
    for claim in claims:
        for expert in claim.experts or ():
            found[expert] = claim.rule
    return tuple(found)


def _owner(owners: tuple[Rule | None, ...], expert: int) -> Rule | None:
    return owners[expert] if len(owners) > 1 else owners[0]


def _differing(
    owners: Mapping[str, tuple[Rule | None, ...]], tensors: list[Tensor], divided: bool
) -> Iterator[tuple[str, str, int]]:
    """Pairs of tensors, and an expert, that go to two devices. What is open follows the rest of its kind,
    unless experts are divided: then all must be."""
    for expert in range(max((t.num_experts for t in tensors), default=1) if divided else 1):
        placed = [(name, _owner(found, expert)) for name, found in owners.items()]
        known = placed if divided else [(name, rule) for name, rule in placed if rule is not None]
        for name, rule in known[1:]:
            if (rule and rule.device) != (known[0][1] and known[0][1].device):
                yield known[0][0], name, expert
                return


def _apart_message(
    first: tuple[str, Rule | None], second: tuple[str, Rule | None], expert: int | None
) -> str:
    (one_name, one), (other_name, other) = first, second
    if other is None:
        (one_name, one), (other_name, other) = (other_name, other), (one_name, one)
    assert other is not None
    what = "" if expert is None else f"expert {expert} of "
    where = f"goes to {one.device} ({one.origin})" if one else "is left open"
    return (
        f"{other.origin}: {what}{other_name} goes to {other.device}, but {one_name}, which is computed with "
        f"it, {where}; select them by role in one rule"
    )


def _left_open(rule_set: RuleSet, selection: Selection, model: Model) -> Iterator[str]:
    if not rule_set.complete:
        return
    names = [
        t.name
        for t in model.tensors
        if t.share and (t.name not in selection.claims or t.name in selection.open_experts)
    ]
    if names:
        some = selection.open_experts.get(names[0])
        part = "" if some is None else f"experts {ranges_of(some)} of "
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"{rule_set.where('complete')}: complete: no rule places {part}{names[0]}{more}; "
            "add a rule for them, or remove complete to let auto place them"
        )


def _sections(rule_set: RuleSet, subject: Subject) -> Iterator[str]:
    dims, experts = subject.model.dims, rule_set.experts
    longest, tokens = dims.context_length, rule_set.kv_cache.max_tokens
    if tokens is not None and longest and tokens > longest:
        yield (
            f"{rule_set.where('kv_cache.max_tokens')}: max_tokens: expected at most {longest}, the context "
            f"that {subject.file} was made for, found {tokens}"
        )
    most = max((round(t.share * t.num_experts) for t in subject.model.tensors), default=0)
    if experts.per_token is not None and experts.per_token > most:
        yield (
            f"{rule_set.where('experts.per_token')}: per_token: expected at most {most}, the experts that "
            f"{subject.file} uses for a token, found {experts.per_token}"
        )
    if experts.cache is not None and not dims.num_experts:
        yield f"{rule_set.where('experts.cache')}: cache: {subject.file} has no routed experts"
    if experts.cache is not None and experts.cache.policy == "static" and experts.cache.profile is None:
        yield (
            f"{rule_set.where('experts.cache.policy')}: policy: static needs a profile, which tells the "
            f"experts to copy; `hybrid profile {subject.file} --text FILE -o usage.json` writes one for "
            "profile: usage.json, or take dynamic"
        )
