"""From a file's header and rules to a plan. Pure: reads no weights, imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace

from hybrid.config import BLOCK_SIZE, ExpertUse
from hybrid.errors import CapacityError, PlacementError
from hybrid.gguf import GGUFFile
from hybrid.placement.auto import CPU
from hybrid.placement.cache_plan import cache_profile, plan_cache
from hybrid.placement.cautions import cautions
from hybrid.placement.cost import predict, ram_bandwidth
from hybrid.placement.machine import Machine
from hybrid.placement.memory import DeviceMemory, Model, RunSize, memory_of, read_model
from hybrid.placement.nodes import crowded_nodes, node_bytes, node_refusal, require_mode
from hybrid.placement.numa import bandwidth_share
from hybrid.placement.placing import Placer
from hybrid.placement.plan import Plan
from hybrid.placement.refusal import refusal
from hybrid.placement.rules import AUTO, Rule, Rules, RuleSet, load_rules
from hybrid.placement.rules.checks import Subject, problems
from hybrid.placement.rules.ranges import ranges_of
from hybrid.placement.rules.selection import Claim, Selection, select
from hybrid.placement.sections import cache_bytes, require_cache_device, with_expert_cache
from hybrid.placement.settings import experts_of
from hybrid.placement.usage import UsageProfile

__all__ = ["Plan", "Planner", "check", "plan"]

_CONTEXT_STEP = 256  # fitted contexts are multiples of it


def plan(
    file: GGUFFile,
    rules: Rules = AUTO,
    *,
    machine: Machine | None = None,
    size: RunSize | None = None,
    fit: bool = False,
    experts: ExpertUse | None = None,
    numa: str = "auto",
) -> Plan:
    """Places every tensor of ``file``: the first rule that matches decides, `place_open` does the rest.

    Args:
        machine: whose devices and budgets count; a CPU with unknown memory if not given.
        size: what the run is sized for.
        fit: shorten the context, and then the batch, until everything fits.
        experts: of those of a token, which are run; the model's own number if not given.
        numa: what becomes of weights on the CPU where no rule says: see `hybrid.placement.numa`.

    Raises:
        PlacementError: the rules are malformed, or mean nothing for this model or machine.
        ConfigError: the model has fewer experts per token than asked for.
        CapacityError: a device's budget is exceeded; the message holds the table and what would fit.
        GGUFError: the header contradicts itself.
    """
    return Planner(file, rules, machine or Machine(), experts, numa).plan(size or RunSize(), fit=fit)


class Planner:
    """Plans of one file under one set of rules, for any size.

    Attributes:
        rule_set: the rules; ``None``: there are none.
        machine: with the budgets of the rules.
        experts: which of a token's experts are run; what is not given is as the rules have it.
    """

    def __init__(
        self,
        file: GGUFFile,
        rules: Rules,
        machine: Machine,
        experts: ExpertUse | None = None,
        numa: str = "auto",
    ) -> None:
        self.numa = require_mode(numa, machine)
        self.rule_set = None if rules == AUTO else load_rules(rules)
        self.experts = experts_of(experts or ExpertUse(), self.rule_set)
        self.model, self.machine = read_model(file), machine
        self._profile: UsageProfile | None = None
        selection, cache = Selection(), {}
        if self.rule_set is not None:
            self.machine = machine.with_rules(self.rule_set.budgets)
            selection, found = check(self.rule_set, file, self.model, self.machine)
            if found:
                more = f" ({len(found) - 1} more: `hybrid rules check` tells all)" if len(found) > 1 else ""
                raise PlacementError(found[0] + more)
            cache = cache_bytes(self.model, self.rule_set)
            weights = not file.header_only
            self._profile = cache_profile(self.rule_set, file, self.model, weights=weights)
        if self.experts.per_token is not None:
            self.model = read_model(file, self.experts.per_token)
        self.selection = selection
        self._placer = Placer(self.model, self.machine, selection, cache)

    def plan(self, size: RunSize, *, fit: bool = False) -> Plan:
        """See `plan`."""
        found = self.draft(size)
        if _missing(found) and size.kv_cache_tokens is None and size.max_num_seqs > 1:
            smaller = self.draft(self.with_smaller_cache(size))
            found = found if _missing(smaller) else smaller
        if fit and _missing(found):
            found = self.draft(self.largest_fitting(size))
        if _missing(found):
            raise CapacityError(refusal(self, found))
        if crowded_nodes(found):
            raise CapacityError(node_refusal(found))
        found = replace(found, prediction=predict(self.model, found.placements, self.machine, found.size))
        if self.rule_set is not None:
            cache = plan_cache(self.model, found, self.rule_set, self._profile)
            found = replace(found, expert_cache=cache)
        warnings = [*_shortened(size, found.size), *cautions(self.model, found)]
        return replace(found, warnings=tuple(warnings))

    def explain(self, name: str, size: RunSize) -> list[str]:
        """The rules tried for a tensor, one line each, and where it goes.

        Raises:
            PlacementError: the model has no such tensor.
        """
        tensor = next((t for t in self.model.tensors if t.name == name), None)
        if tensor is None:
            near = difflib.get_close_matches(name, [t.name for t in self.model.tensors], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlacementError(f"--explain: the model has no tensor {name!r}{hint}")
        layer = "" if tensor.layer is None else f", layer {tensor.layer}"
        lines = [f"{name}: role {tensor.role}{layer}, {tensor.info.type.name} {list(tensor.info.shape)}"]
        claims = {claim.rule.origin: claim for claim in self.selection.claims.get(name, ())}
        rules = () if self.rule_set is None else self.rule_set.rules
        for rule, matched in zip(rules, self.selection.matched, strict=True):
            lines.append(f"  {rule.origin}: {_outcome(rule, name in matched, claims.get(rule.origin))}")
        placement = self.draft(size).placements[name]
        if not tensor.share:
            lines.append("  it is not loaded: nothing reads it")
        elif not claims:
            lines.append("  no rule matches: auto decides")
        elif name in self.selection.open_experts:
            lines.append(f"  auto decides about experts {ranges_of(self.selection.open_experts[name])}")
        return lines + [f"  {part} by {part.rule}, {part.n_bytes} bytes there" for part in placement.parts]

    def draft(self, size: RunSize) -> Plan:
        """Placements and bytes, whether they fit or not."""
        if self.numa != "auto":
            return self._draft(size, self.numa, "asked for")
        if not self.machine.numa or self.machine.num_nodes == 1:
            return self._draft(size, "none", "there is one NUMA node to work on")
        found, reason = self._draft(size, "replicate", "every node has room for a copy"), ""
        if found.memory[CPU].missing_bytes or crowded_nodes(found):
            reason = f"a copy for each of {self.machine.num_nodes} nodes does not fit"
            try:
                found = self._draft(size, "shard", reason)
                if crowded_nodes(found):
                    found = self._draft(size, "interleave", f"{reason}, nor do slices on every node")
            except PlacementError as error:
                found = self._draft(size, "interleave", f"{reason}; {error}")
        if crowded_nodes(found):
            found = self._draft(size, "none", f"{reason}, nor half of the pages")
        return replace(found, numa_reason=f"{found.numa_reason}; {self._speeds(found.numa)}")

    def _speeds(self, mode: str) -> str:
        """What RAM is expected to be read at in a mode, and in one of the other kind."""
        count, all_nodes = self.machine.num_nodes, ram_bandwidth(self.machine) / 1e9
        speed = all_nodes * bandwidth_share(mode, count)
        other = "interleave" if bandwidth_share(mode, count) == 1 else "replicate"
        against = all_nodes * bandwidth_share(other, count)
        return f"weights are expected to be read at {speed:.0f} GB/s, with {other} at {against:.0f}"

    def largest_fitting(self, size: RunSize) -> RunSize:
        """The longest context that fits, with smaller batches where none does; ``size`` if nothing does."""
        for batch in (size.max_num_batched_tokens, *size.smaller_batches()):
            smaller = replace(size, max_num_batched_tokens=batch)
            context = self._largest_context(smaller)
            if context:
                return replace(smaller, max_model_len=context)
        return size

    def fits(self, size: RunSize) -> bool:
        """Whether no device's budget is exceeded."""
        return not _missing(self.draft(size))

    def can_fit(self, size: RunSize) -> bool:
        """Whether anything of this cache format fits: the shortest context in the smallest steps does."""
        batch = min(size.smaller_batches(), default=size.max_num_batched_tokens)
        return self.fits(replace(size, max_model_len=_CONTEXT_STEP, max_num_batched_tokens=batch))

    def with_smaller_cache(self, size: RunSize) -> RunSize:
        """The same with a cache for fewer contexts than may run, as large as fits; for one at least."""
        one = replace(size, max_num_seqs=1).cache_tokens // BLOCK_SIZE
        low, high = one, size.cache_tokens // BLOCK_SIZE
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.fits(replace(size, kv_cache_tokens=middle * BLOCK_SIZE))
            low, high = (middle, high) if fits else (low, middle)
        return replace(size, kv_cache_tokens=low * BLOCK_SIZE)

    def _largest_context(self, size: RunSize) -> int:
        """0 if the shortest does not fit; it is tried first, since where it does not every refusal asks."""
        low, high, middle = 0, size.max_model_len // _CONTEXT_STEP + 1, 1
        while high - low > 1:
            fits = self.fits(replace(size, max_model_len=middle * _CONTEXT_STEP))
            low, high = (middle, high) if fits else (low, middle)
            if not low:
                break
            middle = (low + high) // 2
        return low * _CONTEXT_STEP

    def _draft(self, size: RunSize, numa: str, reason: str) -> Plan:
        placements = self._placer.place(size, numa)
        budgets = [(device.name, device.budget_bytes) for device in self.machine.devices]
        memory = memory_of(
            self.model, placements, budgets, size, self.machine.num_threads, self.machine.num_nodes
        )
        if self.rule_set is not None:
            require_cache_device(self.rule_set, self.model, placements)
            memory = with_expert_cache(memory, self.model, self.rule_set)
        return Plan(
            placements,
            memory,
            size,
            self.machine,
            numa=numa,
            numa_reason=reason,
            node_bytes=node_bytes(self.model, placements, self.machine),
        )


def check(rule_set: RuleSet, file: GGUFFile, model: Model, machine: Machine) -> tuple[Selection, list[str]]:
    """What the rules select, and everything that is wrong with them for this model and machine.

    Raises:
        PlacementError: a regex takes too long.
    """
    selection = select(rule_set.rules, model.tensors)
    subject = Subject(model, machine, file.path.name, file.architecture)
    return selection, list(problems(rule_set, selection, subject))


def _outcome(rule: Rule, matches: bool, claim: Claim | None) -> str:
    if not matches:
        return "does not match"
    if claim is None:
        return "matches, but the rule above has it"
    some = "" if claim.experts is None else f", experts {ranges_of(claim.experts)}"
    return f"matches: {rule.device}{some}"


def _shortened(asked: RunSize, found: RunSize) -> Iterator[str]:
    """What fitting has taken away."""
    taken = [
        f"{now} {what} in place of {before}"
        for what, before, now in (
            ("tokens of context", asked.max_model_len, found.max_model_len),
            ("tokens a step", asked.max_num_batched_tokens, found.max_num_batched_tokens),
            ("tokens of cache for all sequences", *_cut_cache(asked, found)),
        )
        if now != before
    ]
    if taken:
        yield f"fitted into the memory there is: {', '.join(taken)}"


def _cut_cache(asked: RunSize, found: RunSize) -> tuple[int, int]:
    """Tokens of cache asked for and found, where it holds fewer contexts than may run."""
    if asked.kv_cache_tokens is None and found.kv_cache_tokens is not None:
        return replace(found, kv_cache_tokens=None).cache_tokens, found.cache_tokens
    return 0, 0


def _missing(found: Plan) -> list[DeviceMemory]:
    """Devices whose budget is exceeded."""
    return [memory for memory in found.memory.values() if memory.missing_bytes]
