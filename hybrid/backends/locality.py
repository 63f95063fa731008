"""Whether weights are on the NUMA nodes they were bound to, as the system counts their pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hybrid.kernels import cpu


@dataclass(frozen=True)
class Locality:
    """Pages of weights that have a node of their own.

    Attributes:
        share: of them on their node, 0 to 1; ``None``: the system does not tell.
        method: ``move_pages`` or ``numa_maps``, ``""`` where it does not tell.
        num_pages: how many there are; 0 where pages only alternate between nodes.
        problem: why the share is not 1, as far as it is known.
    """

    share: float | None
    method: str
    num_pages: int
    problem: str = ""

    @property
    def warning(self) -> str:
        """A sentence where not every page is known to be local; else empty."""
        because = f": {self.problem}" if self.problem else ""
        if self.share is None:
            return f"weights were to be local to NUMA nodes, which is UNVERIFIED{because}"
        if self.share < 1:
            return (
                f"ONLY {self.share:.1%} of the weights' pages are on their NUMA node (by {self.method})"
                f"{because}; decoding reads the rest from another node, slower"
            )
        return ""

    def __str__(self) -> str:
        if self.share is None:
            return "unverified"
        return f"{self.share:.0%} local by {self.method}"


def locality_of(matrices: Iterable[cpu.PackedMatrix]) -> Locality | None:
    """Of all parts of matrices that are bound to one node each; ``None`` if there are none."""
    local = total = absent = 0
    methods: set[str] = set()
    problems: dict[str, None] = {}
    bound = False
    for matrix in matrices:
        for part in matrix.parts:
            if part["problem"]:
                problems[part["problem"]] = None
            if part["node"] < 0:
                continue
            bound = True
            count = cpu.count_pages(part["address"], part["nbytes"])
            methods.add(count["method"])
            local += count["pages"].get(part["node"], 0)
            total += sum(count["pages"].values())
            absent += count["absent"]
            if count["problem"]:
                problems[count["problem"]] = None
    if not bound:
        return None
    if absent and not problems:
        problems[f"{absent} pages are not in memory"] = None
    problem = "; ".join(problems)
    if "" in methods or not total:
        return Locality(None, "", total + absent, problem)
    return Locality(local / (total + absent), "+".join(sorted(methods)), total + absent, problem)
