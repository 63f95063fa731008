"""A plan as flags of llama.cpp, as near as they come."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hybrid.errors import PlacementError
from hybrid.placement.memory import Model
from hybrid.placement.plan import Plan
from hybrid.placement.report import stored


def flags(model: Model, plan: Plan) -> list[str]:
    """Arguments for `llama-server` or `llama-cli`. Tensors on the CPU are named by layer and kind; llama.cpp
    keeps the embedding there by itself, and numbers its devices ``CUDA0`` and so on.

    Raises:
        PlacementError: a tensor is divided or quantised anew, which llama.cpp does not do.
    """
    _require_plain(model, plan)
    found = ["-c", str(plan.size.max_model_len), "-ub", str(plan.size.max_num_batched_tokens)]
    if plan.size.kv_format != "f16":
        found += ["-ctk", plan.size.kv_format]
    gpus = [device for device in plan.devices if device.startswith("cuda")]
    if not gpus:
        return [*found, "-ngl", "0"]
    found += ["-ngl", "999"]
    main = max(gpus, key=plan.bytes_on)
    if len(gpus) > 1:
        found += ["-mg", main.partition(":")[2]]
    groups: dict[tuple[str, str], list[int]] = {}
    for tensor, placement in stored(model, plan):
        if placement.device == main or tensor.role == "embedding" or tensor.layer is None:
            continue
        kind = tensor.name.split(".", 2)[2]
        groups.setdefault((placement.device, kind), []).append(tensor.layer)
    layers_of: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (device, kind), layers in groups.items():
        layers_of.setdefault((device, tuple(layers)), []).append(kind)
    for (device, chosen), kinds in layers_of.items():
        every = set(chosen) == _layers_with(model, kinds)
        found += ["-ot", f"{_pattern(None if every else chosen, kinds)}={_device(device)}"]
    return found


def _require_plain(model: Model, plan: Plan) -> None:
    for tensor, placement in stored(model, plan):
        if placement.shares or placement.format is not None:
            what = "divided by experts" if placement.shares else f"stored as {placement.format}"
            raise PlacementError(
                f"llama.cpp has no flag for {tensor.name}, which is {what} by {placement.rule}; "
                "place whole tensors in the format of the file"
            )


def _layers_with(model: Model, kinds: Sequence[str]) -> set[int]:
    """Layers that have all of these tensors."""
    names = {tensor.name for tensor in model.tensors if tensor.share}
    return {i for i in model.dims.layers if all(f"blk.{i}.{kind}" in names for kind in kinds)}


def _pattern(layers: Sequence[int] | None, kinds: Sequence[str]) -> str:
    numbers = r"\d+" if layers is None else f"({'|'.join(map(str, layers))})"
    if set(kinds) == {f"ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")}:
        return rf"blk\.{numbers}\.ffn_(gate|up|down)_exps"
    listed = "|".join(re.escape(kind) for kind in kinds)
    return rf"blk\.{numbers}\.({listed})"


def _device(device: str) -> str:
    kind, _, number = device.partition(":")
    return f"CUDA{number}" if kind == "cuda" else "CPU"
