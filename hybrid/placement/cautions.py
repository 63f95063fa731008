"""What a plan holds that this build cannot run yet, or that is likely not meant."""

from __future__ import annotations

from collections.abc import Iterator

from hybrid.gguf import TRAITS, GGMLType
from hybrid.placement.capabilities import can_multiply, kind_of
from hybrid.placement.memory import Model
from hybrid.placement.plan import Plan
from hybrid.placement.report import parts

# Kinds whose backend has not run on its device yet.
UNTRIED_KINDS = ("cuda",)
_NEARLY_FULL = 0.97


def cautions(model: Model, plan: Plan) -> Iterator[str]:
    """Whole sentences."""
    untried = [device for device in plan.devices if kind_of(device) in UNTRIED_KINDS]
    if untried:
        yield (
            f"{', '.join(untried)}: the GPU backend has been tested in Triton's interpreter, and "
            "has not run on a GPU yet; speeds are estimates"
        )
    yield from _without_kernel(model, plan)
    yield from _grown(model, plan)
    if plan.expert_cache is not None and plan.expert_cache.pays is False:
        yield str(plan.expert_cache)
    for memory in plan.memory.values():
        if memory.budget_bytes and memory.total_bytes > _NEARLY_FULL * memory.budget_bytes:
            left = (memory.budget_bytes - memory.total_bytes) / (1 << 20)
            yield f"{memory.device} is nearly full: {left:.0f} MiB are left of its budget"


def _grown(model: Model, plan: Plan) -> Iterator[str]:
    """Formats of rules that take more than the file's."""
    found: dict[tuple[str, str, str], int] = {}
    for tensor, part in parts(model, plan):
        if part.format is None:
            continue
        before, after = TRAITS[tensor.info.type], TRAITS[GGMLType[part.format]]
        if after.block_bytes * before.block_size > before.block_bytes * after.block_size:
            key = part.rule, tensor.info.type.name, part.format
            found[key] = found.get(key, 0) + 1
    for (rule, before_name, after_name), count in found.items():
        some = f"{count} tensors" if count > 1 else "a tensor"
        yield (
            f"{rule} stores {some} of {before_name} as {after_name}, which takes more and adds nothing; "
            "leave its format out to keep the file's"
        )


def _without_kernel(model: Model, plan: Plan) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for tensor, part in parts(model, plan):
        format_ = tensor.info.type if part.format is None else GGMLType[part.format]
        if tensor.parts and not can_multiply(format_, kind_of(part.device), plan.machine.isa):
            found.setdefault((format_.name, part.device), []).append(tensor.name)
    for (name, device), names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{name} has no kernel on {device}, and {names[0]}{more} is placed there"
