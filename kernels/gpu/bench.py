"""Every operation of the registry on a GPU: checked, then timed beside what the device can do at most."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hybrid.kernels.gpu.formats import QuantizedMatrix
from hybrid.kernels.gpu.launch import Plan
from hybrid.kernels.gpu.op import Op, Shape, shape_name
from hybrid.kernels.gpu.registry import OPS
from hybrid.kernels.gpu.target import target_of
from hybrid.kernels.gpu.verify import make_arguments, verify

_COPIED_BYTES = 1 << 30
_MATMUL_SIZE = 8192
_REPEATS = 20
_MAX_COPIES = 64


@dataclass(frozen=True)
class GpuLimits:
    """Bytes a second that a copy reads and writes, and bf16 operations a second of `torch.matmul`."""

    device: str
    bandwidth: float
    bf16_rate: float


@dataclass(frozen=True)
class GpuResult:
    """One production shape.

    Attributes:
        error: the largest error of the operation's test shapes as a share of what arithmetic allows.
        limit_fraction: the least time that its bytes and operations take, over the time measured.
    """

    name: str
    shape: str
    error: float
    seconds: float
    bytes_s: float
    ops_s: float
    limit_fraction: float


def cuda_device() -> torch.device:
    """The GPU to measure.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("the benchmark of GPU kernels needs a GPU: torch finds no CUDA device here")
    return torch.device("cuda", torch.cuda.current_device())


def measure_limits(device: torch.device) -> GpuLimits:
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    a = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device=device, dtype=torch.bfloat16)
    copied, multiplied = _time([lambda: copy.copy_(source)]), _time([lambda: a @ a])
    name = torch.cuda.get_device_name(device)
    return GpuLimits(name, 2 * _COPIED_BYTES / copied, 2 * _MATMUL_SIZE**3 / multiplied)


def bench_ops(
    device: torch.device, limits: GpuLimits, names: Sequence[str] = (), dtype: torch.dtype = torch.bfloat16
) -> Iterator[GpuResult]:
    """Results of the operations whose name contains one of ``names``; of all without names.

    Raises:
        WrongResult: an operation fails its check; nothing of it is timed.
    """
    for op in OPS.values():
        if names and not any(name in op.name for name in names):
            continue
        error = max(verify(op, shape, dtype, device) for shape in op.test_shapes)
        for shape in op.production_shapes:
            yield _bench_shape(op, shape, device, limits, error, dtype)


def _bench_shape(
    op: Op, shape: Shape, device: torch.device, limits: GpuLimits, error: float, dtype: torch.dtype
) -> GpuResult:
    plans = _rotated(op, shape, device, dtype)
    seconds = _time([plan.run for plan in plans])
    work = op.work(shape)
    least = max(work.bytes / limits.bandwidth, work.ops / limits.bf16_rate)
    name = shape_name(shape)
    return GpuResult(op.name, name, error, seconds, work.bytes / seconds, work.ops / seconds, least / seconds)


def _rotated(op: Op, shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Plan]:
    """Plans with arguments of their own, together four times what the L2 cache holds."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    first = make_arguments(op, shape, dtype, device)
    plans = [op.plan(target_of(device), **first)]
    size = max(1, sum(_bytes(value) for value in first.values()))
    for _ in range(min(_MAX_COPIES, 4 * cache // size)):
        args = {name: _copy(value) for name, value in first.items()}
        plans.append(op.plan(target_of(device), **args))
    return plans


def _bytes(value: Any) -> int:
    if isinstance(value, QuantizedMatrix):
        return value.data.nbytes
    return int(value.nbytes) if isinstance(value, torch.Tensor) else 0


def _copy(value: Any) -> Any:
    if isinstance(value, QuantizedMatrix):
        return QuantizedMatrix(value.format, value.batch, value.rows, value.cols, value.data.clone())
    return value.clone() if isinstance(value, torch.Tensor) else value


def _time(calls: Sequence[Callable[[], Any]]) -> float:
    """Median seconds of a call, the calls taken in turn as one CUDA graph, after a pass that compiles."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    samples: list[float] = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(samples)
