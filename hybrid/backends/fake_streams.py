"""Streams of a test device: threads that take their time, work on memory full of nonsense, and keep CUDA's
rules.

Graphs are lists of work that is queued again. A wait can be dropped by its site, to see that it is missed.
"""

from __future__ import annotations

import ctypes
import itertools
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hybrid.backends.fake_tensor import DeviceTensor, Memory, fill_with_nonsense, plain
from hybrid.backends.streams import Event, Graph, Runtime, Stream
from hybrid.errors import DeviceError

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_FREE = "free"  # nobody has to wait for it
_GIVE_UP_S = 120.0  # a thread that waits longer has been forgotten


class _ThreadState(threading.local):
    """What a thread captures, of any device."""

    capture: FakeCapture | None = None


_thread = _ThreadState()
_pinned: dict[int, torch.Tensor] = {}  # by address; memory is pinned for all devices


@dataclass
class FakeOptions:
    """How test devices behave; shared by the devices of a model.

    Attributes:
        seed: of the delays.
        max_delay_s: before a piece of work, at random up to this; most are not delayed.
        serial_calls: host callbacks of all streams take turns.
        drop: waits and calls of these sites are left out; the number says which occurrence, ``None``: all.
        sites: how often each site was met.
    """

    seed: int = 0
    max_delay_s: float = 0.0
    serial_calls: bool = False
    drop: tuple[str, int | None] | None = None
    sites: Counter[str] = field(default_factory=Counter)
    calls: threading.Lock = field(default_factory=threading.Lock)

    def dropped(self, site: str) -> bool:
        """Notes that a site was met."""
        self.sites[site] += 1
        return self.drop is not None and self.drop in ((site, None), (site, self.sites[site] - 1))


class _Signal:
    """One thread tells others that it has come so far."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def wait(self) -> None:
        if not self.event.wait(_GIVE_UP_S):
            raise DeviceError(f"an event did not come within {_GIVE_UP_S:.0f} s")


@dataclass(frozen=True)
class _Work:
    """What a stream does next: compute, set a signal, or wait for one (by its number within a graph)."""

    name: str
    run: Callable[[], None] | None = None
    sets: _Signal | None = None
    waits: _Signal | None = None


class FakeEvent(Event):
    def __init__(self, stream: FakeStream, signal: _Signal, capture: FakeCapture | None) -> None:
        self.stream, self.signal, self.capture = stream, signal, capture
        self.clock = dict(capture.clocks[stream]) if capture else {}

    def synchronize(self, site: str) -> None:
        runtime = self.stream.runtime
        if self.capture is not None:
            raise DeviceError(f"{site}: an event of a capture cannot be waited for by the host")
        if not runtime.options.dropped(site):
            self.signal.wait()
        runtime.check()

    def is_done(self) -> bool:
        return self.signal.event.is_set()


class FakeStream(Stream):
    """A thread with a queue."""

    def __init__(self, runtime: FakeRuntime, name: str) -> None:
        self.runtime, self.name = runtime, name
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._random = random.Random(f"{runtime.options.seed} {runtime.name} {name}")
        self._thread = threading.Thread(target=self._serve, name=f"{runtime.name} {name}", daemon=True)
        self._thread.start()

    @property
    def _capture(self) -> FakeCapture | None:
        """The capture this stream takes part in."""
        capture = _thread.capture
        return capture if capture is not None and self in capture.clocks else None

    def record(self) -> FakeEvent:
        capture = self._capture
        signal = _Signal()
        self.push(_Work("record", sets=signal))
        return FakeEvent(self, signal, capture)

    def wait(self, event: Event, site: str) -> None:
        assert isinstance(event, FakeEvent)
        if self.runtime.options.dropped(site):
            return
        if event.capture is not None:
            event.capture.join(self, event)
        elif self._capture is not None:
            raise DeviceError(f"{site}: a captured stream cannot wait for an event from before the capture")
        self.push(_Work("wait", waits=event.signal))

    def call(self, function: int, argument: int, site: str) -> None:
        if self.runtime.options.dropped(site):
            return
        callback, options = _CALLBACK(function), self.runtime.options

        def run() -> None:
            if options.serial_calls:
                with options.calls:
                    callback(argument)
            else:
                callback(argument)

        self.push(_Work(site, run=run))

    def push(self, work: _Work) -> None:
        capture = self._capture
        if capture is None:
            self._queue.put(work)
        else:
            capture.add(self, work)

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join(_GIVE_UP_S)

    def _serve(self) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while (work := self._queue.get()) is not None:
                self._do(work)

    def _do(self, work: _Work) -> None:
        max_delay_s = self.runtime.options.max_delay_s
        if max_delay_s and self._random.random() < 0.25:
            time.sleep(self._random.uniform(0, max_delay_s))
        try:
            if work.waits is not None:
                work.waits.wait()
            elif work.run is not None and self.runtime.failure is None:
                work.run()
        except BaseException as error:
            self.runtime.fail(self, work.name, error)
        if work.sets is not None:
            work.sets.event.set()


class FakeCapture(Graph):
    """Work that was queued in a capture, in order, with clocks that tell which streams have been waited
    for."""

    def __init__(self, origin: FakeStream) -> None:
        self.origin = origin
        self.clocks: dict[FakeStream, dict[FakeStream, int]] = {origin: {}}
        self.work: list[tuple[FakeStream, _Work]] = []
        self.memory: list[torch.Tensor] = []

    def add(self, stream: FakeStream, work: _Work) -> None:
        clock = self.clocks[stream]
        if work.run is not None and work.name != _FREE:
            clock[stream] = clock.get(stream, 0) + 1
        self.work.append((stream, work))

    def join(self, stream: FakeStream, event: FakeEvent) -> None:
        clock = self.clocks.setdefault(stream, {})
        for other, count in event.clock.items():
            clock[other] = max(clock.get(other, 0), count)

    def finish(self) -> None:
        end = self.clocks[self.origin]
        for stream, clock in self.clocks.items():
            if end.get(stream, 0) < clock.get(stream, 0):
                raise DeviceError(
                    f"capture: work of stream {stream.name!r} was not waited for before the end"
                )

    def replay(self) -> None:
        signals: dict[_Signal, _Signal] = {}
        self.origin.push(_Work("replay", run=self._forget))
        start = _Signal()
        self.origin.push(_Work("record", sets=start))
        for stream in self.clocks:
            if stream is not self.origin:
                stream.push(_Work("wait", waits=start))
        for stream, work in self.work:
            sets = signals.setdefault(work.sets, _Signal()) if work.sets else None
            waits = signals.setdefault(work.waits, _Signal()) if work.waits else None
            stream.push(_Work(work.name, work.run, sets, waits))

    def _forget(self) -> None:
        for values in self.memory:
            fill_with_nonsense(values)


class FakeRuntime(Runtime):
    """The asynchronous side of a test device.

    Attributes:
        failure: what ended the device's work: its stream and operation, and the error.
        num_tensors: tensors whose memory is in use.
    """

    captures_other_devices = True

    def __init__(self, name: str, options: FakeOptions | None = None) -> None:
        self.name, self.options = name, options or FakeOptions()
        self.failure: tuple[str, BaseException] | None = None
        self.num_tensors = 0
        self._pinned: list[int] = []  # addresses
        self._streams: list[FakeStream] = []
        self._current = threading.local()
        self._names = itertools.count()
        self._lock = threading.Lock()
        self.main: FakeStream = self.stream("main")

    @property
    def current(self) -> FakeStream:
        stack: list[FakeStream] = getattr(self._current, "stack", [])
        return stack[-1] if stack else self.main

    def stream(self, name: str) -> FakeStream:
        self._streams.append(FakeStream(self, name))
        return self._streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        assert isinstance(stream, FakeStream) and stream.runtime is self
        if not hasattr(self._current, "stack"):
            self._current.stack = []
        self._current.stack.append(stream)
        try:
            yield
        finally:
            self._current.stack.pop()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(tuple(shape), dtype=dtype)
        fill_with_nonsense(out)
        _pinned[out.data_ptr()] = out
        self._pinned.append(out.data_ptr())
        return out

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether it lies within memory of `pinned`, of any device."""
        first = tensor.data_ptr()
        return any(start <= first < start + memory.nbytes for start, memory in list(_pinned.items()))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> DeviceTensor:
        return self.allocate(torch.empty(tuple(shape), dtype=dtype))

    def allocate(self, values: torch.Tensor) -> DeviceTensor:
        fill_with_nonsense(values)
        stream, capture = self.current, self.current._capture
        if capture is not None:
            capture.memory.append(values)
        with self._lock:
            self.num_tensors += 1

        def freed() -> None:
            with self._lock:
                self.num_tensors -= 1
            if capture is None or capture is _thread.capture:
                stream.push(_Work(_FREE, run=lambda: fill_with_nonsense(values)))

        return DeviceTensor(values, self, Memory(freed))

    def launch(self, name: str, work: Callable[[], None]) -> None:
        self.current.push(_Work(name, run=work))

    def check_may_wait(self, what: str) -> None:
        if self.current._capture is not None:
            raise DeviceError(f"{what}: the host cannot wait for {self.name} within a capture")

    def wait_to_read(self, what: str) -> None:
        self.check_may_wait(what)
        self.current.record().signal.wait()
        self.check()

    def discard(self, tensor: torch.Tensor) -> None:
        values = plain(tensor)
        self.launch("discard", lambda: fill_with_nonsense(values))

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[FakeCapture]:
        assert isinstance(stream, FakeStream)
        if _thread.capture is not None:
            raise DeviceError("capture: another one is under way")
        capture = _thread.capture = FakeCapture(stream)
        try:
            with self.on(stream):
                yield capture
        finally:
            _thread.capture = None
        capture.finish()

    def fail(self, stream: FakeStream, name: str, error: BaseException) -> None:
        """Keeps the first failure; nothing is computed any more."""
        if self.failure is None:
            self.failure = f"{name} on stream {stream.name!r}", error

    def check(self) -> None:
        """Raises `DeviceError` if work has failed."""
        if self.failure is not None:
            what, error = self.failure
            raise DeviceError(f"{self.name}: {what} failed: {error!r}; load the model again") from error

    def synchronize(self) -> None:
        for event in [stream.record() for stream in self._streams]:
            event.signal.wait()
        self.check()

    def close(self) -> None:
        while self._streams:
            self._streams.pop().stop()
        while self._pinned:
            _pinned.pop(self._pinned.pop(), None)
