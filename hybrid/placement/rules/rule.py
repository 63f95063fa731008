"""What a rule file says, as plain values."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import regex

from hybrid.placement.memory import Tensor
from hybrid.placement.rules.nodes import fail
from hybrid.placement.rules.ranges import Ranges

REGEX_SECONDS = 0.5  # for all names of a model together


@dataclass(frozen=True)
class Rule:
    """Tensors, or experts of them, that fit every condition given go to ``device``.

    Attributes:
        origin: the place in the file; ``origins`` has those of its keys.
        experts: which of a stack; ``None``: the whole tensor.
        name: a glob over the whole name.
        regex: searched for in the name.
        format: name of the GGML type that matrices are quantised to anew at load; ``None``: as in the file.
        numa: ``auto``, ``none``, ``replicate``, ``shard``, ``interleave`` or ``node:N``.
        optional: it may match nothing, and name layers and experts that the model lacks.
        depth: of how many files that include one another it comes from the innermost; 0: not included.
    """

    device: str
    origin: str
    roles: frozenset[str] | None = None
    layers: Ranges | None = None
    experts: Ranges | None = None
    name: str | None = None
    regex: str | None = None
    format: str | None = None
    numa: str = "auto"
    backend: str | None = None
    optional: bool = False
    depth: int = 0
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def where(self, key: str) -> str:
        """The place of a key, as far as it is known."""
        return self.origins.get(key, self.origin)

    def matching(self, tensors: Iterable[Tensor]) -> set[str]:
        """Names of those that fit all conditions; with ``experts``, of stacks that have some of them.

        Raises:
            PlacementError: the regex takes too long.
        """
        found = [tensor for tensor in tensors if self._fits(tensor)]
        if self.regex is None:
            return {tensor.name for tensor in found}
        return self._searched([tensor.name for tensor in found], self.regex)

    def _fits(self, tensor: Tensor) -> bool:
        if self.roles is not None and tensor.role not in self.roles:
            return False
        if self.layers is not None and tensor.layer not in self.layers:
            return False
        if self.experts is not None and not any(e in self.experts for e in range(tensor.num_experts)):
            return False
        return self.name is None or fnmatch.fnmatchcase(tensor.name, self.name)

    def _searched(self, names: list[str], pattern: str) -> set[str]:
        compiled, end = regex.compile(pattern), time.monotonic() + REGEX_SECONDS
        found = set()
        for name in names:
            try:
                left = max(end - time.monotonic(), 1e-3)
                if compiled.search(name, timeout=left):
                    found.add(name)
            except TimeoutError:
                fail(
                    self.where("regex"),
                    f"regex: {pattern!r} takes more than {REGEX_SECONDS} s on the model's names, such as "
                    f"{name!r}; write it without nested repeats, or use a glob (name)",
                )
        return found


@dataclass(frozen=True)
class ExpertCacheRule:
    """Spare memory of ``device`` holds the most used experts; ``n_bytes`` ``None``: all that is left.

    ``profile``: a file that tells which they are; a relative name starts at the rule file that has it.
    """

    device: str
    n_bytes: int | None
    policy: str = "dynamic"
    profile: str | None = None


@dataclass(frozen=True)
class ExpertRules:
    """Experts a token uses: at most ``per_token``, and none whose weight is below ``threshold`` times that of
    the token's best; ``None``: as the model has it."""

    per_token: int | None = None
    threshold: float | None = None
    cache: ExpertCacheRule | None = None


@dataclass(frozen=True)
class KVCacheRule:
    """Where the cache lies, in which format, and for how many tokens; ``None``: not said."""

    device: str | None = None
    format: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class RuleSet:
    """A rule file with all that it includes.

    Attributes:
        source: the file, or what stands for it in messages.
        architectures: the only ones these rules are for; ``None``: any.
        budgets: device -> bytes that may be used of it.
        complete: no tensor may be left for the planner to place.
        origins: key, as in ``kv_cache.format``, -> its place.
    """

    rules: tuple[Rule, ...]
    source: str
    architectures: frozenset[str] | None = None
    experts: ExpertRules = field(default_factory=ExpertRules)
    kv_cache: KVCacheRule = field(default_factory=KVCacheRule)
    budgets: Mapping[str, int] = field(default_factory=dict)
    complete: bool = False
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def where(self, key: str) -> str:
        """The place of a key, as far as it is known."""
        return self.origins.get(key, self.source)
