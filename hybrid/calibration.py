"""This machine as the planner sees it: memory, threads, and rates measured once and kept in a cache file.

Rates depend on the processor, the number of threads and the ISA, which name the file:
``$XDG_CACHE_HOME/hybrid/rates-*.json``. `hybrid doctor` measures common formats, `hybrid bench` those of its
model; plans use what is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid import env
from hybrid.config import BLOCK_SIZE
from hybrid.free_memory import available_memory
from hybrid.gguf import TRAITS, GGMLType, random_blocks
from hybrid.gpus import gpu_memory
from hybrid.kernels import cpu
from hybrid.log import get_logger
from hybrid.placement.capabilities import CPU_FORMATS
from hybrid.placement.machine import RAM_MARGIN_BYTES, Device, Machine, Node, Rates, usable_vram
from hybrid.placement.numa import Workers, spread
from hybrid.system_files import processor_name

if TYPE_CHECKING:
    from hybrid.kernels.cpu._cpu import NumaNode

logger = get_logger(__name__)

# Tokens of a product for which weights are timed: decoding, an expert's share of a prompt, a prompt.
TOKENS = (1, 16, 128)
COMMON_FORMATS = (GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.Q4_K, GGMLType.F32)
_ROWS, _COLS = 1024, 4096
_BATCH_BYTES = 256 << 20  # of weights read in turn: several times the last-level caches
_SECONDS = 0.05
_ROUNDS = 3  # apart in time, since other processes disturb
_HEADS, _LATENT, _ROPE, _KEYS = 16, 512, 64, 2048

_Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def this_machine(num_threads: int | None = None, isa: str | None = None) -> Machine:
    """The CPU this process may use, with the memory that is free less a margin, and rates if measured; GPUs
    with theirs, less a margin too."""
    threads = num_threads or len(cpu.physical_cores())
    isa = isa or cpu.current_isa()
    free = available_memory()
    budget = None if free is None else max(free - RAM_MARGIN_BYTES, 0)
    nodes = cpu.numa_nodes()
    workers = len(workers_of(nodes, threads).nodes)
    return Machine(
        (Device("cpu", budget), *_gpus()),
        num_nodes=max(workers, 1),
        num_threads=threads,
        isa=isa,
        numa=workers > 1,
        nodes=memory_of_nodes(nodes, threads),
        rates=read_rates(threads, isa),
    )


def _gpus() -> list[Device]:
    """``cuda:N`` as ``HYBRID_CUDA_DEVICES`` has it; names of one GPU share its memory."""
    memory = gpu_memory()
    mapped = env.get("HYBRID_CUDA_DEVICES")
    indices = [i for i in (range(len(memory)) if mapped is None else mapped) if i < len(memory)]
    return [
        Device(f"cuda:{number}", usable_vram(memory[index]) // indices.count(index))
        for number, index in enumerate(indices)
    ]


def workers_of(nodes: Sequence[NumaNode], num_threads: int) -> Workers:
    """CPUs and groups for threads, over the nodes whose memory may be used."""
    usable = [node for node in nodes if node["cpus"] and (node["memory_allowed"] and node["total_bytes"])]
    usable = usable or [node for node in nodes if node["cpus"]]
    return spread(
        {node["node"]: node["cores"] for node in usable},
        {node["node"]: node["cpus"] for node in usable},
        num_threads,
    )


def memory_of_nodes(nodes: Sequence[NumaNode], num_threads: int) -> tuple[Node, ...]:
    """What a plan needs of nodes with memory; nothing where there is one."""
    with_workers = workers_of(nodes, num_threads).nodes
    usable = [node for node in nodes if node["memory_allowed"] and node["total_bytes"]]
    if len(usable) < 2:
        return ()
    margin = RAM_MARGIN_BYTES // len(usable)
    return tuple(
        Node(node["node"], max(node["available_bytes"] - margin, 0), node["node"] in with_workers)
        for node in usable
    )


def rates_path(num_threads: int, isa: str) -> Path:
    """The file that holds this processor's rates."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    processor = hashlib.sha256(processor_name().encode()).hexdigest()[:8]
    return Path(base) / "hybrid" / f"rates-{processor}-{num_threads}-{isa}.json"


def read_rates(num_threads: int, isa: str) -> Rates | None:
    """Rates measured before; ``None`` where there are none. A file that holds none is named in the log."""
    path = rates_path(num_threads, isa)
    try:
        text = path.read_text()
    except OSError:
        return None
    try:
        return _parse_rates(text, num_threads)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s holds no rates (%r); `hybrid doctor` measures anew", path, error)
        return None


def _parse_rates(text: str, num_threads: int) -> Rates:
    found = json.loads(text)
    weight_s = {
        str(name): {int(tokens): _positive(seconds) for tokens, seconds in points.items()}
        for name, points in found["weight_s"].items()
    }
    if not all(points and min(points) > 0 for points in weight_s.values()):
        raise ValueError("expected times for numbers of tokens above 0")
    return Rates(
        _positive(found["read_bandwidth"]),
        _positive(found["call_s"]),
        _positive(found["attention_macs"]),
        weight_s,
        num_threads,
    )


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"expected a number above 0, found {value!r}")
    return float(value)


def write_rates(rates: Rates, isa: str) -> None:
    """Keep rates for later plans; a folder that cannot be written is no failure, and is logged."""
    path = rates_path(rates.num_threads, isa)
    content = {
        "processor": processor_name(),
        "read_bandwidth": rates.read_bandwidth,
        "call_s": rates.call_s,
        "attention_macs": rates.attention_macs,
        "weight_s": rates.weight_s,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(path)
    except OSError as error:
        logger.info("%s: the rates cannot be kept: %s", path, error.strerror)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def calibrate(
    num_threads: int,
    read_bandwidth: float,
    formats: Iterable[GGMLType] = COMMON_FORMATS,
    *,
    announce: Callable[[str], None] = lambda _: None,
) -> Rates:
    """Measures these formats with the current ISA, and keeps the result beside what was known of others."""
    physical = cpu.physical_cores()
    pool = cpu.ThreadPool(num_threads, physical[:num_threads] if num_threads <= len(physical) else [])
    isa = cpu.current_isa()
    known = read_rates(num_threads, isa)
    weight_s = {} if known is None else dict(known.weight_s)
    wanted = [format_ for format_ in formats if format_ in CPU_FORMATS]
    rounds: dict[GGMLType, list[dict[int, float]]] = {format_: [] for format_ in wanted}
    for index in range(_ROUNDS):
        for format_ in wanted:
            announce(f"measuring products with {format_.name}, {index + 1} of {_ROUNDS}")
            rounds[format_].append(measure_weights(pool, format_))
    for format_, found in rounds.items():
        weight_s[format_.name] = {n: statistics.median(one[n] for one in found) for n in TOKENS}
    announce("measuring attention")
    rates = Rates(read_bandwidth, measure_call(pool), measure_attention(pool), weight_s, num_threads)
    write_rates(rates, isa)
    return rates


def measure_weights(pool: cpu.ThreadPool, format_: GGMLType) -> dict[int, float]:
    """Tokens -> seconds for one weight, of a product whose weights come from RAM.

    They are random: code-book formats look up all of their table, as with real weights.
    """
    traits = TRAITS[format_]
    row_bytes = _COLS // traits.block_size * traits.block_bytes
    count = max(1, -(-_BATCH_BYTES // (_ROWS * row_bytes)))
    matrices = [cpu.PackedMatrix(int(format_), 1, _ROWS, _COLS) for _ in range(count)]
    rows = random_blocks(format_, _ROWS, _COLS, np.random.default_rng(0))
    for matrix in matrices:
        matrix.pack_rows(pool, 0, 0, _ROWS, _address(rows))
    found = {}
    for tokens in TOKENS:
        x = np.ones((tokens, _COLS), np.float32)
        out = np.empty((tokens, _ROWS), np.float32)

        def step(index: int, tokens: int = tokens, x: _Array = x, out: _Array = out) -> None:
            matrix = matrices[index % count]
            cpu.linear(pool, matrix, _address(x), tokens, _COLS, _address(out), _ROWS)

        found[tokens] = _median_seconds(step, least=count if tokens == 1 else 3) / (_ROWS * _COLS)
    return found


def measure_call(pool: cpu.ThreadPool) -> float:
    """Seconds of an operation with little to do for all threads, in a recorded step as decoding runs them."""
    matrix = cpu.PackedMatrix(int(GGMLType.F32), 1, 256, 64)
    x, out = np.zeros(64, np.float32), np.empty(256, np.float32)
    recording, count = cpu.Recording(), 100
    recording.start()
    for _ in range(count):
        cpu.linear(pool, matrix, _address(x), 1, 64, _address(out), 256)
    recording.stop()
    return _median_seconds(lambda _: recording.run(), least=3) / count


def measure_attention(pool: cpu.ThreadPool) -> float:
    """Multiply-adds per second of one token's latent attention over 2048 others."""
    head_dim, width, num_blocks = 192, _LATENT + _ROPE, _KEYS // BLOCK_SIZE
    q = np.zeros((_HEADS, head_dim), np.float32)
    latent = np.zeros((_HEADS, _LATENT), np.float32)
    cache = np.zeros((_KEYS, width), np.float16)
    out = np.empty_like(latent)
    positions, starts = np.array([_KEYS - 1], np.int32), np.array([0, 1], np.int32)
    lengths, tables = np.array([_KEYS], np.int32), np.arange(num_blocks, dtype=np.int32)

    def step(_: int) -> None:
        cpu.mla_attention(
            pool, _address(q), _address(latent), 1, _HEADS, head_dim, _address(cache), "f16", num_blocks,
            _LATENT, _ROPE, 1, _address(positions), _address(starts), _address(lengths), _address(tables),
            num_blocks, 1.0, _address(out),
        )  # fmt: skip

    return _KEYS * _HEADS * (width + _LATENT) / _median_seconds(step, least=3)


def _address(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> int:
    return int(array.ctypes.data_as(ctypes.c_void_p).value or 0)


def _median_seconds(step: Callable[[int], None], *, least: int) -> float:
    """Median time of a call, of at least ``least`` calls and for some time."""
    step(0)
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < least or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        step(len(samples))
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
