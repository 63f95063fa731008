"""Routed experts in RAM, computed for layers of a device: its streams call the CPU pool and Python takes no
part.

What crosses: hidden states as bfloat16, ids and weights to pinned memory; the experts' sums back as float32.
`kernels/cpu/handoff.h` says what each call may touch, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hybrid.backends.base import Backend
from hybrid.backends.streams import Runtime
from hybrid.errors import DeviceError
from hybrid.kernels import cpu

LIMIT_S = 60.0  # a layer that takes longer is stuck
SUBMIT, WAIT = "experts are submitted", "experts are computed"


@dataclass(frozen=True)
class HandedStack:
    """A stack of the CPU backend and where its inputs come from. ``slot``: its number among those of its
    layer; ``places`` as in `hybrid.moe.experts`, on ``home``."""

    layer: int
    slot: int
    home: Backend
    gate: Any
    up: Any
    down: Any
    places: torch.Tensor | None
    num_experts_per_tok: int

    @property
    def runtime(self) -> Runtime:
        runtime = self.home.runtime
        assert runtime is not None
        return runtime


class Handoff:
    """The stacks of a model that are handed over, and the thread that computes them.

    Attributes:
        lane: the buffers to use now; ``None``: experts are computed where they lie, as the caller waits.
    """

    def __init__(self, backend: Any, limit_s: float = LIMIT_S) -> None:
        self.native = cpu.Handoff(backend.pool, limit_s=limit_s)
        self.lane: HandoffLane | None = None
        self.stacks: list[HandedStack] = []

    def add(self, stack: HandedStack) -> HandedStack:
        self.stacks.append(stack)
        return stack

    def close(self) -> None:
        """Ends the thread, after the layer at hand; no stream may call any more."""
        self.lane = None
        self.stacks.clear()
        del self.native

    def check(self) -> None:
        """Raises `DeviceError`, with the layer, if one has failed or took too long."""
        try:
            self.native.check()
        except RuntimeError as error:
            raise DeviceError(f"{error}; load the model again") from error


class _Buffers:
    """Pinned memory between a device and the CPU, for the stacks of a slot in all layers of a device."""

    def __init__(self, stack: HandedStack, num_tokens: int) -> None:
        runtime, k = stack.runtime, stack.num_experts_per_tok
        self.num_tokens = torch.tensor([num_tokens], dtype=torch.int32)
        self.x = runtime.pinned((num_tokens, stack.gate.cols), torch.bfloat16)
        self.topk_ids = runtime.pinned((num_tokens, k), torch.int32)
        self.topk_weights = runtime.pinned((num_tokens, k), torch.float32)
        self.out = runtime.pinned((num_tokens, stack.down.rows), torch.float32)
        self.addresses = [
            buffer.data_ptr()
            for buffer in (self.num_tokens, self.x, self.topk_ids, self.topk_weights, self.out)
        ]


class HandoffLane:
    """Buffers and jobs for ``num_tokens`` tokens that go through the layers one after another.

    Made while no job runs. Layers of a lane follow each other on streams that wait for one another, so they
    share their buffers.
    """

    def __init__(self, handoff: Handoff, num_tokens: int) -> None:
        self._handoff = handoff
        self._buffers: dict[tuple[Runtime, int], _Buffers] = {}
        self._jobs: dict[tuple[int, int], int] = {}
        self._unwaited: dict[int, HandedStack] = {}
        for stack in handoff.stacks:
            key = stack.runtime, stack.slot
            if key not in self._buffers:
                self._buffers[key] = _Buffers(stack, num_tokens)
            self._jobs[stack.layer, stack.slot] = handoff.native.add(
                stack.layer, stack.gate, stack.up, stack.down, num_tokens, stack.num_experts_per_tok,
                *self._buffers[key].addresses,
            )  # fmt: skip

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within it experts are handed over by this lane."""
        before, self._handoff.lane = self._handoff.lane, self
        try:
            yield
        finally:
            self._handoff.lane = before

    def submit(
        self, stack: HandedStack, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """Queues a stack's work on the current stream; what is returned queues the wait for its sums
        ``[T, hidden]``, a tensor of the stack's home."""
        home, runtime = stack.home, stack.runtime
        buffers, job = self._buffers[runtime, stack.slot], self._jobs[stack.layer, stack.slot]
        ids = home.receive(topk_ids)
        if stack.places is not None:
            ids = stack.places[ids.long()]
        runtime.copy(buffers.x, home.receive(x).to(torch.bfloat16))
        runtime.copy(buffers.topk_ids, ids)
        runtime.copy(buffers.topk_weights, home.receive(topk_weights))
        runtime.current.call(cpu.Handoff.submit_address, job, SUBMIT)
        self._unwaited[job] = stack

        def collect() -> torch.Tensor:
            self._wait(job, stack)
            out = runtime.empty(buffers.out.shape, torch.float32)
            runtime.copy(out, buffers.out)
            for buffer in (buffers.x, buffers.topk_ids, buffers.topk_weights, buffers.out):
                runtime.discard(buffer)
            return out

        return collect

    def _wait(self, job: int, stack: HandedStack) -> None:
        stack.runtime.current.call(cpu.Handoff.wait_address, job, WAIT)
        del self._unwaited[job]

    def abandon(self) -> None:
        """Queues the waits that an exception left out."""
        for job, stack in list(self._unwaited.items()):
            self._wait(job, stack)
