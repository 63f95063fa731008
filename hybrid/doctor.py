"""What this machine offers the runtime: cores, instruction sets, memory, its measured speed, GPUs.

Everything is read from /proc and /sys below ``root``, so that tests can show it other machines.
Nothing here needs a GPU driver, and nothing fails without one.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.backends.isa import select_isa
from hybrid.calibration import calibrate, rates_path, read_rates
from hybrid.free_memory import cgroup_memory_limit
from hybrid.gguf import GGMLType
from hybrid.kernels import cpu
from hybrid.placement.machine import Rates
from hybrid.placement.rules.ranges import ranges_of
from hybrid.system_files import processor_name, read_system_file

_VERSIONED = ("hybrid-moe", "numpy", "torch", "triton", "gguf", "tokenizers")
_NVIDIA_FIELDS = (
    "name",
    "memory.total",
    "driver_version",
    "compute_cap",
    "pcie.link.gen.max",
    "pcie.link.width.max",
)
_MIN_BANDWIDTH_BYTES = 256 << 20
_MEASURE_SECONDS = 0.5
_OVERCOMMIT = {"0": "heuristic", "1": "always", "2": "strict"}  # vm.overcommit_memory


@dataclass(frozen=True)
class Cores:
    """CPU numbers are counts; ``allowed`` is what this process may use (taskset, cpuset)."""

    model: str
    logical: int
    allowed: int
    physical_allowed: int
    allowed_list: str


@dataclass(frozen=True)
class IsaChoice:
    """``missing`` maps each instruction set this host lacks to the CPU features it would need."""

    chosen: str
    reason: str
    supported: list[str]
    missing: dict[str, list[str]]
    features: list[str]


@dataclass(frozen=True)
class NumaNode:
    """``cpus`` as the kernel lists them, ``0-3,8``."""

    node: int
    cpus: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class NumaBinding:
    """Whether memory can be bound to a node here: some was, and its pages were looked for.

    ``method`` says how they were found, empty where the system does not tell; ``problem`` why not.
    """

    local_share: float | None
    method: str
    problem: str


@dataclass(frozen=True)
class HugePages:
    """``transparent`` is the kernel's mode; ``reserved`` maps a page size to (pages, free pages)."""

    transparent: str
    reserved: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Memory:
    """Bytes. Limits are None where there is none."""

    total_bytes: int
    available_bytes: int
    swap_bytes: int
    overcommit: str
    cgroup_limit_bytes: int | None
    locked_limit_bytes: int | None


@dataclass(frozen=True)
class Bandwidth:
    """Measured reads of RAM, bytes per second; the buffer is several times the last-level cache."""

    threads: int
    buffer_bytes: int
    one_thread: float
    all_threads: float


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi states it; ``memory_bytes`` is None where it does not, ``pcie`` is ``4.0 x16``."""

    name: str
    memory_bytes: int | None
    driver: str
    compute_capability: str
    pcie: str


def cores(root: Path = Path("/")) -> Cores:
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(
        model=processor_name(root),
        logical=os.cpu_count() or len(allowed),
        allowed=len(allowed),
        physical_allowed=len(cpu.physical_cores()),
        allowed_list=str(ranges_of(allowed)),
    )


def isa_choice(wanted: str | None = None) -> IsaChoice:
    """The instruction set kernels would use, and what keeps the host from a better one.

    Raises:
        ConfigError: ``wanted`` is unknown or unsupported.
    """
    chosen = select_isa(wanted)
    supported = cpu.supported_isas()
    missing = {isa: cpu.isa_missing(isa) for isa in cpu.isas() if isa not in supported}
    reason = "the best this host supports" if wanted is None else "asked for"
    present = [name for name, there in cpu.cpu_features().items() if there]
    return IsaChoice(chosen, reason, supported, missing, present)


def numa_nodes(root: Path = Path("/")) -> list[NumaNode]:
    nodes = []
    for folder in sorted(
        (root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda p: int(p.name[4:])
    ):
        sizes = dict(re.findall(r"(MemTotal|MemFree):\s*(\d+) kB", read_system_file(folder / "meminfo")))
        nodes.append(
            NumaNode(
                node=int(folder.name[4:]),
                cpus=read_system_file(folder / "cpulist").strip(),
                total_bytes=int(sizes.get("MemTotal", 0)) * 1024,
                free_bytes=int(sizes.get("MemFree", 0)) * 1024,
            )
        )
    return nodes


def numa_binding() -> NumaBinding:
    """Binds a matrix to the last node of this machine and looks where its pages are."""
    nodes = [node["node"] for node in cpu.numa_nodes() if node["memory_allowed"]]
    matrix = cpu.PackedMatrix(int(GGMLType.F32), 1, 1024, 1024, "none", nodes[-1:])
    rows = np.zeros((1024, 1024), np.float32)
    matrix.pack_rows(cpu.ThreadPool(1), 0, 0, 1024, rows.ctypes.data)
    (part,) = matrix.parts
    count = cpu.count_pages(part["address"], part["nbytes"])
    total = sum(count["pages"].values())
    share = count["pages"].get(part["node"], 0) / total if count["method"] and total else None
    return NumaBinding(share, count["method"], "; ".join(filter(None, (part["problem"], count["problem"]))))


def huge_pages(root: Path = Path("/")) -> HugePages:
    mode = re.search(r"\[(\w+)\]", read_system_file(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    reserved = {}
    for folder in sorted((root / "sys/kernel/mm/hugepages").glob("hugepages-*")):
        counts = [int(read_system_file(folder / name) or 0) for name in ("nr_hugepages", "free_hugepages")]
        reserved[folder.name.removeprefix("hugepages-")] = (counts[0], counts[1])
    return HugePages(mode.group(1) if mode else "unavailable", reserved)


def memory(root: Path = Path("/")) -> Memory:
    sizes = dict(re.findall(r"^(\w+):\s*(\d+) kB", read_system_file(root / "proc/meminfo"), re.MULTILINE))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Memory(
        total_bytes=int(sizes.get("MemTotal", 0)) * 1024,
        available_bytes=int(sizes.get("MemAvailable", 0)) * 1024,
        swap_bytes=int(sizes.get("SwapTotal", 0)) * 1024,
        overcommit=_OVERCOMMIT.get(
            read_system_file(root / "proc/sys/vm/overcommit_memory").strip(), "unknown"
        ),
        cgroup_limit_bytes=cgroup_memory_limit(root),
        locked_limit_bytes=None if locked == resource.RLIM_INFINITY else locked,
    )


def bandwidth(
    num_threads: int | None = None,
    *,
    root: Path = Path("/"),
    seconds: float | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Bandwidth:
    """Measures how fast RAM is read by one thread and by all (default: one for each physical core)."""
    physical = cpu.physical_cores()
    threads = num_threads or len(physical)
    # More threads than cores cannot each have one.
    pool = cpu.ThreadPool(threads, physical[:threads] if threads <= len(physical) else [])
    # Virtual machines are shown a part of the caches they use.
    buffer_bytes = max(_MIN_BANDWIDTH_BYTES, 32 * last_level_cache_bytes(root))
    buffer_bytes = min(buffer_bytes, max(_MIN_BANDWIDTH_BYTES, memory(root).available_bytes // 4))
    announce(f"measuring memory bandwidth, {pool.num_threads} threads")
    seconds = _MEASURE_SECONDS if seconds is None else seconds
    all_threads = cpu.measure_read_bandwidth(pool, buffer_bytes, seconds)
    announce("measuring memory bandwidth, 1 thread")
    one_thread = cpu.measure_read_bandwidth(pool, buffer_bytes, seconds, 1)
    return Bandwidth(pool.num_threads, buffer_bytes, one_thread, max(one_thread, all_threads))


def last_level_cache_bytes(root: Path = Path("/")) -> int:
    """Bytes of all last-level caches together; 0 if unknown."""
    caches = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        size = read_system_file(folder / "size").strip()
        if size.endswith("K") and size[:-1].isdigit():
            caches[read_system_file(folder / "shared_cpu_list").strip()] = int(size[:-1]) * 1024
    return sum(caches.values())


def gpus(root: Path = Path("/")) -> tuple[list[Gpu], str]:
    """The NVIDIA GPUs, and a line about the driver."""
    version = re.search(
        r"Kernel Module\S*\s+(?:for \S+\s+)?([\d.]+)", read_system_file(root / "proc/driver/nvidia/version")
    )
    if version is None and shutil.which("nvidia-smi") is None:
        return [], "no NVIDIA driver: models run on the CPU"
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(_NVIDIA_FIELDS)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        loaded = version.group(1) if version else "unknown"
        return [], f"driver {loaded} is loaded, but nvidia-smi does not answer ({type(error).__name__})"
    found = [parse_gpu(line) for line in done.stdout.splitlines() if line.strip()]
    driver = found[0].driver if found else "unknown"
    return found, f"driver {driver}"


def parse_gpu(line: str) -> Gpu:
    """One line of nvidia-smi's CSV, fields in the order asked for."""
    name, mib, driver, capability, generation, width = (part.strip() for part in line.split(","))
    size = int(mib) * 1024 * 1024 if mib.isdigit() else None
    return Gpu(name, size, driver, capability, f"{generation}.0 x{width}")


def versions() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
    }
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def torch_cuda() -> dict[str, Any] | None:
    """What torch sees of CUDA, None where torch is missing. Importing torch takes seconds: ask only
    where there is a driver."""
    try:
        import torch
    except ImportError:
        return None
    return {
        "built_for": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "devices": torch.cuda.device_count(),
    }


def _kept_in(rates: Rates, isa: str) -> str | None:
    """The file that holds rates for later plans; ``None`` where it could not be written."""
    kept = read_rates(rates.num_threads, isa) == rates
    return str(rates_path(rates.num_threads, isa)) if kept else None


def examine(
    *,
    isa: str | None = None,
    num_threads: int | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Everything, as plain JSON values; the keys are part of the command line's interface.

    Raises:
        ConfigError: ``isa`` names an instruction set this host cannot run.
    """
    choice = isa_choice(isa)
    devices, driver = gpus()
    load = os.getloadavg()[0]  # of others: what is measured below comes after
    speed = bandwidth(num_threads, announce=announce)
    rates = calibrate(speed.threads, speed.all_threads, announce=announce)
    return {
        "cores": asdict(cores()),
        "isa": asdict(choice),
        "numa_nodes": [asdict(node) for node in numa_nodes()],
        "numa_binding": asdict(numa_binding()),
        "huge_pages": asdict(huge_pages()),
        "memory": asdict(memory()),
        "bandwidth": asdict(speed),
        "load_average": load,
        "rates": asdict(rates),
        "rates_kept_in": _kept_in(rates, choice.chosen),
        "gpus": [asdict(gpu) for gpu in devices],
        "gpu_driver": driver,
        "torch_cuda": torch_cuda() if devices else None,
        "versions": versions(),
        "platform": sys.platform,
    }
