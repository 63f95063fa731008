"""Predicted tokens per second.

A step takes the sum over its tensors of bytes ÷ rate on their device; nothing overlaps, since attention,
router, experts and the next attention are a chain. On the CPU, seconds for one weight are those measured for
its format and for so many tokens at once (`hybrid.calibration`); where nothing was measured they follow from
bandwidth and `RAM_EFFICIENCY`, and in prefill from `INT8_MACS_PER_THREAD`, the same for all formats.
GPU rates are the data sheet's times the efficiencies below: estimates until the kernels have run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from hybrid.gguf import GGMLType
from hybrid.placement.capabilities import cache_row_bytes, kind_of
from hybrid.placement.machine import DEFAULT_RAM_BANDWIDTH, DEFAULT_VRAM_BANDWIDTH, Machine
from hybrid.placement.memory import Divisible, Model, Placed, RunSize, Tensor, cache_devices
from hybrid.placement.numa import REMOTE_EFFICIENCY

if TYPE_CHECKING:
    from hybrid.placement.plan import Plan

# Share of the RAM read bandwidth that products with one token reach, as measured on Zen 4 with AVX-512 for
# formats whose unpacking is not the limit (Q4_K, Q8_0).
RAM_EFFICIENCY = 0.85
# Multiply-adds per second and thread of prompt products, measured on the same with 128 tokens at once;
# avxvnni and amx have not run, and count as avx2 and avx512vbmi.
INT8_MACS_PER_THREAD = {
    "scalar": 0.5e9,
    "avx2": 45e9,
    "avxvnni": 45e9,
    "avx512vnni": 110e9,
    "avx512vbmi": 110e9,
    "amx": 110e9,
}
CALL_S = 8e-6  # of an operation besides its arithmetic
CALLS_PER_LAYER = 14
# Estimates.
VRAM_EFFICIENCY = 0.75
GPU_MACS = 35e12 * 0.5
GPU_LAYER_S = 40e-6  # kernels of a captured graph
CACHED_LAYER_S = 15e-6  # kernels of a layer's cached experts, in the same graph
HANDOFF_S = 30e-6  # to the CPU and back, for each layer whose experts are there
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Prediction:
    """Tokens per second at half the context and for a long prompt; bytes a decoded token reads by device.

    ``measured`` tells whether the CPU's rates are those of this machine.
    """

    decode_tps: float
    prefill_tps: float
    bytes_read: Mapping[str, float]
    measured: bool


def predict(
    model: Model, placed: Mapping[str, Divisible], machine: Machine, size: RunSize
) -> Prediction | None:
    """Speed of one sequence; ``None`` where the header does not say how large the model is."""
    if not model.dims.hidden_size or not model.dims.layers:
        return None
    prompt = max(1, min(PREFILL_TOKENS, size.max_num_batched_tokens, size.max_model_len - 1))
    decode = step_seconds(model, placed, machine, size, 1, size.max_model_len // 2)
    prefill = step_seconds(model, placed, machine, size, prompt, prompt // 2)
    return Prediction(
        1 / decode,
        prompt / prefill,
        bytes_read(model, placed, size, size.max_model_len // 2),
        measured=machine.rates is not None,
    )


def run_tps(planned: Plan, model: Model, *, n_prompt: int, n_gen: int, n_depth: int) -> float | None:
    """Tokens per second of ``n_prompt`` prompt tokens in steps of the plan's size, or of ``n_gen`` decoded
    ones, with ``n_depth`` in the cache before; ``None`` where header or devices allow no prediction."""
    kinds = {kind_of(device) for device in planned.devices}
    if not model.dims.hidden_size or kinds - {"cpu", "cuda"}:
        return None
    args = model, planned.placements, planned.machine, planned.size
    if not n_prompt:
        return 1 / step_seconds(*args, 1, n_depth + (n_gen + 1) / 2)
    step = planned.size.max_num_batched_tokens
    seconds = 0.0
    for start in range(0, n_prompt, step):
        count = min(step, n_prompt - start)
        seconds += step_seconds(*args, count, n_depth + start + (count + 1) / 2)
    return n_prompt / seconds


def bytes_read(
    model: Model, placed: Mapping[str, Divisible], size: RunSize, context: float
) -> dict[str, float]:
    """Bytes a decoded token reads on each device: active weights and the cache of ``context`` tokens."""
    found: dict[str, float] = {}
    for tensor in model.tensors:
        for part in placed[tensor.name].parts if tensor.share else ():
            found[part.device] = found.get(part.device, 0.0) + tensor.active_bytes(part)
    row = cache_row_bytes(model.dims.cache_width, size.kv_format)
    for device in cache_devices(model, placed).values():
        found[device] = found.get(device, 0.0) + row * context
    return found


def step_seconds(
    model: Model,
    placed: Mapping[str, Divisible],
    machine: Machine,
    size: RunSize,
    num_tokens: int,
    context: float,
) -> float:
    """Seconds of a step of ``num_tokens`` tokens that each attend to ``context`` others, logits of the last
    included."""
    total = 0.0
    for tensor in model.tensors:
        for part in placed[tensor.name].parts if tensor.share else ():
            total += _part_seconds(tensor, part, machine, num_tokens)
    attention = cache_devices(model, placed)
    for device in attention.values():
        total += _attention_seconds(model, device, machine, size, num_tokens, context)
    elsewhere = {
        t.layer
        for t in model.tensors
        if t.role == "routed_experts" and any(kind_of(p.device) != "cuda" for p in placed[t.name].parts)
    }
    for layer, device in attention.items():
        split = kind_of(device) == "cuda" and layer in elsewhere
        crossing = num_tokens * model.dims.hidden_size * 6 / machine.pcie_bandwidth
        total += HANDOFF_S + crossing if split else 0.0
    return total


def _part_seconds(tensor: Tensor, part: Placed, machine: Machine, num_tokens: int) -> float:
    if tensor.role == "embedding" and tensor.share < 1:
        return 0.0  # one row of it
    elements = tensor.info.n_elements * tensor.fraction(part)
    weights = elements * tensor.share
    weight_bytes = tensor.active_bytes(part) / weights
    tokens = 1.0 if tensor.role in ("output", "embedding") else float(num_tokens)
    if tensor.role == "routed_experts":
        # Of so many experts used by a token, a prompt meets nearly all, each with a few tokens.
        chosen = 1 - (1 - tensor.share) ** num_tokens
        weights, tokens = elements * chosen, num_tokens * tensor.share / chosen
    if kind_of(part.device) != "cuda":
        format_ = part.format or tensor.info.type.name
        return weights * _cpu_weight_seconds(machine, format_, tokens, weight_bytes)
    seconds_read = weights * weight_bytes / _vram_bandwidth(machine, part.device) / VRAM_EFFICIENCY
    return max(seconds_read, weights * tokens / GPU_MACS)


def _cpu_weight_seconds(machine: Machine, format_: str, tokens: float, weight_bytes: float) -> float:
    """Seconds of one weight for ``tokens`` tokens."""
    if machine.rates is not None and format_ in machine.rates.weight_s:
        return interpolate(machine.rates.weight_s[format_], tokens)
    macs = INT8_MACS_PER_THREAD[machine.isa] * machine.num_threads
    return max(weight_bytes / (ram_bandwidth(machine) * RAM_EFFICIENCY), tokens / macs)


def cpu_expert_seconds(tensors: Sequence[Tensor], formats: Sequence[GGMLType], machine: Machine) -> float:
    """Seconds of one expert, whose matrices are of these stacks and stored so, for one token on the CPU."""
    total = 0.0
    for tensor, format_ in zip(tensors, formats, strict=True):
        weights = tensor.info.n_elements / tensor.num_experts
        weight_bytes = tensor.bytes_on("cpu", format_, num_experts=1) / weights
        total += weights * _cpu_weight_seconds(machine, format_.name, 1.0, weight_bytes)
    return total


def cached_expert_seconds(
    tensors: Sequence[Tensor], formats: Sequence[GGMLType], machine: Machine, device: str
) -> float:
    """The same for a copy on ``device``. Test devices compute on the CPU and save nothing."""
    if kind_of(device) != "cuda":
        return cpu_expert_seconds(tensors, formats, machine)
    pairs = zip(tensors, formats, strict=True)
    n_bytes = sum(tensor.bytes_on("cuda", format_, num_experts=1) for tensor, format_ in pairs)
    return n_bytes / _vram_bandwidth(machine, device) / VRAM_EFFICIENCY


def cached_layer_seconds(device: str) -> float:
    """Seconds a layer with copies on ``device`` takes besides their arithmetic, by a token."""
    return CACHED_LAYER_S if kind_of(device) == "cuda" else 0.0


def ram_bandwidth(machine: Machine) -> float:
    """Bytes per second of RAM, all nodes together."""
    stated = machine.cpu.read_bandwidth
    if stated is None and machine.rates is not None:
        return machine.rates.read_bandwidth
    one_node = stated or DEFAULT_RAM_BANDWIDTH
    if machine.num_nodes == 1:
        return one_node
    return one_node * machine.num_nodes * (1.0 if machine.numa else REMOTE_EFFICIENCY)


def _vram_bandwidth(machine: Machine, device: str) -> float:
    """Bytes per second of a GPU's memory, as stated or that of the default card."""
    gpu = machine.device(device)
    return DEFAULT_VRAM_BANDWIDTH if gpu is None or gpu.read_bandwidth is None else gpu.read_bandwidth


def interpolate(points: Mapping[int, float], tokens: float) -> float:
    """Between the numbers of tokens measured, and beyond the last at its slope."""
    known = sorted(points.items())
    if tokens <= known[0][0] or len(known) == 1:
        return known[0][1] * max(tokens / known[0][0], 1.0)
    pairs = list(pairwise(known))
    (low, at_low), (high, at_high) = next((pair for pair in pairs if tokens <= pair[1][0]), pairs[-1])
    return at_low + (at_high - at_low) * (tokens - low) / (high - low)


def _attention_seconds(
    model: Model, device: str, machine: Machine, size: RunSize, num_tokens: int, context: float
) -> float:
    """Attention of one layer and what its operations cost besides arithmetic."""
    dims, rates = model.dims, machine.rates
    macs = num_tokens * context * dims.num_heads * (dims.cache_width + dims.kv_lora_rank)
    row = cache_row_bytes(dims.cache_width, size.kv_format)
    if kind_of(device) == "cuda":
        seconds_read = context * row / _vram_bandwidth(machine, device) / VRAM_EFFICIENCY
        return GPU_LAYER_S + max(macs / GPU_MACS, seconds_read)
    rate = rates.attention_macs if rates else _default_attention_macs(machine)
    call_s = rates.call_s if rates else CALL_S
    return macs / rate + CALLS_PER_LAYER * call_s


def _default_attention_macs(machine: Machine) -> float:
    """Float32 attention: a quarter of int8's rate."""
    return INT8_MACS_PER_THREAD[machine.isa] * machine.num_threads / 4
