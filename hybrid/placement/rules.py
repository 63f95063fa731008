"""Placement rules: YAML or a dict -> a list of `Rule`.

    version: 1
    architecture: [deepseek2]               # optional guard
    rules:                                  # first match wins
      - select: {role: routed_experts, layers: 3-60}
        place: {device: cpu}
      - select: {name: "token_embd.*"}      # a glob over the whole tensor name
        place: {device: cpu}

Plain scalars mean what they look like: numbers are numbers, and ``off``, ``no`` or ``1:30`` are text. Every
error names file, line and column.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hybrid.errors import PlacementError
from hybrid.placement.roles import ROLES, layer_of, role_of

_NAME = re.compile(r"^[a-z0-9-]+$")
_DEVICE = re.compile(r"^(cpu|(cuda|fake):\d+)$")
_LAYERS = re.compile(r"^\d+(-\d+)?(,\d+(-\d+)?)*$")


@dataclass(frozen=True)
class Rule:
    """Tensors that fit every condition given go to ``device``. ``origin`` is the place in the file."""

    device: str
    origin: str
    roles: frozenset[str] | None = None
    layers: frozenset[int] | None = None
    name: str | None = None

    def matches(self, tensor_name: str) -> bool:
        if self.roles is not None and role_of(tensor_name) not in self.roles:
            return False
        if self.layers is not None and layer_of(tensor_name) not in self.layers:
            return False
        return self.name is None or fnmatch.fnmatchcase(tensor_name, self.name)


@dataclass(frozen=True)
class RuleSet:
    """A parsed rule file."""

    rules: tuple[Rule, ...]
    architectures: frozenset[str] | None
    source: str


def load_rules(rules: str | Path | dict[str, Any]) -> RuleSet:
    """Parses a rule file, the name of a shipped one ("all-cpu"), or the same structure as a dict.

    Raises:
        PlacementError: with file, line and column.
    """
    if isinstance(rules, dict):
        return _parse("<rules>", lambda: yaml.safe_dump(rules, sort_keys=False), yaml.SafeLoader)
    if not isinstance(rules, str | Path):
        raise PlacementError(f"rules: expected a name, a path or a dict, found {type(rules).__name__}")
    if isinstance(rules, str) and _NAME.match(rules) and not Path(rules).exists():
        return _shipped(rules)
    return _parse(str(rules), lambda: Path(rules).read_text(encoding="utf-8"), yaml.BaseLoader)


def _shipped(name: str) -> RuleSet:
    folder = resources.files("hybrid.rules")
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if ".yaml" in entry.name)
    if name not in names:
        raise PlacementError(
            f"rules {name!r}: no such file, and of the shipped ones there are auto, {', '.join(names)}"
            + _nearest(name, ("auto", *names))
        )
    file = folder / f"{name}.yaml"
    return _parse(file.name, lambda: file.read_text(encoding="utf-8"), yaml.BaseLoader)


def _parse(source: str, read: Callable[[], str], loader: type[yaml.BaseLoader | yaml.SafeLoader]) -> RuleSet:
    try:
        root = yaml.compose(read(), Loader=loader)
    except (OSError, UnicodeDecodeError) as error:
        raise PlacementError(f"{source}: cannot read the rules: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise PlacementError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    return _Parser(source).document(root)


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source

    def where(self, node: yaml.Node | None) -> str:
        if node is None:
            return self.source
        return f"{self.source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def fail(self, node: yaml.Node | None, problem: str) -> NoReturn:
        raise PlacementError(f"{self.where(node)}: {problem}")

    def document(self, root: yaml.Node | None) -> RuleSet:
        top = self.mapping(
            root, "a rule file", {"version", "architecture", "rules"}, required={"version", "rules"}
        )
        if self.text(top["version"], "version") != "1":
            self.fail(top["version"], f"version: expected 1, found {top['version'].value}")
        architectures = None
        if "architecture" in top:
            architectures = frozenset(self.texts(top["architecture"], "architecture"))
        listed = top["rules"]
        if not isinstance(listed, yaml.SequenceNode):
            self.fail(listed, f"rules: expected a list, found {_kind(listed)}")
        return RuleSet(tuple(self.rule(node) for node in listed.value), architectures, self.source)

    def rule(self, node: yaml.Node) -> Rule:
        parts = self.mapping(node, "a rule", {"select", "place"}, required={"select", "place"})
        select = self.mapping(parts["select"], "select", {"role", "layers", "name"})
        place = self.mapping(parts["place"], "place", {"device"}, required={"device"})
        if not select:
            self.fail(parts["select"], "select: expected role, layers or name, found nothing")
        device = self.text(place["device"], "device")
        if not _DEVICE.match(device):
            self.fail(place["device"], f"device: expected cpu, cuda:N or fake:N, found {device!r}")
        return Rule(
            device=device,
            origin=self.where(node),
            roles=self.roles(select["role"]) if "role" in select else None,
            layers=self.layers(select["layers"]) if "layers" in select else None,
            name=self.text(select["name"], "name") if "name" in select else None,
        )

    def roles(self, node: yaml.Node) -> frozenset[str]:
        names = self.texts(node, "role")
        for name in names:
            if name not in ROLES:
                self.fail(
                    node, f"role: expected one of {', '.join(ROLES)}, found {name!r}{_nearest(name, ROLES)}"
                )
        return frozenset(names)

    def layers(self, node: yaml.Node) -> frozenset[int]:
        layers: set[int] = set()
        for item in self.texts(node, "layers"):
            compact = item.replace(" ", "")
            if not _LAYERS.match(compact):
                self.fail(node, f"layers: expected numbers and ranges such as 3-60, found {item!r}")
            for piece in compact.split(","):
                first, _, last = piece.partition("-")
                low, high = int(first), int(last or first)
                if high < low or high > 9999:
                    self.fail(node, f"layers: expected an ascending range below 10000, found {piece!r}")
                layers.update(range(low, high + 1))
        return frozenset(layers)

    def mapping(
        self, node: yaml.Node | None, what: str, known: set[str], required: set[str] | None = None
    ) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what}: expected a mapping, found {_kind(node)}")
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self.text(key_node, "a key")
            if key not in known:
                expected = ", ".join(sorted(known))
                self.fail(
                    key_node, f"unknown key {key!r} in {what}: expected {expected}{_nearest(key, known)}"
                )
            if key in found:
                self.fail(key_node, f"duplicate key {key!r} in {what}")
            found[key] = value
        for key in sorted((required or set()) - set(found)):
            self.fail(node, f"{what} lacks {key!r}")
        return found

    def text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.value == "":
            self.fail(node, f"{what}: expected text, found {_kind(node)}")
        return str(node.value)

    def texts(self, node: yaml.Node, what: str) -> list[str]:
        if isinstance(node, yaml.SequenceNode):
            if not node.value:
                self.fail(node, f"{what}: expected at least one entry, found an empty list")
            return [self.text(item, what) for item in node.value]
        return [self.text(node, what)]


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "an empty file"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"{node.value!r}" if node.value else "nothing"


def _nearest(word: str, known: set[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
