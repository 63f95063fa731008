"""From what rules decide, and what is left open, to a placement of every tensor."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.errors import PlacementError
from hybrid.gguf import GGMLType
from hybrid.placement.auto import Fixed, place_open
from hybrid.placement.capabilities import kind_of
from hybrid.placement.machine import Machine
from hybrid.placement.memory import Model, RunSize, Tensor
from hybrid.placement.numa import shard_problem, side_of
from hybrid.placement.plan import ExpertShare, Placement
from hybrid.placement.rules import AUTO, Rule
from hybrid.placement.rules.selection import Claim, Selection

_AUTO_RULE = Rule("cpu", AUTO)


class Placer:
    """Placements on one machine. ``cache``: device -> bytes kept there for copies of experts."""

    def __init__(self, model: Model, machine: Machine, selection: Selection, cache: dict[str, int]) -> None:
        self.model, self.machine, self.selection, self.cache = model, machine, selection, cache
        self._open: dict[tuple[str, str, str], Placement] = {}  # tensor, device, numa

    def place(self, size: RunSize, numa: str) -> dict[str, Placement]:
        """Every tensor; ``numa`` is what becomes of weights on the CPU where no rule says.

        Raises:
            PlacementError: a rule shards what cannot be cut.
        """
        tensors, open_experts = self.model.tensors, self.selection.open_experts
        claims = self.selection.claims
        fixed = {
            t.name: self._placement(t, [(c, c.rule.device) for c in claims[t.name]], numa)
            for t in tensors
            if t.name in claims
        }
        devices = place_open(self.model, Fixed(fixed, open_experts, self.cache), self.machine, size)
        for tensor in tensors:
            if tensor.name in devices:
                fixed[tensor.name] = self._open_placement(tensor, devices[tensor.name], numa)
        return {tensor.name: fixed[tensor.name] for tensor in tensors}

    def _open_placement(self, tensor: Tensor, device: str, numa: str) -> Placement:
        """Of what rules leave open on ``device``. Kept: looking for what fits draws up dozens of plans."""
        key = tensor.name, device, numa
        if key not in self._open:
            decided = [(claim, claim.rule.device) for claim in self.selection.claims.get(tensor.name, ())]
            rest = Claim(_AUTO_RULE, self.selection.open_experts.get(tensor.name))
            self._open[key] = self._placement(tensor, [*decided, (rest, device)], numa)
        return self._open[key]

    def _placement(self, tensor: Tensor, decided: Sequence[tuple[Claim, str]], numa: str) -> Placement:
        """Claims that place alike become one share, and a single share the whole tensor."""
        groups: dict[tuple[str, str, str | None], list[Claim]] = {}
        for claim, device in decided:
            key = device, self._numa(tensor, claim.rule, device, numa), _format(claim.rule, tensor)
            groups.setdefault(key, []).append(claim)
        count = sum(tensor.num_experts if c.experts is None else len(c.experts) for c, _ in decided)
        if len(groups) == 1 and count == tensor.num_experts:
            (((device, mode, format_), found),) = groups.items()
            n_bytes = self._bytes(tensor, device, mode, format_, None)
            return Placement(device, _origins(found), n_bytes, mode, format_)
        shares = []
        for (device, mode, format_), found in groups.items():
            experts = tuple(sorted(e for claim in found for e in claim.experts or ()))
            n_bytes = self._bytes(tensor, device, mode, format_, len(experts))
            shares.append(ExpertShare(device, _origins(found), experts, n_bytes, mode, format_))
        origins = ", ".join(dict.fromkeys(share.rule for share in shares))
        n_bytes = sum(share.n_bytes for share in shares)
        return Placement(shares[0].device, origins, n_bytes, shares=tuple(shares))

    def _numa(self, tensor: Tensor, rule: Rule, device: str, numa: str) -> str:
        """One node holds everything, whatever its rule says; vectors are too small to matter."""
        nodes = self.machine.num_nodes
        if kind_of(device) != "cpu" or len(self.machine.node_ids) == 1 or not tensor.parts:
            return "none"
        mode = numa if rule.numa == "auto" else rule.numa
        if nodes == 1 and mode in ("replicate", "shard", "interleave"):
            return "none"
        problem = None
        if mode == "shard":
            problem = shard_problem(tensor.role, side_of(tensor.name, tensor.role), tensor.parts, nodes)
        if problem is None:
            return mode
        if rule.numa == "auto" and tensor.role != "routed_experts":
            return "replicate"  # a small part of the model
        where = f"{rule.where('numa')}: numa" if rule.numa == "shard" else "--numa"
        raise PlacementError(f"{where}: {tensor.name} cannot be divided: {problem}")

    def _bytes(
        self, tensor: Tensor, device: str, mode: str, format_: str | None, num_experts: int | None
    ) -> int:
        copies = self.machine.num_nodes if mode == "replicate" else 1
        stored = None if format_ is None else GGMLType[format_]
        return tensor.bytes_on(kind_of(device), stored, num_experts) * copies


def _format(rule: Rule, tensor: Tensor) -> str | None:
    """The format that matrices change to; vectors are float32 everywhere."""
    return None if not tensor.parts or rule.format == tensor.info.type.name else rule.format


def _origins(claims: Sequence[Claim]) -> str:
    return ", ".join(dict.fromkeys(claim.rule.origin for claim in claims))
