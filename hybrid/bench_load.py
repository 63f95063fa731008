"""How long loading takes, beside what it cannot do without: reading the file, and getting the memory.

Each round times, one after another, a plain read of the file past the page cache into a buffer that is used
again, the same read into as much new memory as the model takes, and loading with packing. With a folder for
packed weights it also reads the cache file plainly, and starts from it: first with nothing of it in the page
cache, then with all of it there. Rates are bytes of the file that is read, by seconds.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hybrid.backends.isa import select_isa
from hybrid.backends.packed_cache import cache_path
from hybrid.calibration import this_machine
from hybrid.config import model_path
from hybrid.gguf import GGUFFile
from hybrid.gguf.read_ahead import NUM_THREADS, PIECE_BYTES, open_direct
from hybrid.models.loader import Model, load_model, pack_model
from hybrid.placement.memory import RunSize
from hybrid.placement.planner import plan
from hybrid.placement.rules import Rules

_CONTEXT = 64  # the cache and the working memory are not what is measured


@dataclass
class LoadRow:
    """What was timed, with a figure of each round.

    Attributes:
        what: as printed.
        n_bytes: bytes read from the disk, or from the page cache.
        of: what the ratio is to, by its ``what``; empty where it is a base itself.
        system_s, user_s: processor seconds of this process, in the system and in the program.
        stolen_s: those of all processors that a virtual machine's host gave to others.
        peak_bytes: the most memory held, beyond what was held before; of a load, beyond what it holds.
        notes: the pages a load ended with.
    """

    what: str
    n_bytes: int
    of: str = ""
    seconds: list[float] = field(default_factory=list)
    system_s: list[float] = field(default_factory=list)
    user_s: list[float] = field(default_factory=list)
    stolen_s: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Bytes per second, by the median."""
        return self.n_bytes / self.median_s


def bench_load(
    model: str | None,
    rules: Rules,
    *,
    num_threads: int | None = None,
    isa: str | None = None,
    numa: str = "auto",
    packed_cache: Path | None = None,
    repetitions: int = 3,
    backed: bool = False,
    announce: Callable[[str], None] = lambda _: None,
) -> list[LoadRow]:
    """Times loads of a model; ``repetitions`` rounds. The packed cache is written first where there is none.

    Raises:
        HybridError: whatever loading raises.
        OSError: the file cannot be read.
    """
    path, threads = model_path(model), num_threads
    size = RunSize(_CONTEXT)
    select_isa(isa)

    def load(cache: Path | None) -> Model:
        with GGUFFile.open(path) as file:
            return load_model(
                file,
                plan=plan(file, rules, machine=this_machine(threads, isa), size=size, numa=numa),
                max_model_len=size.max_model_len,
                num_threads=threads,
                packed_cache=cache,
            )

    with GGUFFile.open(path) as file:
        files = [shard.path for shard in file.shards]
        packed = None
        if packed_cache is not None:
            announce("writing the cache of packed weights, where there is none")
            found = plan(file, rules, machine=this_machine(threads, isa), size=size)
            pack_model(file, plan=found, folder=packed_cache, num_threads=threads)
            packed = cache_path(file, packed_cache)
    rounds = _Rounds(announce, backed)
    for number in range(repetitions):
        rounds.title = f"round {number + 1} of {repetitions}"
        rounds.read("read", files)
        rounds.read("read to new memory", files, new=True)
        _forget(files)
        rounds.load("load", files, "read", lambda: load(None))
        if packed is not None:
            rounds.read("read packed cache", [packed])
            _forget([packed])
            rounds.load("start from packed cache", [packed], "read packed cache", lambda: load(packed_cache))
            _remember(packed)
            rounds.load("again, in page cache", [packed], "read packed cache", lambda: load(packed_cache))
    return list(rounds.rows.values())


class _Rounds:
    """Rows as they grow."""

    def __init__(self, announce: Callable[[str], None], backed: bool) -> None:
        self._backed = backed
        self.rows: dict[str, LoadRow] = {}
        self.title = ""
        self._announce = announce

    def read(self, what: str, files: Sequence[Path], *, new: bool = False) -> None:
        with self._timed(what, files, "read" if new else ""):
            memory = _new_memory(sum(path.stat().st_size + PIECE_BYTES for path in files)) if new else None
            read_plainly(files, memory)
        if memory is not None:
            memory.close()

    def load(self, what: str, files: Sequence[Path], of: str, load: Callable[[], Model]) -> None:
        with self._timed(what, files, of) as row:
            model = load()
        row.peak_bytes[-1] -= _status_bytes("VmRSS") - self._before
        row.notes.append(_huge_share())
        model.close()

    @contextlib.contextmanager
    def _timed(self, what: str, files: Sequence[Path], of: str) -> Iterator[LoadRow]:
        if self._backed and of == "read":  # what is mapped needs no such memory
            self._announce(f"{self.title}: taking memory and giving it back")
            _touch(sum(path.stat().st_size for path in files))
        self._announce(f"{self.title}: {what}")
        row = self.rows.setdefault(what, LoadRow(what, sum(path.stat().st_size for path in files), of))
        _reset_peak()
        self._before = _status_bytes("VmRSS")
        usage, stolen = resource.getrusage(resource.RUSAGE_SELF), _stolen_s()
        start = time.perf_counter()
        yield row
        row.seconds.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_SELF)
        row.system_s.append(after.ru_stime - usage.ru_stime)
        row.user_s.append(after.ru_utime - usage.ru_utime)
        row.stolen_s.append(_stolen_s() - stolen)
        row.peak_bytes.append(_status_bytes("VmHWM") - self._before)


def read_plainly(files: Sequence[Path], memory: mmap.mmap | None = None) -> None:
    """Reads files past the page cache where that can be, by as many threads as loading uses.

    Args:
        memory: where to; ``None``: to a buffer for each thread, again and again.
    """
    pieces = _pieces(files)
    lock, failed = threading.Lock(), list[BaseException]()
    opened = {path: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in files}
    direct = {path: open_direct(fd) for path, fd in opened.items()}

    def work() -> None:
        own = mmap.mmap(-1, PIECE_BYTES) if memory is None else memory
        while True:
            with lock:
                found = next(pieces, None)
            if found is None:
                return
            path, offset, place = found
            view = memoryview(own)[place if memory is not None else 0 :][:PIECE_BYTES]
            fd = direct[path]
            try:
                os.preadv(opened[path] if fd is None else fd, [view], offset)
            except OSError as error:
                failed.append(error)
            finally:
                view.release()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fd in (*opened.values(), *(fd for fd in direct.values() if fd is not None)):
        os.close(fd)
    if failed:
        raise failed[0]


def _pieces(files: Sequence[Path]) -> Iterator[tuple[Path, int, int]]:
    """(file, offset in it, place in memory)."""
    place = 0
    for path in files:
        for offset in range(0, path.stat().st_size, PIECE_BYTES):
            yield path, offset, place
            place += PIECE_BYTES


def _new_memory(n_bytes: int) -> mmap.mmap:
    """As weights get it: in huge pages if the system gives them."""
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _touch(n_bytes: int) -> None:
    memory = np.frombuffer(_new_memory(n_bytes), np.uint8)
    count = len(os.sched_getaffinity(0))
    step = -(-n_bytes // count)
    threads = [
        threading.Thread(target=memory[start : start + step : mmap.PAGESIZE].fill, args=(1,))
        for start in range(0, n_bytes, step)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _forget(files: Sequence[Path]) -> None:
    """Takes files out of the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _remember(path: Path) -> None:
    """Reads a file into the page cache."""
    buffer = bytearray(PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _reset_peak() -> None:
    """Lets `VmHWM` begin anew, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _stolen_s() -> float:
    """Seconds of all processors that a virtual machine's host gave to others, since the start."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


def _huge_share() -> str:
    """How much of this process's memory is in huge pages."""
    text = Path("/proc/self/smaps_rollup").read_text()
    sizes = {name: int(kib) for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    huge = sum(sizes.get(name, 0) for name in ("AnonHugePages", "FilePmdMapped", "Private_Hugetlb"))
    return f"{huge / max(sizes.get('Rss', 0) + sizes.get('Private_Hugetlb', 0), 1):.0%} in huge pages"
