"""A decode step of devices with streams, their routed experts in RAM computed meanwhile
(`hybrid.moe.handoff`).

What is queued is one pass of the network's own layers. Two or more sequences are two *lanes* of streams,
queued layer by layer in turn, so that the attention of one runs while the other's experts are computed. The
whole is captured once for each number of sequences and replayed, or with ``use_graphs=False`` queued by
Python every time: the same work, and the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from hybrid.backends.base import Backend
from hybrid.backends.streams import Graph, Runtime, Stream, on_streams
from hybrid.errors import DeviceError
from hybrid.kvcache.blocks import AttentionBatch
from hybrid.moe.handoff import Handoff, HandoffLane
from hybrid.trace import Trace

# Waits, by the sites of `hybrid.backends.streams`.
EARLIER_WORK = "prompts and copies of blocks are done"
LANE_STARTS = "the other lane may start"
LANE_ENDS = "the other lane is through the layers"
RESULT_IS_THERE = "the last device has the result"
STEP_IS_DONE = "the host may read the result"

_MOST_CAPTURED_SEQS = 16  # a graph keeps the memory of a step, and there is one for each number of sequences


class HybridDecoder:
    """Decode steps of a network whose layers, but for routed experts, are on devices with streams.

    One new token for each of some sequences at a time; the caller sees nothing of streams. After an error of
    a device nothing works any more.
    """

    def __init__(
        self, network: Any, max_blocks: int, *, use_graphs: bool, trace: Trace | None = None
    ) -> None:
        self.network, self.max_blocks = network, max_blocks
        backends = layer_backends(network)
        self.first, self.last = backends[0], backends[-1]
        devices = [b for b in (*backends, *expert_backends(network)) if b.runtime is not None]
        self.runtimes = list(dict.fromkeys(_runtime(backend) for backend in devices))
        together = len(self.runtimes) == 1 or _runtime(self.first).captures_other_devices
        self.use_graphs = use_graphs and together and network.can_capture
        self.handoff, self._trace = _hand_over(network), trace
        self._note_experts()
        self._streams: dict[tuple[Runtime, str], Stream] = {}
        self._steps: dict[int, HybridStep] = {}  # by number of sequences

    def stream(self, runtime: Runtime, name: str) -> Stream:
        """A stream of a device, the same for all steps."""
        key = runtime, name
        if key not in self._streams:
            self._streams[key] = runtime.stream(name)
        return self._streams[key]

    def decode(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Logits ``[S, vocab]`` of a step, a new tensor of the host.

        Raises:
            DeviceError: a device or the CPU's part has failed.
        """
        step = self._steps.get(len(token_ids))
        if step is None:
            step = self._steps[len(token_ids)] = HybridStep(self, len(token_ids))
        logits = step.run(token_ids, batch)
        self._note_experts()
        return logits

    def _note_experts(self) -> None:
        if self._trace is not None and self.handoff is not None:
            self.handoff.trace_to(self._trace)

    def close(self) -> None:
        """Waits for what is queued, and ends the thread of the experts before their buffers go."""
        self.wait()
        for moe in self.network.moes.values():
            moe.experts.keep()
        if self.handoff is not None:
            self.handoff.close()
        self._steps.clear()

    def wait(self) -> None:
        """Until nothing is queued, whatever has failed."""
        for runtime in self.runtimes:
            with suppress(DeviceError):
                runtime.synchronize()


class HybridStep:
    """The step of ``num_seqs`` sequences. Inputs and result lie in pinned memory, at fixed addresses."""

    def __init__(self, decoder: HybridDecoder, num_seqs: int) -> None:
        self._decoder, self._network = decoder, decoder.network
        self._first, self._last = _runtime(decoder.first), _runtime(decoder.last)
        half = num_seqs - num_seqs // 2
        self._lanes = [_Lane(decoder, "a", half)]
        if num_seqs > half:
            self._lanes.append(_Lane(decoder, "b", num_seqs - half))
        self._head_on_device = all(
            backend.runtime is self._last
            for backend in (self._network.norm.backend, self._network.head.backend)
        )
        width = self._network.config.vocab_size if self._head_on_device else self._network.config.hidden_size
        self._result = self._last.pinned((num_seqs, width), torch.float32)
        self._graph: Graph | None = None
        self._hidden_states: list[torch.Tensor] = []  # kept until the other lane's have been read
        self._captures = decoder.use_graphs and num_seqs <= _MOST_CAPTURED_SEQS
        self._is_warm = False  # whether it has run, so that a capture finds kernels loaded

    def run(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        stream, decoder = self._lanes[0].streams[self._first], self._decoder
        try:
            self._fill(token_ids, batch)
            for runtime in decoder.runtimes:
                stream.wait(runtime.main.record(), EARLIER_WORK)
            if self._captures and self._is_warm and self._graph is None:
                with self._first.capture(stream) as graph:
                    self._enqueue()
                self._graph = graph
            if self._graph is not None:
                self._graph.replay()
            else:
                self._enqueue()
            stream.record().synchronize(STEP_IS_DONE)
        except BaseException:
            decoder.wait()  # the next step finds all as it was
            raise
        if decoder.handoff is not None:
            decoder.handoff.check()
        self._is_warm = True
        result = self._result.clone()
        self._last.discard(self._result)
        if self._head_on_device:
            return result
        logits: torch.Tensor = self._network.compute_logits(result)
        return logits if logits.is_cpu else logits.cpu()

    def _enqueue(self) -> None:
        """Everything between the pinned inputs and the pinned result."""
        one, *others = self._lanes
        start = one.streams[self._first].record() if others else None
        for lane in others:
            assert start is not None
            lane.streams[self._first].wait(start, LANE_STARTS)
        try:
            hidden_states = self._hidden_states = self._run_layers()
        except BaseException:
            for lane in self._lanes:
                lane.abandon()
            raise
        with one.current():
            for lane in others:
                self._last.current.wait(lane.streams[self._last].record(), LANE_ENDS)
            result = torch.cat(hidden_states) if others else hidden_states[0]
            if self._head_on_device:
                result = self._network.compute_logits(result)
            self._last.copy(self._result, result)
            if self._last is not self._first:
                self._first.current.wait(self._last.current.record(), RESULT_IS_THERE)

    def _run_layers(self) -> list[torch.Tensor]:
        """Hidden states of the lanes, which take turns after each layer."""
        found: list[torch.Tensor] = []
        running = []
        for lane in self._lanes:
            with lane.current():
                running.append((lane, lane.start()))
        while running:
            for lane, steps in list(running):
                with lane.current():
                    try:
                        while next(steps) == "attention":
                            pass  # a turn is a whole layer
                    except StopIteration as done:
                        found.append(done.value)
                        running.remove((lane, steps))
        return found

    def _fill(self, token_ids: torch.Tensor, batch: AttentionBatch) -> None:
        start = 0
        for lane in self._lanes:
            lane.fill(token_ids, batch, slice(start, start + lane.num_seqs))
            start += lane.num_seqs


class _Lane:
    """Streams, a stream of each device, and inputs of some sequences of a step, with what hands their experts
    over."""

    def __init__(self, decoder: HybridDecoder, name: str, num_seqs: int) -> None:
        self._network, self.num_seqs = decoder.network, num_seqs
        self.streams: dict[Runtime, Stream] = {r: decoder.stream(r, name) for r in decoder.runtimes}
        first = _runtime(decoder.first)
        self._token_ids = first.pinned((num_seqs,), torch.int32)
        self._batch: dict[str, Any] = {name: first.pinned((num_seqs,), torch.int32) for name in _VECTORS}
        self._batch["query_start"] = first.pinned((num_seqs + 1,), torch.int32)
        self._batch["query_start"].copy_(torch.arange(num_seqs + 1))
        self._batch["block_tables"] = first.pinned((num_seqs, decoder.max_blocks), torch.int32)
        self._batch["block_tables"].fill_(-1)
        self._rows: torch.Tensor | None = None  # of an embedding on the host or on another device
        if self._network.embedding.backend.runtime is not first:
            self._rows = first.pinned((num_seqs, self._network.config.hidden_size), torch.float32)
        self._handoff = HandoffLane(decoder.handoff, num_seqs) if decoder.handoff is not None else None

    def fill(self, token_ids: torch.Tensor, batch: AttentionBatch, rows: slice) -> None:
        self._token_ids.copy_(token_ids[rows])
        for name in _VECTORS:
            self._batch[name].copy_(getattr(batch, name)[rows])
        self._batch["block_tables"][:, : batch.block_tables.shape[1]] = batch.block_tables[rows]
        if self._rows is not None:
            self._rows.copy_(self._network.embedding(token_ids[rows]))

    def start(self) -> Any:
        """A pass of the layers, nothing of it queued yet."""
        batch = AttentionBatch(**self._batch)
        if self._rows is None:
            return self._network.forward_layers(self._token_ids, batch)
        return self._network.continue_layers(self._rows, batch)

    @contextmanager
    def current(self) -> Iterator[None]:
        with on_streams(self.streams):
            if self._handoff is None:
                yield
            else:
                with self._handoff.opened():
                    yield

    def abandon(self) -> None:
        """Queues the waits for experts that an exception left out, or drops them with the capture."""
        if self._handoff is not None:
            with on_streams(self.streams):
                self._handoff.abandon()


_VECTORS = ("positions", "slot_mapping", "seq_lens")


def layer_backends(network: Any) -> list[Backend]:
    """Backends of all layers but for routed experts; the residual stream comes to the first and ends on the
    last."""
    return [backend for layer in network.layers for backend in layer.backends]


def can_decode(network: Any) -> bool:
    """Whether `HybridDecoder` takes a network: the layers are on devices with streams, and their experts
    there too or where `hybrid.moe.handoff` finds them."""
    return all(backend.runtime is not None for backend in layer_backends(network)) and all(
        backend.runtime is not None or backend.serves_handoff for backend in expert_backends(network)
    )


def expert_backends(network: Any) -> list[Backend]:
    """Backends of the routed experts of all layers."""
    return [backend for moe in network.moes.values() for backend in moe.experts.backends]


def _hand_over(network: Any) -> Handoff | None:
    """The handoff of the experts that need one."""
    handoff: Handoff | None = None
    for layer, moe in network.moes.items():
        serving = [backend for backend in moe.experts.backends if backend.serves_handoff]
        if serving:
            handoff = handoff or Handoff(serving[0])
            moe.experts.hand_over(handoff, layer, moe.router.backend, moe.router.config.num_experts_per_tok)
    return handoff


def _runtime(backend: Backend) -> Runtime:
    assert backend.runtime is not None
    return backend.runtime
