"""A process watched under load: does its memory grow?"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid.errors import ConfigError

SETTLING = 0.1  # of the time: its samples are not fitted, since allocators fill their pools at first
_MIB = 1 << 20


@dataclass(frozen=True)
class ProcessSample:
    """A look at a process: ``seconds`` since the first, resident bytes, descriptors and threads."""

    seconds: float
    resident_bytes: int
    num_descriptors: int
    num_threads: int


@dataclass(frozen=True)
class Slope:
    """A fitted line: bytes per second, its standard error, and the samples fitted."""

    bytes_per_second: float
    standard_error: float
    num_samples: int


def look(pid: int, seconds: float = 0.0) -> ProcessSample:
    """The process ``pid`` now.

    Raises:
        ConfigError: there is none that this user may look at.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        num_descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError as error:
        raise ConfigError(f"--watch: process {pid}: {error.strerror}") from None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    resident = int(fields["VmRSS"].split()[0]) * 1024
    return ProcessSample(seconds, resident, num_descriptors, int(fields["Threads"]))


async def watch(pid: int, interval_s: float, samples: list[ProcessSample]) -> None:
    """Add a look at the process to ``samples`` every ``interval_s`` until cancelled."""
    started = time.perf_counter()
    while True:
        samples.append(look(pid, time.perf_counter() - started))
        await asyncio.sleep(interval_s)


def slope(samples: Sequence[ProcessSample]) -> Slope | None:
    """Least squares through the resident memory after `SETTLING`; ``None`` for fewer than four samples.

    Memory moves in steps, so that residuals are alike from one sample to the next; the standard error counts
    ``n (1 - r) / (1 + r)`` independent ones, r their correlation with their neighbours (if it is positive).
    """
    if not samples:
        return None
    kept = [s for s in samples if s.seconds >= SETTLING * samples[-1].seconds]
    count = len(kept)
    if count < 4:
        return None
    mean_x = sum(s.seconds for s in kept) / count
    mean_y = sum(s.resident_bytes for s in kept) / count
    spread = sum((s.seconds - mean_x) ** 2 for s in kept)
    found = sum((s.seconds - mean_x) * (s.resident_bytes - mean_y) for s in kept) / spread
    residuals = [s.resident_bytes - mean_y - found * (s.seconds - mean_x) for s in kept]
    total = sum(r * r for r in residuals)
    alike = sum(a * b for a, b in itertools.pairwise(residuals)) / total if total else 0.0
    alike = min(max(alike, 0.0), 0.99)
    independent = max(count * (1 - alike) / (1 + alike), 3.0)
    error = math.sqrt(total / count / (independent - 2) / (spread / count))
    return Slope(found, error, count)


def report(samples: Sequence[ProcessSample]) -> dict[str, object]:
    """First and last sample, the largest memory, and the slope in KiB a minute with its standard error."""
    first, last, line = samples[0], samples[-1], slope(samples)
    return {
        "samples": len(samples),
        "seconds": round(last.seconds, 1),
        "resident_mib": [round(s.resident_bytes / _MIB, 2) for s in (first, last)],
        "largest_mib": round(max(s.resident_bytes for s in samples) / _MIB, 2),
        "descriptors": [first.num_descriptors, last.num_descriptors],
        "threads": [first.num_threads, last.num_threads],
        "slope_kib_per_minute": None if line is None else round(line.bytes_per_second * 60 / 1024, 3),
        "slope_error_kib_per_minute": None if line is None else round(line.standard_error * 60 / 1024, 3),
    }
