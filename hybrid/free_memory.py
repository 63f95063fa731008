"""How much RAM this process may still take: what the system has free, and what its control groups allow.

Everything is read below ``root``, so that tests can show other machines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hybrid.system_files import read_system_file

# Files of a control group: its limit, what it uses, and the key of its file cache that can be dropped.
_VERSION_2 = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
_VERSION_1 = (
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
)  # fmt: skip
_NO_LIMIT = 1 << 60  # version 1 writes a huge number for "none"


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process could take without swapping and within its control groups; ``None``: not known."""
    stated = re.search(r"^MemAvailable:\s*(\d+) kB", read_system_file(root / "proc/meminfo"), re.MULTILINE)
    system = [] if stated is None else [int(stated[1]) * 1024]
    groups = [max(0, limit - used) for limit, used in _cgroups(root)]
    return min(system + groups, default=None)


def cgroup_memory_limit(root: Path = Path("/")) -> int | None:
    """The smallest memory limit of this process's control group and its ancestors, version 2 or 1."""
    return min((limit for limit, _ in _cgroups(root)), default=None)


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group that has a limit."""
    for line in read_system_file(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            base, limit_file, usage_file, droppable = _VERSION_2
        elif "memory" in controllers.split(","):
            base, limit_file, usage_file, droppable = _VERSION_1
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            folder = (root / base).joinpath(*parts[:depth])
            text = read_system_file(folder / limit_file).strip()
            if text.isdigit() and int(text) < _NO_LIMIT:
                stat = read_system_file(folder / "memory.stat")
                cached = re.search(rf"^{droppable} (\d+)$", stat, re.MULTILINE)
                used = int(read_system_file(folder / usage_file).strip() or 0)
                yield int(text), max(0, used - (int(cached[1]) if cached else 0))
