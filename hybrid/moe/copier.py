"""Bringing experts from RAM to slots of a device, on a thread and a stream of their own.

Order, by the sites of `hybrid.backends.streams`: a slot's old copy is no longer used (`SLOT_IS_FREE`) before
the new one is unpacked into it; a pinned buffer has been read (`BUFFER_READ`) before the thread fills it
anew. That a copy is there is asked (`Event.is_done`), not waited for: steps never wait for one.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybrid.backends.base import Backend, PackedShape
from hybrid.backends.streams import Event, Runtime
from hybrid.errors import DeviceError

SLOT_IS_FREE = "no step uses the copy that is replaced"
BUFFER_READ = "a buffer for copies has been read"
_NUM_BUFFERS = 2


@dataclass(frozen=True)
class CopySource:
    """Experts of a layer in RAM. ``experts``: ids in the order of the stacks; ``None``: all."""

    backend: Backend
    weights: tuple[Any, Any, Any]  # gate, up, down
    experts: Sequence[int] | None

    @property
    def shapes(self) -> tuple[PackedShape, ...]:
        return tuple(map(self.backend.packed_shape, self.weights))

    def read(
        self, expert: int, out: Sequence[torch.Tensor], map_: Callable[..., Iterable[object]] = map
    ) -> None:
        """Packed bytes of an expert's matrices; ``map_`` may work on several at once."""
        index = expert if self.experts is None else self.experts.index(expert)
        for _ in map_(self.backend.read_packed, self.weights, [index] * len(out), out):
            pass


@dataclass
class CopyJob:
    """An expert on its way to a slot of ``stacks``. ``done`` is set when all of it is queued."""

    source: CopySource
    expert: int
    stacks: tuple[Any, Any, Any]
    slot: int
    after: Event | None
    done: Event | None = None
    error: BaseException | None = None


class _Buffer:
    """Pinned memory for one expert, and when the device has read it."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.read: Event | None = None


class Copier:
    """Does jobs in order. Without streams they are done when `begin` returns."""

    def __init__(self, backend: Backend, max_bytes: int) -> None:
        self._backend, self._runtime = backend, backend.runtime
        self._jobs: queue.SimpleQueue[CopyJob | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if self._runtime is None:
            self._host = torch.empty(max_bytes, dtype=torch.uint8)
            return
        runtime = self._runtime
        self._stream = runtime.stream("expert copies")
        self._buffers = [_Buffer(runtime.pinned((max_bytes,), torch.uint8)) for _ in range(_NUM_BUFFERS)]
        self._staging = runtime.empty((max_bytes,), torch.uint8)
        self._stream.wait(runtime.main.record(), SLOT_IS_FREE)  # the memory of `_staging` is new by then
        self._thread = threading.Thread(target=self._serve, name="expert copies", daemon=True)
        self._thread.start()

    def begin(self, job: CopyJob) -> None:
        """Takes a job; never waits where there are streams."""
        if self._runtime is None:
            pieces = _cut(self._host, job.source.shapes)
            job.source.read(job.expert, pieces)
            for stack, piece in zip(job.stacks, pieces, strict=True):
                self._backend.unpack(stack, job.slot, piece)
        else:
            self._jobs.put(job)

    def is_done(self, job: CopyJob) -> bool:
        """Whether the copy can be used by work that is queued from now on.

        Raises:
            DeviceError: the copy has failed.
        """
        if job.error is not None:
            raise DeviceError(
                f"copying an expert to {self._backend.name} failed: {job.error!r}"
            ) from job.error
        return self._runtime is None or (job.done is not None and job.done.is_done())

    def close(self) -> None:
        """Ends the thread; jobs it has not begun are left out."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        number = 0
        while (job := self._jobs.get()) is not None:
            try:
                assert self._runtime is not None
                self._do(job, self._runtime, self._buffers[number % _NUM_BUFFERS])
            except BaseException as error:
                job.error = error
            number += 1

    def _do(self, job: CopyJob, runtime: Runtime, buffer: _Buffer) -> None:
        if buffer.read is not None:
            buffer.read.synchronize(BUFFER_READ)
        shapes = job.source.shapes
        pieces = _cut(buffer.memory, shapes)
        job.source.read(job.expert, pieces)
        with runtime.on(self._stream), torch.inference_mode():
            if job.after is not None:
                self._stream.wait(job.after, SLOT_IS_FREE)
            staged = _cut(self._staging, shapes)
            for target, piece in zip(staged, pieces, strict=True):
                runtime.copy(target, piece)
            runtime.discard(buffer.memory)
            buffer.read = self._stream.record()
            for stack, piece in zip(job.stacks, staged, strict=True):
                self._backend.unpack(stack, job.slot, piece)
            runtime.discard(self._staging)
            job.done = self._stream.record()


def _cut(memory: torch.Tensor, shapes: Sequence[PackedShape]) -> list[torch.Tensor]:
    """Pieces of a buffer for these matrices, one after another."""
    ends = list(itertools.accumulate(shape.n_bytes for shape in shapes))
    return [memory[end - shape.n_bytes : end] for shape, end in zip(shapes, ends, strict=True)]
