"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hybrid.cli.table import format_bytes, markdown_table
from hybrid.placement.memory import DeviceMemory, Model
from hybrid.placement.plan import Plan
from hybrid.placement.report import by_layers, by_role, by_rule

_BAR = 30


def sections(model: Model, plan: Plan, title: str) -> Iterator[str]:
    """Markdown, part by part."""
    size = plan.size
    yield f"# {title}\n"
    yield (
        f"context {size.max_model_len}, {size.max_num_seqs} at once, "
        f"{size.max_num_batched_tokens} tokens a step, "
        f"cache {size.kv_format}; {machine_line(plan)}\n"
    )
    yield memory_table(plan) + "\n"
    if plan.node_bytes:
        yield node_line(plan) + "\n"
    yield "\n".join(bars(plan.memory)) + "\n"
    yield prediction_line(plan) + "\n"
    if plan.expert_cache is not None:
        yield f"{plan.expert_cache}\n"
    yield "## Roles\n"
    yield _role_table(model, plan) + "\n"
    yield "## Layers\n"
    yield _layer_table(model, plan) + "\n"
    yield "## Rules\n"
    yield _rule_table(model, plan)
    if plan.warnings:
        yield "\n## Warnings\n"
        yield "\n".join(f"- {warning}" for warning in plan.warnings)


def machine_line(plan: Plan) -> str:
    """The machine in words."""
    machine = plan.machine
    kind = "an imagined machine" if machine.imagined else "this machine"
    nodes = f", {machine.num_nodes} NUMA nodes" if machine.num_nodes > 1 else ""
    modes = {part.numa for placement in plan.placements.values() for part in placement.parts} - {"none"}
    copies = f" ({'+'.join(sorted(modes))})" if modes else ""
    return f"{kind}: {machine.num_threads} threads, {machine.isa}{nodes}{copies}"


def node_line(plan: Plan) -> str:
    """What is bound to each NUMA node."""
    budgets = {node.id: f" of {format_bytes(node.budget_bytes)}" for node in plan.machine.nodes}
    bound = [
        f"node {node} {format_bytes(n_bytes)}{budgets.get(node, '')}"
        for node, n_bytes in sorted(plan.node_bytes.items())
    ]
    why = f"numa {plan.numa}: {plan.numa_reason}"
    return f"{why}; bound to them {', '.join(bound)}; loading verifies where their pages are"


def memory_table(plan: Plan) -> str:
    """Sums by device."""
    header = ("device", "weights", "KV cache", "working", "total", "budget", "left")
    rows = []
    for name, memory in plan.memory.items():
        budget, left = "unknown", "-"
        if memory.budget_bytes is not None:
            budget, left = (
                format_bytes(memory.budget_bytes),
                format_bytes(memory.budget_bytes - memory.total_bytes),
            )
        parts = (memory.weights_bytes, memory.kv_cache_bytes, memory.scratch_bytes, memory.total_bytes)
        rows.append((name, *map(format_bytes, parts), budget, left))
    return markdown_table(header, rows, right=header[1:])


def bars(memories: Mapping[str, DeviceMemory]) -> Iterator[str]:
    """``cuda:0 |████████▓▒······| 78 %``: weights, cache, working memory, room."""
    width = max(map(len, memories), default=0)
    for name, memory in memories.items():
        budget = memory.budget_bytes or memory.total_bytes or 1
        ends, total = [], 0
        for part in (memory.weights_bytes, memory.kv_cache_bytes, memory.scratch_bytes):
            total += part
            ends.append(min(_BAR, round(total / budget * _BAR)))
        weights, cache, working = ends[0], ends[1] - ends[0], ends[2] - ends[1]
        bar = "█" * weights + "▓" * cache + "▒" * working + "·" * (_BAR - ends[2])
        share = "" if memory.budget_bytes is None else f" {memory.total_bytes / budget:.0%}"
        yield f"    {name:<{width}} |{bar}|{share}"
    yield "    █ weights  ▓ KV cache  ▒ working memory  · free"


def prediction_line(plan: Plan) -> str:
    """Speed in a sentence."""
    found = plan.prediction
    if found is None:
        return "predicted: nothing, the header does not tell the model's sizes"
    basis = (
        "from rates measured here" if found.measured else "estimated (`hybrid doctor` measures this machine)"
    )
    read = ", ".join(f"{n / 1e9:.2f} GB from {device}" for device, n in found.bytes_read.items())
    return (
        f"predicted: {found.decode_tps:.4g} tokens/s decoding at half the context, "
        f"{found.prefill_tps:.4g} tokens/s of prompt, {basis}; a token reads {read}"
    )


def _role_table(model: Model, plan: Plan) -> str:
    header = ("role", "device", "tensors", "bytes", "a token reads", "formats")
    rows = [
        (
            share.role,
            share.device,
            str(share.num_tensors),
            format_bytes(share.n_bytes),
            format_bytes(share.active_bytes),
            ", ".join(share.formats),
        )
        for share in by_role(model, plan)
    ]
    return markdown_table(header, rows, right=("tensors", "bytes", "a token reads"))


def _layer_table(model: Model, plan: Plan) -> str:
    ranges = by_layers(model, plan)
    roles = list(dict.fromkeys(role for entry in ranges for role in entry.devices))
    rows = [
        (entry.label, format_bytes(entry.n_bytes), *(entry.devices.get(role, "") for role in roles))
        for entry in ranges
    ]
    return markdown_table(("layers", "bytes", *roles), rows, right=("bytes",))


def _rule_table(model: Model, plan: Plan) -> str:
    rows = [
        (share.rule, ", ".join(share.devices), str(share.num_tensors), format_bytes(share.n_bytes))
        for share in by_rule(model, plan)
    ]
    return markdown_table(("rule", "devices", "tensors", "bytes"), rows, right=("tensors", "bytes"))
