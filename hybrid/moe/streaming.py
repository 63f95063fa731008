"""Experts of long prompts, streamed from RAM to a device while the CPU computes the others.

An expert on its way takes a slot of a ring: pinned memory, packed bytes on the device, unpacked matrices.
A thread fills pinned slots and queues uploads on a stream of its own and the arithmetic on that of the layer,
by ascending ids, so that sums have one order whatever the timing; the caller computes the CPU's experts
meanwhile.

Order, by the sites of `hybrid.backends.streams`: pinned memory has been read before it is filled again
(`PINNED_IS_READ`); a slot's last expert has been computed before the next is unpacked there
(`SLOT_IS_COMPUTED`); an expert is there before it is computed (`EXPERT_IS_THERE`).

What is streamed follows from the number of tokens that chose each expert, and devices round differently: a
prompt that is cut into other chunks has other last bits.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from hybrid.backends.base import Backend
from hybrid.backends.streams import Event, Stream
from hybrid.errors import DeviceError
from hybrid.moe.copier import CopySource
from hybrid.moe.divide import StreamRates, divide

PINNED_IS_READ = "a pinned slot of the ring has been read"
SLOT_IS_COMPUTED = "the expert before in the slot is computed"
EXPERT_IS_THERE = "a streamed expert is there"

RING_BYTES = 256 << 20
MIN_SLOTS, MAX_SLOTS = 3, 8
_READERS = 3  # threads that copy to pinned memory, a matrix each: one is slower than PCIe


def ring_slots(expert_bytes: int, num_rings: int = 1) -> int:
    """Slots of each of some rings for experts of this size, which are in a slot three times: pinned, packed
    and unpacked; 0: fewer than three fit."""
    slots = RING_BYTES // num_rings // (3 * expert_bytes)
    return min(slots, MAX_SLOTS) if slots >= MIN_SLOTS else 0


class _Slot:
    """A place of the ring, and when each part of it can be used again."""

    def __init__(self, pinned: torch.Tensor, packed: torch.Tensor) -> None:
        self.pinned, self.packed = pinned, packed
        self.read: Event | None = None
        self.computed: Event | None = None


class Ring:
    """Slots for experts of some shapes on a device with streams, shared by the layers of these shapes."""

    @torch.inference_mode()  # as steps and the thread that uploads are
    def __init__(self, backend: Backend, source: CopySource, num_slots: int) -> None:
        assert backend.runtime is not None
        self.backend, self.runtime, shapes = backend, backend.runtime, source.shapes
        runtime, n_bytes = self.runtime, sum(shape.n_bytes for shape in shapes)
        self._ends = list(itertools.accumulate(shape.n_bytes for shape in shapes))
        self.stacks = tuple(backend.allocate_stack(shape, num_slots) for shape in shapes)
        self.slots = [
            _Slot(runtime.pinned((n_bytes,), torch.uint8), runtime.empty((n_bytes,), torch.uint8))
            for _ in range(num_slots)
        ]
        self.stream = runtime.stream("expert uploads")
        self._readers = ThreadPoolExecutor(_READERS, "expert uploads")
        self._next = 0
        self.stream.wait(runtime.main.record(), SLOT_IS_COMPUTED)  # the slots' memory is new by then

    def upload(self, source: CopySource, expert: int) -> tuple[int, Event]:
        """Queues an expert's upload on the ring's stream; its slot, and when it is there."""
        number, runtime = self._next, self.runtime
        self._next = (number + 1) % len(self.slots)
        slot = self.slots[number]
        if slot.read is not None:
            slot.read.synchronize(PINNED_IS_READ)
        source.read(expert, self._pieces(slot.pinned), map_=self._readers.map)
        with runtime.on(self.stream):
            if slot.computed is not None:
                self.stream.wait(slot.computed, SLOT_IS_COMPUTED)
            runtime.copy(slot.packed, slot.pinned)
            runtime.discard(slot.pinned)
            slot.read = self.stream.record()
            for stack, piece in zip(self.stacks, self._pieces(slot.packed), strict=True):
                self.backend.unpack(stack, number, piece)
            runtime.discard(slot.packed)
            return number, self.stream.record()

    def _pieces(self, memory: torch.Tensor) -> list[torch.Tensor]:
        return [memory[start:end] for start, end in zip([0, *self._ends], self._ends, strict=False)]

    def close(self) -> None:
        self._readers.shutdown()


class StreamedExperts:
    """The streamed side of a layer: its experts in RAM, and a ring."""

    def __init__(self, ring: Ring, source: CopySource, rates: StreamRates, num_experts: int) -> None:
        self.ring, self._source, self.rates, self._num_experts = ring, source, rates, num_experts

    @property
    def backend(self) -> Backend:
        return self.ring.backend

    def choose(self, topk_ids: torch.Tensor) -> tuple[int, ...]:
        """Experts to stream for these ids of the host, ``[T, k]``, by ascending id."""
        used = topk_ids[topk_ids >= 0].long()
        counts = torch.bincount(used, minlength=self._num_experts).tolist()
        here = self._source.experts
        if here is not None:
            counts = [count if expert in here else 0 for expert, count in enumerate(counts)]
        return tuple(sorted(divide(counts, self.rates).streamed))

    def begin(
        self, experts: Sequence[int], x: torch.Tensor, host_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> StreamedPass:
        """Starts computing ``experts``; the device's current stream must be left alone until `finish`."""
        return StreamedPass(self.ring, self._source, experts, x, host_ids, topk_weights)


class StreamedPass:
    """One layer's experts on their way."""

    def __init__(
        self,
        ring: Ring,
        source: CopySource,
        experts: Sequence[int],
        x: torch.Tensor,
        host_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> None:
        self._ring, self._source, self._experts = ring, source, experts
        backend = ring.backend
        self._stream: Stream = ring.runtime.current
        self._x, self._weights = backend.receive(x), backend.receive(topk_weights)
        self._out = torch.zeros_like(self._x)
        self._places = []
        for expert in experts:
            tokens, slots = torch.where(host_ids == expert)
            self._places.append((backend.receive(tokens), backend.receive(slots)))
        self._error: BaseException | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._serve, name="streamed experts", daemon=True)
        self._thread.start()

    def finish(self) -> torch.Tensor:
        """The streamed experts' sum ``[T, hidden]``, queued on the layer's stream.

        Raises:
            DeviceError: an expert could not be streamed.
        """
        self._thread.join()
        if self._error is not None:
            name = self._ring.backend.name
            raise DeviceError(f"streaming experts to {name} failed: {self._error!r}") from self._error
        return self._out

    def abandon(self) -> None:
        """Ends it after an error elsewhere."""
        self._is_over = True
        self._thread.join()

    def _serve(self) -> None:
        try:
            with torch.inference_mode():
                for expert, (tokens, slots) in zip(self._experts, self._places, strict=True):
                    if self._is_over:
                        return
                    number, there = self._ring.upload(self._source, expert)
                    with self._ring.runtime.on(self._stream):
                        self._stream.wait(there, EXPERT_IS_THERE)
                        self._compute(number, tokens, slots)
                        self._ring.slots[number].computed = self._stream.record()
        except BaseException as error:
            self._error = error

    def _compute(self, number: int, tokens: torch.Tensor, slots: torch.Tensor) -> None:
        # Each token has an expert once at most, so rows of the sum meet one addition each.
        weights = self._weights[tokens, slots][:, None].contiguous()
        ids = torch.zeros_like(weights, dtype=torch.int32) + number
        gate, up, down = self._ring.stacks
        part = self._ring.backend.moe(self._x[tokens], gate, up, down, ids, weights)
        self._out.index_add_(0, tokens, part)
