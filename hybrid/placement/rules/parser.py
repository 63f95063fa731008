"""From nodes to a `RuleSet`: every key known, every value of its type."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

import regex

from hybrid.gguf import QUANTIZABLE
from hybrid.placement.capabilities import CACHE_FORMATS, CPU_FORMATS, kind_of
from hybrid.placement.roles import ROLES
from hybrid.placement.rules.nodes import Node, fail
from hybrid.placement.rules.ranges import MAX_NUMBER, Ranges, parse_ranges
from hybrid.placement.rules.rule import ExpertCacheRule, ExpertRules, KVCacheRule, Rule, RuleSet
from hybrid.placement.rules.values import (
    boolean,
    device_name,
    integer,
    items,
    listed,
    mapping,
    nearest,
    one_of,
    size,
    text,
    texts,
)

TOP_KEYS = ("version", "architecture", "include", "complete", "rules", "experts", "kv_cache", "budget")
SELECT_KEYS = ("role", "layers", "experts", "name", "regex")
PLACE_KEYS = ("device", "backend", "format", "numa")
NUMA_MODES = ("auto", "none", "replicate", "shard", "interleave", "node:N")
FORMATS = tuple(sorted(format_.name for format_ in QUANTIZABLE & CPU_FORMATS))

# Compiling writes counted repeats out; names of tensors are short.
_MAX_EXPANDED = 100_000
_COUNTS = re.compile(r"\{[^{}]*?([0-9]+)\}")
_NODE = re.compile(r"node:[0-9]{1,3}")

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """One file, before what it includes is added. ``given`` are its top keys."""

    rule_set: RuleSet
    include: Node | None
    given: Mapping[str, Node] = field(default_factory=dict)


def parse(root: Node, source: str) -> Document:
    """A whole rule file.

    Raises:
        PlacementError: what is wrong first, with its place.
    """
    top = mapping(root, "a rule file", TOP_KEYS, required=("version",))
    version = top["version"].value
    if isinstance(version, bool) or version != 1:
        fail(top["version"].where, f"version: expected 1, found {top['version'].describe()}")
    origins: dict[str, str] = {}
    return Document(
        RuleSet(
            rules=tuple(_rule(node) for node in items(top.get("rules"), "rules")),
            source=source,
            architectures=_optional(top, "architecture", lambda node: frozenset(texts(node, "architecture"))),
            experts=_optional(top, "experts", lambda node: _experts(node, origins)) or ExpertRules(),
            kv_cache=_optional(top, "kv_cache", lambda node: _kv_cache(node, origins)) or KVCacheRule(),
            budgets=_optional(top, "budget", lambda node: _budgets(node, origins)) or {},
            complete=_optional(top, "complete", lambda node: boolean(node, "complete")) or False,
            origins={key: node.where for key, node in top.items()} | origins,
        ),
        top.get("include"),
        top,
    )


def _optional(parts: Mapping[str, Node], key: str, read: Callable[[Node], T]) -> T | None:
    return read(parts[key]) if key in parts else None


def _rule(node: Node) -> Rule:
    parts = mapping(node, "a rule", ("select", "place", "optional"), required=("select", "place"))
    select = mapping(parts["select"], "select", SELECT_KEYS)
    place = mapping(parts["place"], "place", PLACE_KEYS, required=("device",))
    if not select:
        fail(parts["select"].where, f"select: expected one or more of {', '.join(SELECT_KEYS)}, found none")
    device = device_name(place["device"], "device")
    return Rule(
        device,
        node.where,
        roles=_optional(select, "role", _roles),
        layers=_optional(select, "layers", lambda n: _ranges(n, "layers")),
        experts=_optional(select, "experts", lambda n: _ranges(n, "experts")),
        name=_optional(select, "name", lambda n: text(n, "name")),
        regex=_optional(select, "regex", regular_expression),
        format=_optional(place, "format", lambda n: one_of(n, "format", FORMATS)),
        numa=_optional(place, "numa", lambda n: _numa(n, device)) or "auto",
        backend=_optional(place, "backend", lambda n: _backend(n, device)),
        optional=_optional(parts, "optional", lambda n: boolean(n, "optional")) or False,
        origins={key: n.where for key, n in {**select, **place}.items()},
    )


def _roles(node: Node) -> frozenset[str]:
    return frozenset(
        one_of(item, "role", ROLES) for item in (node.value if isinstance(node.value, tuple) else (node,))
    ) or fail(node.where, "role: expected at least one, found an empty list")


def _ranges(node: Node, what: str) -> Ranges:
    spans: list[tuple[int, int | None]] = []
    for item in node.value if isinstance(node.value, tuple) else (node,):
        value = item.value
        if isinstance(value, str):
            try:
                spans += parse_ranges(value).spans
            except ValueError as error:
                found = "" if "found" in str(error) else f", found {value!r}"
                fail(item.where, f"{what}: {error}{found}")
        else:
            number = integer(item, what, 0, MAX_NUMBER)
            spans.append((number, number))
    return Ranges(tuple(spans)) if spans else fail(node.where, f"{what}: expected at least one, found none")


def regular_expression(node: Node) -> str:
    """One that compiles, and does so soon."""
    pattern = text(node, "regex")
    counts = prod(min(int(count), _MAX_EXPANDED) or 1 for count in _COUNTS.findall(pattern))
    if len(pattern) * counts > _MAX_EXPANDED:
        fail(node.where, f"regex: {pattern!r} repeats too much; names of tensors are short, so + will do")
    try:
        regex.compile(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        fail(node.where, f"regex: {pattern!r} is not a regular expression: {error}")
    return pattern


def _numa(node: Node, device: str) -> str:
    mode = text(node, "numa")
    if mode not in NUMA_MODES[:-1] and not _NODE.fullmatch(mode):
        fail(node.where, f"numa: expected {listed(NUMA_MODES)}, found {mode!r}{nearest(mode, NUMA_MODES)}")
    if device != "cpu" and mode not in ("auto", "none"):
        fail(node.where, f"numa: {mode} divides the CPU's memory, but the device is {device}; leave numa out")
    return mode


def _backend(node: Node, device: str) -> str:
    found = text(node, "backend")
    if found != kind_of(device):
        fail(
            node.where,
            f"backend: {device} is run by the backend {kind_of(device)!r} alone, found {found!r}; "
            "leave backend out",
        )
    return found


def _experts(node: Node, origins: dict[str, str]) -> ExpertRules:
    parts = _section(node, "experts", ("per_token", "threshold", "cache"), origins)
    return ExpertRules(
        _optional(parts, "per_token", lambda n: integer(n, "per_token", 1, MAX_NUMBER)),
        _optional(parts, "threshold", _threshold),
        _optional(parts, "cache", lambda n: _cache(n, origins)),
    )


def _threshold(node: Node) -> float:
    value = node.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        fail(node.where, f"threshold: expected a number from 0 to 1, found {node.describe()}")
    return float(value)


def _cache(node: Node, origins: dict[str, str]) -> ExpertCacheRule:
    known = ("device", "bytes", "policy", "profile")
    parts = _section(node, "experts.cache", known, origins, required=("device", "bytes"))
    device = device_name(parts["device"], "device")
    if device == "cpu":
        fail(parts["device"].where, "device: an expert cache lies on a GPU, found 'cpu'")
    filled = parts["bytes"].value == "fill"
    return ExpertCacheRule(
        device,
        None if filled else size(parts["bytes"], "bytes", "a size, as in 8GiB, or fill"),
        _optional(parts, "policy", lambda n: one_of(n, "policy", ("static", "dynamic"))) or "dynamic",
        _optional(parts, "profile", lambda n: text(n, "profile")),
    )


def _kv_cache(node: Node, origins: dict[str, str]) -> KVCacheRule:
    parts = _section(node, "kv_cache", ("device", "format", "max_tokens"), origins)
    return KVCacheRule(
        _optional(parts, "device", lambda n: device_name(n, "device")),
        _optional(parts, "format", lambda n: one_of(n, "format", CACHE_FORMATS)),
        _optional(parts, "max_tokens", lambda n: integer(n, "max_tokens", 2, 1 << 30)),
    )


def _budgets(node: Node, origins: dict[str, str]) -> dict[str, int]:
    if not isinstance(node.value, dict) or not node.value:
        fail(node.where, f"budget: expected a mapping of devices to sizes, found {node.describe()}")
    found = {}
    for name, (key_where, value) in node.value.items():
        found[device_name(Node(key_where, name), "budget")] = size(value, f"budget of {name}")
        origins[f"budget.{name}"] = key_where
    return found


def _section(
    node: Node, what: str, known: Collection[str], origins: dict[str, str], required: Collection[str] = ()
) -> dict[str, Node]:
    parts = mapping(node, what, known, required)
    if not parts:
        fail(node.where, f"{what}: expected one or more of {', '.join(known)}, found none")
    origins.update({f"{what}.{key}": part.where for key, part in parts.items()})
    return parts
