"""What a plan holds that this build cannot run yet, or that is likely not meant."""

from __future__ import annotations

from collections.abc import Iterator

from hybrid.gguf import GGMLType
from hybrid.placement.capabilities import can_multiply, kind_of
from hybrid.placement.memory import Model
from hybrid.placement.plan import Plan
from hybrid.placement.report import parts
from hybrid.placement.sections import EXPERT_CACHE

# What loading takes today; a plan may hold more.
RUNNABLE_KINDS = ("cpu", "fake")
RUNNABLE_CACHE_FORMATS = ("f32", "f16", "bf16")
_NEARLY_FULL = 0.97


def cautions(model: Model, plan: Plan) -> Iterator[str]:
    """Whole sentences."""
    absent = [device for device in plan.devices if kind_of(device) not in RUNNABLE_KINDS]
    if absent:
        yield f"this build does not run {', '.join(absent)}: the plan can be looked at, not loaded"
    if plan.size.kv_format not in RUNNABLE_CACHE_FORMATS:
        yield f"this build does not run a cache of {plan.size.kv_format}: plan it, but load another"
    yield from _without_kernel(model, plan)
    for memory in plan.memory.values():
        kept = memory.scratch_parts.get(EXPERT_CACHE, 0)
        if kept:
            yield (
                f"this build keeps no copies of experts on {memory.device} yet: {kept / (1 << 30):.2f} GiB "
                "for them are planned, not used, and speed is predicted without"
            )
    for memory in plan.memory.values():
        if memory.budget_bytes and memory.total_bytes > _NEARLY_FULL * memory.budget_bytes:
            left = (memory.budget_bytes - memory.total_bytes) / (1 << 20)
            yield f"{memory.device} is nearly full: {left:.0f} MiB are left of its budget"


def _without_kernel(model: Model, plan: Plan) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for tensor, part in parts(model, plan):
        format_ = tensor.info.type if part.format is None else GGMLType[part.format]
        if tensor.parts and not can_multiply(format_, kind_of(part.device), plan.machine.isa):
            found.setdefault((format_.name, part.device), []).append(tensor.name)
    for (name, device), names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{name} has no kernel on {device}, and {names[0]}{more} is placed there"
