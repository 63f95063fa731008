"""The message for a plan that does not fit: the sums, and the smallest changes that would make it fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from hybrid.config import KV_FORMATS
from hybrid.placement.capabilities import cache_row_bytes, kind_of
from hybrid.placement.size_text import size_text

if TYPE_CHECKING:
    from hybrid.placement.memory import DeviceMemory, RunSize
    from hybrid.placement.plan import Plan
    from hybrid.placement.planner import Planner

_COLUMNS = ("device", "weights", "KV cache", "working memory", "total", "budget", "too much")


def refusal(planner: Planner, found: Plan) -> str:
    """What is exceeded, by how much, and what would help: a line, a table and a list. Each change is tried
    before it is named."""
    over = [
        f"{memory.device} ({size_text(memory.missing_bytes)} too much)"
        for memory in found.memory.values()
        if memory.missing_bytes
    ]
    changes = list(_changes(planner, found)) or ["a smaller file"]
    return "\n".join(
        [
            f"the model does not fit on {', '.join(over)}",
            *memory_table(found.memory.values()),
            "Any one of these would make it fit:" if len(changes) > 1 else "This would make it fit:",
            *(f"  - {change}" for change in changes),
        ]
    )


def memory_table(memories: Iterable[DeviceMemory]) -> list[str]:
    """Lines: what is meant to be on each device in use, and its budget."""
    rows = [_COLUMNS, *(_sums(memory) for memory in memories if memory.total_bytes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  " + "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in cells)
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]
    return [line.rstrip() for line in table]


def _sums(memory: DeviceMemory) -> tuple[str, ...]:
    return (
        memory.device,
        size_text(memory.weights_bytes),
        size_text(memory.kv_cache_bytes),
        size_text(memory.scratch_bytes),
        size_text(memory.total_bytes),
        "unknown" if memory.budget_bytes is None else size_text(memory.budget_bytes),
        size_text(memory.missing_bytes) if memory.missing_bytes else "",
    )


def _changes(planner: Planner, found: Plan) -> Iterator[str]:
    size = found.size
    formats = _smaller_formats(size.kv_format)
    if planner.can_fit(replace(size, kv_format=formats[-1] if formats else size.kv_format)):
        yield from _smaller_runs(planner, size, formats)
    yield from _more_memory(planner, found)


def _smaller_runs(planner: Planner, size: RunSize, formats: list[str]) -> Iterator[str]:
    fitted = planner.largest_fitting(size)
    if fitted != size:
        smaller = fitted.max_num_batched_tokens != size.max_num_batched_tokens
        steps = f" and {fitted.max_num_batched_tokens} tokens a step" if smaller else ""
        yield f"a context of {fitted.max_model_len} tokens (-c {fitted.max_model_len}){steps}"
    for format_ in formats:
        if planner.fits(replace(size, kv_format=format_)):
            yield f"a cache of {format_} (--kv-format {format_})"
            break
    for batch in size.smaller_batches():
        if planner.fits(replace(size, max_num_batched_tokens=batch)):
            yield f"{batch} tokens a step (max_num_batched_tokens, -ub)"
            break


def _more_memory(planner: Planner, found: Plan) -> Iterator[str]:
    for memory in found.memory.values():
        if not memory.missing_bytes:
            continue
        if kind_of(memory.device) == "cpu":
            missing = size_text(memory.missing_bytes)
            yield f"{missing} more RAM (--ram), or as much less of weights by a smaller file"
        else:
            per_layer = _largest_open(found, memory.device)
            yield (
                f"rules that take {size_text(memory.missing_bytes)} from {memory.device} to the cpu"
                + (f", such as {per_layer}" if per_layer else "")
            )


def _largest_open(found: Plan, device: str) -> str:
    """The heaviest tensor that a rule has put on a device, as an example."""
    there = [(p.bytes_on(device), name) for name, p in found.placements.items() if device in p.devices]
    if not there:
        return ""
    n_bytes, name = max(there)
    return f"{name} ({size_text(n_bytes)}, by {found.placements[name].rule})"


def _smaller_formats(kv_format: str) -> list[str]:
    """Cache formats that take fewer bytes, the largest first."""
    taken = cache_row_bytes(32, kv_format)
    smaller = [f for f in KV_FORMATS if cache_row_bytes(32, f) < taken]
    return sorted(smaller, key=lambda f: -cache_row_bytes(32, f))
