"""Copies of hot experts on a device: which experts of a step have one, and what changes between steps.

What a device's copies compute is left out of the CPU's part by id -1 and added to it. Each part sums in
top-k order; which experts are in which part follows from the table at the time, so that with a dynamic
cache, where devices round differently, the last bits of a text depend on what was asked before. A static
cache and the same requests give the same bits.

A step finds one table from its start to its end: `ExpertCopies.between_steps` changes it on the device's main
stream, which steps wait for and which waits for nothing that is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hybrid.backends.base import Backend
from hybrid.backends.streams import Event, Stream
from hybrid.moe.cache import DynamicPolicy, Slots
from hybrid.moe.copier import Copier, CopyJob, CopySource
from hybrid.placement.hot_experts import Expert

_NUM_UPLOADS = 2


@dataclass(frozen=True)
class CopyStats:
    """Since loading: uses of experts in layers that can have copies, and of those, the ones that found a
    copy; copies made, and bytes uploaded for them. Up to some steps old."""

    uses: int = 0
    hits: int = 0
    copies: int = 0
    n_bytes: int = 0


class LayerCopies:
    """One layer's side of it."""

    def __init__(self, copies: ExpertCopies, row: int, stacks: tuple[Any, Any, Any]) -> None:
        self._copies, self._row, self._stacks = copies, row, stacks

    @property
    def backend(self) -> Backend:
        return self._copies.backend

    def split(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[bool], torch.Tensor]]:
        """The ids that are left to others, on this device, and what computes the rest ``[T, hidden]``; with
        ``rounded`` from hidden states in bfloat16, as those that are handed over get them."""
        backend = self.backend
        ids = backend.receive(topk_ids)
        slots = self._copies.table[self._row][ids.long()]
        self._copies.count(self._row, ids)

        def compute(rounded: bool) -> torch.Tensor:
            here = backend.receive(x)
            if rounded:
                here = here.to(torch.bfloat16).to(torch.float32)
            return backend.moe(here, *self._stacks, slots, backend.receive(topk_weights))

        return ids.masked_fill(slots >= 0, -1), compute


class ExpertCopies:
    """The copies of a model's experts on one device.

    Args:
        sources: layer -> its experts in RAM; layers whose shapes are equal share slots.
        initial: the copies to begin with.
        policy: decides about replacements; ``None``: the copies stay.

    Attributes:
        table: int32 ``[layers, num_experts + 1]`` on the device, see `Slots`.
    """

    @torch.inference_mode()  # as steps and the copier's thread are
    def __init__(
        self,
        backend: Backend,
        sources: Mapping[int, CopySource],
        num_experts: int,
        initial: Mapping[int, Sequence[int]],
        policy: DynamicPolicy | None = None,
        interval: int = 8,
    ) -> None:
        self.backend, self._policy, self._interval = backend, policy, interval
        self.layers = sorted(sources)
        self._rows = {layer: row for row, layer in enumerate(self.layers)}
        self._sources = [sources[layer] for layer in self.layers]
        shapes = [source.shapes for source in self._sources]
        kinds = list(dict.fromkeys(shapes))
        self._kinds = [kinds.index(shape) for shape in shapes]
        capacity = [0] * len(kinds)
        for layer, experts in initial.items():
            capacity[self._kinds[self._rows[layer]]] += len(experts)
        self.slots = Slots(self._kinds, num_experts, capacity)
        self._expert_bytes = [sum(shape.n_bytes for shape in kind) for kind in kinds]
        self._stacks = [
            tuple(backend.allocate_stack(shape, max(count, 1)) for shape in kind)
            for kind, count in zip(kinds, capacity, strict=True)
        ]
        self._counts: dict[Stream | None, torch.Tensor] = {}
        self._copier = Copier(backend, max(self._expert_bytes))
        self._jobs: dict[Expert, CopyJob] = {}
        self._snapshot = _Snapshot(backend, self.slots.ready.shape)
        self._uploads = _Uploads(backend, self.slots.table.shape)
        self.table: torch.Tensor = self._uploads.table
        self._steps = self._tokens = 0
        self._stats = CopyStats()
        self._fill(initial)

    @property
    def stats(self) -> CopyStats:
        """Any thread may ask."""
        return self._stats

    def layer(self, layer: int) -> LayerCopies:
        row = self._rows[layer]
        return LayerCopies(self, row, self._stacks[self._kinds[row]])

    def count(self, row: int, ids: torch.Tensor) -> None:
        """Counts a layer's uses; streams work at the same time, so each has counts of its own."""
        runtime = self.backend.runtime
        stream = None if runtime is None else runtime.current
        if stream not in self._counts:
            zeros = torch.zeros(self.slots.ready.shape, dtype=torch.int64)
            self._counts[stream] = self.backend.receive(zeros)
        self.backend.count_experts(ids, self._counts[stream][row])

    def between_steps(self, num_tokens: int) -> None:
        """Looks at the counts, takes copies that are there and begins others; called before each step of
        ``num_tokens`` tokens, while no other runs. Never waits.

        Raises:
            DeviceError: a copy has failed.
        """
        self._take_snapshot()
        arrived = [expert for expert, job in self._jobs.items() if self._copier.is_done(job)]
        due = self._steps % self._interval == 0 and self._steps > 0
        # Uses belong to the table they were made under, so they are counted up to here before it changes.
        if (arrived or due) and self._snapshot.is_free and self._uploads.is_free:
            self._snapshot.begin(list(self._counts.values()), self.slots.ready, self._tokens)
            self._tokens = 0
            self._change_table(arrived)
        self._steps += 1
        self._tokens += num_tokens

    def close(self) -> None:
        """Ends the copier's thread."""
        self._copier.close()

    def _fill(self, initial: Mapping[int, Sequence[int]]) -> None:
        for layer, experts in initial.items():
            for number in experts:
                expert = self._rows[layer], number
                self._copy(expert, self.slots.begin(expert).slot, None)
        while self._jobs:
            arrived = [expert for expert, job in self._jobs.items() if self._copier.is_done(job)]
            for expert in arrived:
                self._finish(expert)
            time.sleep(0 if arrived else 1e-3)  # nothing else runs yet
        self._uploads.upload(self.slots.table)

    def _copy(self, expert: Expert, slot: int, after: Event | None) -> None:
        row, number = expert
        job = CopyJob(self._sources[row], number, self._stacks[self._kinds[row]], slot, after)
        self._jobs[expert] = job
        self._copier.begin(job)

    def _finish(self, expert: Expert) -> None:
        del self._jobs[expert]
        self.slots.finish(expert)
        before, n_bytes = self._stats, self._expert_bytes[self._kinds[expert[0]]]
        self._stats = CopyStats(before.uses, before.hits, before.copies + 1, before.n_bytes + n_bytes)

    def _take_snapshot(self) -> None:
        found = self._snapshot.take()
        if found is None:
            return
        counts, ready, tokens = found
        before = self._stats
        uses, hits = before.uses + int(counts.sum()), before.hits + int(counts[ready].sum())
        self._stats = CopyStats(uses, hits, before.copies, before.n_bytes)
        if self._policy is not None:
            self._policy.observe(counts, tokens)

    def _change_table(self, arrived: list[Expert]) -> None:
        for expert in arrived:
            self._finish(expert)
        begun = [] if self._policy is None else self._policy.decide(self.slots)
        if arrived or begun:
            after = self._uploads.upload(self.slots.table)
            for replacement in begun:
                self._copy(replacement.expert, replacement.slot, after)


class _Snapshot:
    """Counts on their way to the host, with the table they were made under."""

    def __init__(self, backend: Backend, shape: tuple[int, ...]) -> None:
        self._runtime, self._shape = backend.runtime, shape
        self._total = np.zeros(shape, np.int64)
        self._buffers: list[torch.Tensor] = []
        self._pending: tuple[int, Event | None, npt.NDArray[np.bool_], int] | None = None

    @property
    def is_free(self) -> bool:
        return self._pending is None

    def begin(self, counts: list[torch.Tensor], ready: npt.NDArray[np.bool_], tokens: int) -> None:
        """Queues copies behind all work of the main stream."""
        while len(self._buffers) < len(counts):
            runtime = self._runtime
            plain = torch.empty(self._shape, dtype=torch.int64)
            self._buffers.append(plain if runtime is None else runtime.pinned(self._shape, torch.int64))
        for buffer, values in zip(self._buffers, counts, strict=False):
            buffer.copy_(values) if self._runtime is None else self._runtime.copy(buffer, values)
        event = None if self._runtime is None else self._runtime.current.record()
        self._pending = len(counts), event, ready.copy(), tokens

    def take(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], int] | None:
        """Uses since the last snapshot, the experts that had copies, and tokens; ``None``: not there yet."""
        if self._pending is None:
            return None
        number, event, ready, tokens = self._pending
        if event is not None and not event.is_done():
            return None
        self._pending = None
        total = np.sum([buffer.numpy() for buffer in self._buffers[:number]], axis=0, dtype=np.int64)
        total = np.broadcast_to(total, self._shape).copy()
        found, self._total = total - self._total, total
        return found, ready, tokens


class _Uploads:
    """The table on the device, and pinned memory it comes from."""

    def __init__(self, backend: Backend, shape: tuple[int, ...]) -> None:
        self._runtime, self._number = backend.runtime, 0
        self.table = backend.receive(torch.full(shape, -1, dtype=torch.int32))
        self._events: list[Event | None] = [None] * _NUM_UPLOADS
        if self._runtime is not None:
            self._buffers = [self._runtime.pinned(shape, torch.int32) for _ in range(_NUM_UPLOADS)]

    @property
    def is_free(self) -> bool:
        """Whether the next buffer has been read."""
        event = self._events[self._number]
        return event is None or event.is_done()

    def upload(self, table: npt.NDArray[np.int32]) -> Event | None:
        """Queues the new table; the event is behind it and behind all steps before."""
        if self._runtime is None:
            self.table.copy_(torch.from_numpy(table))
            return None
        buffer = self._buffers[self._number]
        buffer.copy_(torch.from_numpy(table))
        self._runtime.copy(self.table, buffer)
        self._runtime.discard(buffer)
        event = self._events[self._number] = self._runtime.current.record()
        self._number = (self._number + 1) % _NUM_UPLOADS
        return event
