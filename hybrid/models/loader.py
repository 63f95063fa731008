"""From an open file and a plan to a model that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hybrid.backends.base import Backend
from hybrid.backends.gpu_memory import check_memory, limit_memory
from hybrid.backends.locality import Locality
from hybrid.backends.streams import Runtime
from hybrid.config import KVFormat
from hybrid.errors import ConfigError
from hybrid.gguf import GGUFFile
from hybrid.kvcache.blocks import AttentionBatch
from hybrid.models.decode_step import DecodeStep
from hybrid.models.expert_cache import make_copies
from hybrid.models.expert_streams import stream_experts
from hybrid.models.hybrid_step import HybridDecoder, can_decode
from hybrid.models.layer_steps import LayerSteps, run_layers, traced_layers
from hybrid.models.packed_cache import find_packed_cache, use_packed_cache
from hybrid.models.registry import family_of
from hybrid.models.warm_up import told_by_the_plan, warm_up
from hybrid.models.weights import Progress, WeightCheck, WeightLoader, close_backends, create_backends
from hybrid.moe.cache import PolicyOptions
from hybrid.moe.copies import CopyStats, ExpertCopies
from hybrid.moe.divide import StreamRates
from hybrid.moe.reduction import ExpertCount
from hybrid.moe.streaming import Ring
from hybrid.moe.usage import Phase, UsageCounter
from hybrid.placement.capabilities import cache_row_bytes
from hybrid.placement.plan import Plan
from hybrid.placement.usage import PHASES, Usage
from hybrid.trace import Trace

# A recording keeps every intermediate result, 57 MB a sequence for DeepSeek-V3, and there is one for each
# number of sequences; the more there are, the less the time of Python matters.
_MOST_RECORDED_SEQS = 4


class Model:
    """A loaded model: hidden states from token ids, logits from hidden states.

    Attributes:
        config: the family's frozen dataclass; has ``vocab_size``, ``hidden_size``, ``num_layers`` and
            ``max_position_embeddings``.
        plan: where its tensors are.
        loaded_bytes: tensor and device -> bytes it takes there, as counted while loading.
        num_threads: CPU workers, the calling thread among them; 0 where no tensor is on the CPU.
    """

    def __init__(
        self,
        network: Any,
        plan: Plan,
        backends: dict[str, Backend],
        kv_format: KVFormat,
        loaded_bytes: dict[tuple[str, str], int],
        *,
        use_graphs: bool = True,
        trace: Trace | None = None,
        copies: ExpertCopies | None = None,
        rings: Sequence[Ring] = (),
    ) -> None:
        self.config = network.config
        self.loaded_bytes = loaded_bytes
        self.plan = plan
        self.kv_format = kv_format
        self._network, self._backends = network, backends
        self._num_blocks = 0
        self._decode_steps: dict[int, DecodeStep] = {}  # by number of sequences
        self._use_graphs, self._trace = use_graphs, trace
        if trace is not None:
            for runtime in self._runtimes:
                runtime.start_trace(trace)
        self._hybrid: HybridDecoder | None = None
        self._phase = Phase()
        self._usage: dict[int, UsageCounter] | None = None
        self._copies, self._rings = copies, rings
        self._tokens = dict.fromkeys(PHASES, 0)  # since they are counted

    @property
    def num_threads(self) -> int:
        return getattr(self._backends.get("cpu"), "num_threads", 0)

    @property
    def locality(self) -> Locality | None:
        """Whether weights are on their NUMA nodes; ``None`` where none have one."""
        return getattr(self._backends.get("cpu"), "locality", None)

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Device -> bytes its weights take there."""
        found: dict[str, int] = {}
        for (_, device), n_bytes in self.loaded_bytes.items():
            found[device] = found.get(device, 0) + n_bytes
        return found

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache a token takes over all layers."""
        return int(self.config.num_layers * cache_row_bytes(self.config.cache_width, self.kv_format))

    @property
    def _runtimes(self) -> list[Runtime]:
        return [backend.runtime for backend in self._backends.values() if backend.runtime is not None]

    def allocate_cache(self, num_blocks: int) -> None:
        """Makes the cache, of ``num_blocks * BLOCK_SIZE`` tokens; what was in it is gone."""
        self._num_blocks = num_blocks
        self._end_decoding()
        with told_by_the_plan(self.plan):
            self._network.allocate_cache(num_blocks, self.kv_format)
        self._begin_decoding()

    def forward(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """int32 ``[T]`` -> float32 hidden states ``[T, hidden]``; writes the cache."""
        return run_layers(self.forward_layers(token_ids, batch))

    def forward_layers(self, token_ids: torch.Tensor, batch: AttentionBatch) -> LayerSteps:
        """`forward` with a pause after each part of a layer."""
        if token_ids.dtype is not torch.int32 or not token_ids.is_contiguous():
            raise ValueError(f"token_ids: expected a contiguous int32 tensor, found {token_ids.dtype}")
        if not self._phase.decodes:
            self._between_steps(len(token_ids))
        self._tokens["decode" if self._phase.decodes else "prompt"] += len(token_ids)
        steps: LayerSteps = self._network.forward_layers(token_ids, batch)
        steps = steps if self._phase.decodes else self._as_prompt(steps)
        return steps if self._trace is None else traced_layers(steps, self._trace, len(token_ids))

    def _as_prompt(self, steps: LayerSteps) -> LayerSteps:
        while True:
            self._set_phase(decoding=False)  # others may have decoded since the last part of a layer
            try:
                part = next(steps)
            except StopIteration as done:
                hidden_states: torch.Tensor = done.value
                return hidden_states
            yield part

    def _set_phase(self, *, decoding: bool) -> None:
        self._phase.decodes = decoding
        for backend in self._backends.values():
            backend.decoding = decoding

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies cache blocks in all layers, each from the first to the second of a pair."""
        self._network.copy_blocks(pairs)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float32 ``[n, hidden]`` of `forward` -> float32 ``[n, vocab]`` on the host."""
        self._set_phase(decoding=False)
        logits: torch.Tensor = self._network.compute_logits(hidden_states.contiguous())
        return logits if logits.is_cpu else logits.cpu()

    def decode(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Logits float32 ``[S, vocab]`` on the host after one new token for each of ``S`` sequences.

        Where the whole model is on a device that records, Python runs only the first such step of each small
        number of sequences; where its layers are on devices with streams, see `HybridDecoder`.
        """
        self._between_steps(len(token_ids))
        self._set_phase(decoding=True)
        try:
            if self._trace is None:
                return self._decode(token_ids, batch)
            with self._trace.span("engine", f"decode step of {len(token_ids)}", "step"):
                return self._decode(token_ids, batch)
        finally:
            self._set_phase(decoding=False)

    def _decode(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        if self._hybrid is not None:
            self._tokens["decode"] += len(token_ids)
            return self._hybrid.decode(token_ids, batch)
        backends = list(self._backends.values())
        recordable = len(backends) == 1 and backends[0].can_record and self._network.can_record
        if not recordable or len(token_ids) > _MOST_RECORDED_SEQS:
            logits: torch.Tensor = self._network.compute_logits(self.forward(token_ids, batch))
            return logits if logits.is_cpu else logits.cpu()
        self._tokens["decode"] += len(token_ids)
        step = self._decode_steps.get(len(token_ids))
        if step is None:
            step = self._decode_steps[len(token_ids)] = DecodeStep(len(token_ids), self._num_blocks)
        return step.run(self._network, backends[0], token_ids, batch)

    def _between_steps(self, num_tokens: int) -> None:
        if self._copies is not None:
            self._copies.between_steps(num_tokens)

    @property
    def copy_stats(self) -> CopyStats | None:
        """What copies of experts did; ``None`` where there are none. Any thread may ask."""
        return None if self._copies is None else self._copies.stats

    def count_usage(self) -> None:
        """Counts from now on which experts tokens use. What is not counted costs nothing: decode steps that
        were recorded before are recorded anew."""
        self._end_decoding()
        self._tokens = dict.fromkeys(PHASES, 0)
        self._usage = self._network.count_usage(self._phase)
        if self._num_blocks:
            self._begin_decoding()

    @property
    def usage(self) -> Usage:
        """What `count_usage` has counted, between steps."""
        counters = self._usage or {}
        layers = {
            layer: {"prompt": counter.prompt.read(), "decode": counter.decode.read()}
            for layer, counter in counters.items()
        }
        return Usage(dict(self._tokens), layers)

    def warm_up(self) -> None:
        """Once before the first request, with an allocated cache: see `hybrid.models.warm_up`. Does nothing
        where no tensor is on a GPU.

        Raises:
            CapacityError: a GPU's memory does not suffice.
        """
        gpus = [backend for backend in self._backends.values() if backend.device.type == "cuda"]
        if gpus:
            warm_up(self, self.plan)
            check_memory(gpu_budgets(self._backends, self.plan))

    @property
    def expert_count(self) -> ExpertCount:
        """Since the model was loaded; zeros where no threshold drops experts."""
        count: ExpertCount = self._network.expert_count
        return count

    def _begin_decoding(self) -> None:
        if can_decode(self._network):
            self._hybrid = HybridDecoder(
                self._network, self._num_blocks, use_graphs=self._use_graphs, trace=self._trace
            )

    def _end_decoding(self) -> None:
        """Drops what steps keep of the cache and of threads."""
        self._decode_steps.clear()
        if self._hybrid is not None:
            self._hybrid.close()
            self._hybrid = None

    @property
    def expert_cpu_seconds(self) -> float | None:
        """Time that routed experts took on the CPU; ``None`` where there are no threads for them."""
        pool = getattr(self._backends.get("cpu"), "pool", None)
        return None if pool is None else float(pool.moe_s)

    @property
    def experts_read(self) -> int:
        """Experts whose weights the CPU has read, each once a layer and step."""
        pool = getattr(self._backends.get("cpu"), "pool", None)
        return 0 if pool is None else int(pool.moe_experts)

    def close(self) -> None:
        """Frees weights, cache and threads, and writes the trace. The model must not be used afterwards."""
        if self._copies is not None:
            self._copies.close()
            self._copies = None
        for ring in self._rings:
            ring.close()
        self._end_decoding()
        self._network = None
        if self._trace is not None:
            for runtime in self._runtimes:
                runtime.stop_trace()
            self._trace.write()
            self._trace = None
        close_backends(self._backends)


def load_model(
    file: GGUFFile,
    *,
    plan: Plan,
    max_model_len: int,
    num_threads: int | None = None,
    kv_format: KVFormat = "f16",
    progress: Progress | None = None,
    config: Any = None,
    packed_cache: Path | None = None,
    use_graphs: bool = True,
    trace: Trace | None = None,
    cache_options: PolicyOptions | None = None,
    stream_rates: StreamRates | None = None,
) -> Model:
    """Loads every tensor to the device and in the format the plan says.

    The whole file is checked against its hyper-parameters before the first weight is read.

    Args:
        file: an open model file; may be closed afterwards.
        plan: from `hybrid.placement.planner.plan`.
        max_model_len: positions to prepare for.
        num_threads: CPU workers; ``None`` takes all physical cores.
        kv_format: how the cache holds its numbers.
        progress: called after each tensor with the bytes loaded and the bytes in all. What it raises ends
            the loading and leaves nothing behind.
        config: the family's hyper-parameters where they have been read already.
        packed_cache: a folder for packed weights, see `hybrid.models.packed_cache`.
        stream_rates: what computing an expert of a prompt on the CPU and streaming it to the device of its
            layer cost; ``None``: none are streamed.
        cache_options: how a dynamic expert cache decides.
        use_graphs: whether decode steps of devices are captured once and replayed.
        trace: notes what runs when, and is written when the model is closed.

    Raises:
        GGUFError, ModelError: the file is not a model this build can run.
        PlacementError: tensors that belong together are on different devices, or a device is not there.
    """
    family = family_of(file)
    if config is None:
        config = family.read_config(file)
    cached = [] if plan.expert_cache is None else [plan.expert_cache.device]
    backends = create_backends(dict.fromkeys([*plan.devices, *cached]), num_threads)
    rings: list[Ring] = []
    try:
        check = WeightCheck(file, plan, backends)
        family.load(config, check, 1)
        check.finish(config.num_layers)
        budgets = gpu_budgets(backends, plan)
        if budgets:
            limit_memory(budgets)
        if packed_cache is not None and "cpu" in backends:
            sources = check.matrices.get("cpu", [])
            use_packed_cache(file, sources, backends["cpu"], packed_cache, progress)
        with told_by_the_plan(plan):
            loader = WeightLoader(file, plan, backends, check, progress)
            network = family.load(config, loader, max_model_len)
        for backend in backends.values():
            backend.loading_done()
        if stream_rates is not None:
            rates = dict.fromkeys(network.moes, stream_rates)
            rings = stream_experts(network, rates)
        copies = None
        if plan.expert_cache is not None:
            copies = make_copies(network, plan.expert_cache, backends, cache_options)
    except BaseException:
        for ring in rings:
            ring.close()
        close_backends(backends)
        raise
    return Model(
        network, plan, backends, kv_format, loader.loaded_bytes, use_graphs=use_graphs, trace=trace,
        copies=copies, rings=rings,
    )  # fmt: skip


def gpu_budgets(backends: Mapping[str, Backend], plan: Plan) -> dict[torch.device, int]:
    """Bytes that may be used of each GPU in use; names of one GPU together."""
    found: dict[torch.device, int] = {}
    for name, backend in backends.items():
        budget = plan.memory[name].budget_bytes if name in plan.memory else None
        if backend.device.type == "cuda" and budget is not None:
            found[backend.device] = found.get(backend.device, 0) + budget
    return found


def pack_model(
    file: GGUFFile,
    *,
    plan: Plan,
    folder: Path,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Path, bool]:
    """Writes the cache of packed weights that `load_model` takes; the file, and whether it had to be written.

    Raises:
        GGUFError, ModelError, PlacementError: as `load_model`.
        ConfigError: nothing is on the CPU, or another process is writing the cache.
        CapacityError, OSError: the disk has too little room, or the folder cannot be written.
    """
    family = family_of(file)
    config = family.read_config(file)
    backends = create_backends(plan.devices, num_threads)
    try:
        check = WeightCheck(file, plan, backends)
        family.load(config, check, 1)
        check.finish(config.num_layers)
        there = find_packed_cache(file, folder)
        if there is not None:
            return there, False
        path = None
        if "cpu" in backends:
            sources = check.matrices.get("cpu", [])
            path = use_packed_cache(file, sources, backends["cpu"], folder, progress)
    finally:
        close_backends(backends)
    if path is None:
        raise ConfigError(
            f"{folder}: no cache was written: nothing is on the CPU, or another process is at it"
        )
    return path, True
