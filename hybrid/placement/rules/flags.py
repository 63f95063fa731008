"""llama.cpp's short flags as rules: ``-ot``, ``-cmoe``, ``-ncmoe N``, ``-ngl N``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid.errors import PlacementError
from hybrid.placement.rules.nodes import Node
from hybrid.placement.rules.parser import regular_expression
from hybrid.placement.rules.ranges import Ranges
from hybrid.placement.rules.rule import Rule
from hybrid.placement.rules.source import AUTO, Rules, overridden
from hybrid.placement.rules.values import device_name

_LLAMA_CUDA = re.compile(r"CUDA([0-9]{1,2})")
_EXPERTS = frozenset(("routed_experts",))
CPU = "cpu"


@dataclass(frozen=True)
class PlacementFlags:
    """What was given; each means what it means to llama.cpp.

    Attributes:
        overrides: texts of ``-ot``: ``REGEX=DEVICE``, several divided by commas.
        cpu_moe: all routed experts on the CPU.
        num_cpu_moe_layers: those of the first so many layers.
        num_gpu_layers: so many of the last layers on the GPU, counting the output as the last of all, and
            the others on the CPU.
    """

    overrides: Sequence[str] = ()
    cpu_moe: bool = False
    num_cpu_moe_layers: int | None = None
    num_gpu_layers: int | None = None

    @property
    def given(self) -> bool:
        return bool(
            self.overrides or self.cpu_moe or self.num_cpu_moe_layers or self.num_gpu_layers is not None
        )


def with_flags(rules: Rules, flags: PlacementFlags, num_layers: int, gpus: Sequence[str]) -> Rules:
    """Rules that begin with those of the flags; ``rules`` themselves where none is given. ``num_layers`` and
    ``gpus`` are the model's and the machine's.

    Raises:
        PlacementError: a flag is malformed, or contradicts the rules or the machine.
    """
    if not flags.given:
        return rules
    found = [rule for text in flags.overrides for rule in _overrides(text)]
    if flags.cpu_moe:
        found.append(Rule(CPU, "-cmoe", roles=_EXPERTS, optional=True))
    if flags.num_cpu_moe_layers:
        number = flags.num_cpu_moe_layers
        layers = Ranges(((0, number - 1),))  # the first may be dense
        found.append(Rule(CPU, f"-ncmoe {number}", roles=_EXPERTS, layers=layers, optional=True))
    if flags.num_gpu_layers is not None:
        if rules != AUTO:
            raise PlacementError("-ngl: it places all layers, and so do --rules; give one of them")
        found += _gpu_layers(flags.num_gpu_layers, num_layers, gpus)
    return overridden(rules, tuple(found), "the command line")


def _overrides(text: str) -> list[Rule]:
    """Commas divide entries; one before the next ``=`` belongs to the regex, as in ``[0-9]{1,2}``."""
    rules, pattern = [], ""
    for piece in text.split(","):
        pattern += piece
        if "=" not in piece:
            pattern += ","
            continue
        origin = f"-ot {pattern}"
        expression, _, device = pattern.rpartition("=")
        known = _LLAMA_CUDA.fullmatch(device)
        name = f"cuda:{int(known[1])}" if known else CPU if device == "CPU" else device
        rules.append(
            Rule(
                device_name(Node(origin, name), "device"),
                origin,
                regex=regular_expression(Node(origin, expression)),
            )
        )
        pattern = ""
    if pattern:
        raise PlacementError(f"-ot: expected REGEX=DEVICE, as in exps=CPU, found {text!r}")
    return rules


def _gpu_layers(number: int, num_layers: int, gpus: Sequence[str]) -> list[Rule]:
    origin = f"-ngl {number}"
    if number and len(gpus) > 1:
        raise PlacementError(
            f"{origin}: it fills one GPU, and there are {', '.join(gpus)}; "
            "write rules, or leave it out to fill them all"
        )
    gpu = gpus[0] if gpus else "cuda:0"
    embedding = Rule(CPU, origin, roles=frozenset(("embedding",)))
    first = max(num_layers + 1 - number, 0)
    on_gpu = [Rule(gpu, origin, layers=Ranges(((first, None),)))] if first < num_layers else []
    if first > 0:
        on_gpu.append(Rule(CPU, origin, layers=Ranges(((0, min(first, num_layers) - 1),))))
    outside = Rule(gpu if number else CPU, origin, name="output*", optional=True)
    return [embedding, *on_gpu, outside]
