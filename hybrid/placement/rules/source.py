"""Where rules come from: files, what they include, the shipped ones, dicts."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from hybrid.errors import PlacementError
from hybrid.placement.rules.nodes import MAX_BYTES, Node, fail, from_python, read_yaml
from hybrid.placement.rules.parser import Document, parse
from hybrid.placement.rules.rule import Rule, RuleSet
from hybrid.placement.rules.values import listed, nearest, text

Rules = str | Path | dict[str, Any] | RuleSet

AUTO = "auto"
_NAME = re.compile(r"[a-z0-9-]{1,100}")
_MAX_INCLUDES = 16


def load_rules(rules: Rules) -> RuleSet:
    """Parses a rule file, the name of a shipped one ("all-cpu"), or the same structure as a dict.

    Raises:
        PlacementError: with file, line and column, or the path in the dict.
    """
    if isinstance(rules, RuleSet):
        return rules
    if isinstance(rules, dict):
        return _complete(parse(from_python(rules), "<rules>"), Path(), ())
    if not isinstance(rules, str | Path) or not str(rules):
        raise PlacementError(f"rules: expected a name, a path or a dict, found {rules!r}")
    if isinstance(rules, str) and _NAME.fullmatch(rules) and not Path(rules).exists():
        return _shipped(rules, f"rules {rules!r}", AUTO, ())
    return _file(Path(rules), str(rules), ())


def shipped_names() -> list[str]:
    """Names of the rule files that come with the package."""
    folder = resources.files("hybrid.rules")
    return sorted(e.name.removesuffix(".yaml") for e in folder.iterdir() if e.name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    """A shipped file as it stands.

    Raises:
        PlacementError: there is none of this name.
    """
    _require_shipped(name, f"rules {name!r}", "")
    return (resources.files("hybrid.rules") / f"{name}.yaml").read_text(encoding="utf-8")


def _require_shipped(name: str, asked: str, besides: str) -> None:
    names = [*filter(None, (besides,)), *shipped_names()]
    if name not in names:
        there = f"no such file, and of the shipped ones there are {', '.join(names)}"
        raise PlacementError(f"{asked}: {there}{nearest(name, names)}")


def _shipped(name: str, asked: str, besides: str, above: tuple[str, ...]) -> RuleSet:
    _require_shipped(name, asked, besides)
    file = resources.files("hybrid.rules") / f"{name}.yaml"
    return _complete(parse(read_yaml(file.read_bytes(), file.name), file.name), None, (*above, file.name))


def _file(path: Path, source: str, above: tuple[str, ...], asked: str = "") -> RuleSet:
    """``asked``: what goes before the message where there is nothing to read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        fail(asked + source, "no such rule file; `hybrid rules list` names the shipped ones")
    except (OSError, ValueError) as error:
        fail(asked + source, f"cannot read the rules: {getattr(error, 'strerror', None) or error}")
    return _complete(parse(read_yaml(data, source), source), path.parent, (*above, _identity(path)))


def _complete(document: Document, folder: Path | None, above: tuple[str, ...]) -> RuleSet:
    """With what the document includes. ``folder``: where relative names start, ``None``: the shipped ones;
    ``above``: the files that include one another, this one last."""
    own, given = _with_profile(document.rule_set, folder), document.given
    if document.include is None:
        return own
    inner = _included(document.include, folder, above)
    return replace(
        own,
        rules=(*own.rules, *(replace(rule, depth=rule.depth + 1) for rule in inner.rules)),
        architectures=_both(own, inner),
        experts=own.experts if "experts" in given else inner.experts,
        kv_cache=own.kv_cache if "kv_cache" in given else inner.kv_cache,
        budgets=own.budgets if "budget" in given else inner.budgets,
        complete=own.complete if "complete" in given else inner.complete,
        origins={**inner.origins, **own.origins},
    )


def _with_profile(rule_set: RuleSet, folder: Path | None) -> RuleSet:
    """The profile's name is relative to the file that names it."""
    cache = rule_set.experts.cache
    if cache is None or cache.profile is None or folder is None:
        return rule_set
    cache = replace(cache, profile=str(folder / Path(cache.profile).expanduser()))
    return replace(rule_set, experts=replace(rule_set.experts, cache=cache))


def _included(node: Node, folder: Path | None, above: tuple[str, ...]) -> RuleSet:
    name = text(node, "include")
    is_name = _NAME.fullmatch(name) and (folder is None or not (folder / name).exists())
    if folder is None and not is_name:
        fail(node.where, f"include: a shipped file includes shipped ones by name, found {name!r}")
    path = f"{name}.yaml" if is_name or folder is None else _identity(folder / name)
    if path in above:
        fail(node.where, f"include: {name!r} includes itself: {' -> '.join((*above, path))}")
    if len(above) > _MAX_INCLUDES:
        fail(node.where, f"include: more than {_MAX_INCLUDES} files include one another")
    if is_name or folder is None:
        return _shipped(name, f"{node.where}: include: {name!r}", "", above)
    return _file(folder / name, str(folder / name), above, asked=f"{node.where}: include: ")


def _identity(path: Path) -> str:
    """The same text for the same file, as far as the system tells."""
    try:
        return str(path.resolve())
    except (OSError, ValueError, RuntimeError):
        return str(path)


def _both(own: RuleSet, inner: RuleSet) -> frozenset[str] | None:
    if own.architectures is None or inner.architectures is None:
        return own.architectures or inner.architectures
    if not own.architectures & inner.architectures:
        fail(
            own.where("architecture"),
            f"architecture: the included rules are for {listed(sorted(inner.architectures))} alone",
        )
    return own.architectures & inner.architectures


def overridden(rules: Rules, first: tuple[Rule, ...], source: str) -> RuleSet:
    """Rules with others before them, as if a file held ``first`` and included the rest."""
    if rules == AUTO:
        return RuleSet(first, source)
    inner = load_rules(rules)
    later = (replace(rule, depth=rule.depth + 1) for rule in inner.rules)
    return replace(inner, rules=(*first, *later))
