"""What ran when: spans of the engine, of a device's streams and of the CPU's experts, as a Chrome trace.

Times are nanoseconds of `time.perf_counter_ns`, which is the system's monotonic clock. The file opens in
ui.perfetto.dev and chrome://tracing; its format is the "JSON Object Format" of Chrome's Trace Event
documentation.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

MAX_SPANS = 2_000_000  # about 400 MB of file; what comes later is counted only

Kind = Literal["step", "device", "cpu", "wait"]
Interval = tuple[int, int]


class Span(NamedTuple):
    """Something that took its time. ``kind``: a step of the engine, work of a device, work of the CPU that a
    device waits for, or waiting. ``track``: "engine", or a device and its stream."""

    track: str
    name: str
    kind: Kind
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class StepFigures:
    """Means over decode steps, in seconds.

    Attributes:
        step_s: from the step's tokens to its logits.
        cpu_s: experts are computed in RAM.
        device_s: some stream of a device works.
        overlap_s: both.
        exposed_cpu_s: the CPU works and no device does.
        idle_s: neither does.
    """

    num_steps: int
    step_s: float
    cpu_s: float
    device_s: float
    overlap_s: float
    exposed_cpu_s: float
    idle_s: float

    def __str__(self) -> str:
        def ms(seconds: float) -> str:
            return f"{seconds * 1e3:.3f} ms"

        steps = f"{self.num_steps} decode steps of {ms(self.step_s)}"
        if not self.cpu_s and not self.device_s:
            return steps  # all on the CPU, where nothing runs beside anything
        return (
            f"{steps}: experts on the CPU {ms(self.cpu_s)} "
            f"({ms(self.exposed_cpu_s)} of it exposed), device {ms(self.device_s)}, "
            f"both {ms(self.overlap_s)}, idle {ms(self.idle_s)}"
        )


class Trace:
    """Collects spans for a file; any thread may add some.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.open("w").close()
        self.spans: list[Span] = []
        self.num_dropped = 0
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        with self._lock:
            if len(self.spans) < MAX_SPANS:
                self.spans.append(span)
            else:
                self.num_dropped += 1

    @contextmanager
    def span(self, track: str, name: str, kind: Kind = "wait") -> Iterator[None]:
        """Notes how long the block takes, if it does not fail."""
        start_ns = time.perf_counter_ns()
        yield
        self.add(Span(track, name, kind, start_ns, time.perf_counter_ns()))

    def write(self) -> None:
        """Writes the file, with all spans by now.

        Raises:
            OSError: it cannot be written.
        """
        tracks = {track: number for number, track in enumerate(dict.fromkeys(s.track for s in self.spans), 1)}
        first_ns = min((span.start_ns for span in self.spans), default=0)
        figures = step_figures(self.spans)
        with self.path.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "otherData": ')
            json.dump({"dropped_spans": self.num_dropped, "steps": figures and asdict(figures)}, file)
            file.write(', "traceEvents": [\n')
            events = (*_names(tracks), *_events(self.spans, tracks, first_ns))
            file.write(",\n".join(map(json.dumps, events)))
            file.write("\n]}\n")


def _names(tracks: dict[str, int]) -> Iterator[dict[str, object]]:
    for track, number in tracks.items():
        yield {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}}


def _events(spans: Iterable[Span], tracks: dict[str, int], first_ns: int) -> Iterator[dict[str, object]]:
    for span in spans:
        yield {
            "ph": "X",
            "pid": 1,
            "tid": tracks[span.track],
            "name": span.name,
            "cat": span.kind,
            "ts": (span.start_ns - first_ns) / 1e3,
            "dur": (span.end_ns - span.start_ns) / 1e3,
        }


def step_figures(spans: Sequence[Span]) -> StepFigures | None:
    """Figures of the decode steps among ``spans``; ``None`` without one."""
    steps = sorted((s.start_ns, s.end_ns) for s in spans if s.kind == "step")
    if not steps:
        return None
    cpu = _within(_merged((s.start_ns, s.end_ns) for s in spans if s.kind == "cpu"), steps)
    device = _within(_merged((s.start_ns, s.end_ns) for s in spans if s.kind == "device"), steps)
    overlap = _length(_within(cpu, device))
    step_ns, cpu_ns, device_ns = _length(steps), _length(cpu), _length(device)

    def mean(ns: int) -> float:
        return ns * 1e-9 / len(steps)

    return StepFigures(
        num_steps=len(steps),
        step_s=mean(step_ns),
        cpu_s=mean(cpu_ns),
        device_s=mean(device_ns),
        overlap_s=mean(overlap),
        exposed_cpu_s=mean(cpu_ns - overlap),
        idle_s=mean(step_ns - cpu_ns - device_ns + overlap),
    )


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union, in order, without overlaps."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _within(intervals: Sequence[Interval], windows: Sequence[Interval]) -> list[Interval]:
    """What two ordered unions have in common."""
    found: list[Interval] = []
    i = j = 0
    while i < len(intervals) and j < len(windows):
        start, end = max(intervals[i][0], windows[j][0]), min(intervals[i][1], windows[j][1])
        if start < end:
            found.append((start, end))
        if intervals[i][1] < windows[j][1]:
            i += 1
        else:
            j += 1
    return found


def _length(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals)
