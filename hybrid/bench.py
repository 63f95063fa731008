"""Tokens per second of prompt processing and generation, beside the limit of the machine.

Tests mean what llama-bench's do: ``pp512`` processes 512 prompt tokens from an empty cache and
computes the logits of the last; ``tg128`` runs 128 single-token steps, each with logits; ``@ d4096`` starts
with 4096 tokens in the cache, whose processing is not timed. Tokens are random, nothing is sampled.

Decoding's limit is the memory bandwidth measured in the same run: a step reads the active weights
and the cache once, so ``limit_fraction`` = (active + cache bytes) × tokens/s ÷ bandwidth.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hybrid.backends.isa import select_isa
from hybrid.calibration import calibrate
from hybrid.config import model_path
from hybrid.describe import ModelSummary, model_type, open_for_description, summarise
from hybrid.doctor import bandwidth
from hybrid.engine.load import LoadedModel, LoadOptions, load
from hybrid.errors import CapacityError, ConfigError
from hybrid.forward import SingleSequence
from hybrid.gguf import GGMLType
from hybrid.placement.capabilities import cache_row_bytes
from hybrid.placement.cost import run_tps
from hybrid.placement.report import parts
from hybrid.placement.roles import ROLES

# Of a setup, what each row has its part of.
_OF_ROWS = ("read_bandwidth", "predicted_ts", "routed_active_bytes")
DECODE_LIMIT = "ram_read_bandwidth"


@dataclass(frozen=True)
class Workload:
    """``n_prompt`` tokens processed or ``n_gen`` generated, one of the two 0, after ``n_depth`` others."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def label(self) -> str:
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def num_tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def mean_context(self) -> float:
        """Tokens in the cache that a timed token attends to, itself included, on average."""
        return self.n_depth + (self.num_tokens + 1) / 2


@dataclass(frozen=True)
class Setup:
    """What all rows of a run share, by the names of llama-bench's fields where it has them.

    ``model_size`` and ``model_n_params`` are the file's. ``active_bytes`` are those a token reads, as weights
    are stored; ``routed_active_bytes`` the routed experts' part. ``read_bandwidth`` is in bytes per second,
    ``predicted_ts`` in tokens per second by the label of a test.
    """

    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    backends: str
    isa: str
    n_threads: int
    numa: str
    numa_local: float | None
    numa_verified: bool | None
    type_k: str
    n_ubatch: int
    placement_hash: str
    experts_per_token: int | None
    expert_threshold: float | None
    active_bytes: int
    routed_active_bytes: float
    kv_bytes_per_token: int
    read_bandwidth: float | None
    predicted_ts: dict[str, float | None]


def list_tests(n_prompt: Sequence[int], n_gen: Sequence[int], n_depth: Sequence[int]) -> list[Workload]:
    """All tests asked for; 0 tokens ask for none.

    Raises:
        ConfigError: nothing is left to do.
    """
    tests = []
    for depth in n_depth:
        tests += [Workload(count, 0, depth) for count in n_prompt if count]
        tests += [Workload(0, count, depth) for count in n_gen if count]
    if not tests:
        raise ConfigError("no test to run: give -p or -n a positive number of tokens")
    return tests


def context_needed(tests: Sequence[Workload]) -> int:
    """Tokens the longest test puts in the cache."""
    return max(test.n_depth + test.num_tokens for test in tests)


@contextlib.contextmanager
def prepare(
    model: str | None,
    options: LoadOptions,
    tests: Sequence[Workload],
    *,
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[SingleSequence, Setup]]:
    """Measures the machine, then loads the model with a context as long as the longest test.

    Args:
        options: its ``max_model_len`` is replaced; ``max_num_batched_tokens`` is the chunk of prompts.

    Raises:
        CapacityError: the longest test exceeds the context the model was made for.
        HybridError: whatever loading raises.
    """
    path = model_path(model)
    needed = context_needed(tests)
    with open_for_description(path) as file:
        summary = summarise(file)
        limit = file.get(f"{file.architecture}.context_length", int)
        if needed > limit:
            raise CapacityError(
                f"{path}: the longest test takes {needed} tokens, and the model was made for {limit};"
                " lower -p, -n or -d"
            )
        kind = model_type(file, summary.parameters)
    select_isa(options.isa)
    announce("measuring memory bandwidth")
    read_bandwidth = bandwidth().all_threads
    announce("loading")
    loaded = load(path, replace(options, max_model_len=max(needed, 2)), progress)
    try:
        predicted = _predict(loaded, tests, read_bandwidth, announce)
        setup = _setup(loaded, summary, kind, options, read_bandwidth, predicted)
        yield SingleSequence(loaded.engine.model, needed, options.max_num_batched_tokens), setup
    finally:
        loaded.engine.close()


def _setup(
    loaded: LoadedModel,
    summary: ModelSummary,
    kind: str,
    options: LoadOptions,
    read_bandwidth: float,
    predicted_ts: dict[str, float | None],
) -> Setup:
    dims, kv_format = loaded.header.dims, loaded.plan.size.kv_format
    return Setup(
        model_filename=str(loaded.path),
        model_type=kind,
        model_size=summary.n_bytes,
        model_n_params=summary.parameters,
        backends="+".join(device.upper() for device in loaded.plan.devices),
        isa=loaded.isa,
        n_threads=loaded.num_threads,
        numa=loaded.plan.numa,
        numa_local=None if loaded.locality is None else loaded.locality.share,
        numa_verified=None if loaded.locality is None else loaded.locality.share is not None,
        type_k=kv_format,
        n_ubatch=options.max_num_batched_tokens,
        placement_hash=loaded.plan.digest(),
        experts_per_token=loaded.experts.per_token or summary.num_experts_per_tok or None,
        expert_threshold=loaded.experts.threshold or None,
        active_bytes=round(_active_bytes(loaded, *ROLES)),
        routed_active_bytes=_active_bytes(loaded, "routed_experts"),
        kv_bytes_per_token=cache_row_bytes(dims.cache_width, kv_format) * len(dims.layers),
        read_bandwidth=read_bandwidth,
        predicted_ts=predicted_ts,
    )


def _active_bytes(loaded: LoadedModel, *roles: str) -> float:
    """Bytes of weights of these roles that a token reads, in the formats they are stored in."""
    stored = parts(loaded.header, loaded.plan)
    return sum(tensor.active_bytes(part) for tensor, part in stored if tensor.role in roles)


def _predict(
    loaded: LoadedModel,
    tests: Sequence[Workload],
    read_bandwidth: float,
    announce: Callable[[str], None],
) -> dict[str, float | None]:
    """Measures the formats stored on the CPU; tokens per second that follow for each test."""
    found, model = loaded.plan, loaded.header
    if loaded.num_threads:
        formats = dict.fromkeys(
            tensor.info.type if part.format is None else GGMLType[part.format]
            for tensor, part in parts(model, found)
            if tensor.parts and part.device == "cpu"
        )
        rates = calibrate(loaded.num_threads, read_bandwidth, formats, announce=announce)
        found = replace(found, machine=replace(found.machine, rates=rates, num_threads=loaded.num_threads))
    return {
        test.label: run_tps(found, model, n_prompt=test.n_prompt, n_gen=test.n_gen, n_depth=test.n_depth)
        for test in tests
    }


def run_tests(
    sequence: SingleSequence,
    tests: Sequence[Workload],
    setup: Setup,
    *,
    repetitions: int = 5,
    announce: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Runs each test once to warm up and ``repetitions`` times for the figures; yields its row."""
    rng = np.random.default_rng(0)
    for number, test in enumerate(tests, 1):
        title = f"test {number} of {len(tests)}, {test.label}"
        announce(f"{title}: warming up")
        _fill(sequence, test.n_depth, rng)
        _time_once(sequence, Workload(test.n_prompt, min(test.n_gen, 1), test.n_depth), rng)
        seconds, before = [], sequence.model.expert_count
        for repetition in range(repetitions):
            announce(f"{title}: run {repetition + 1} of {repetitions}")
            seconds.append(_time_once(sequence, test, rng))
        after = sequence.model.expert_count
        chosen, run = (b - a for a, b in zip(before, after, strict=True))
        yield make_row(test, setup, [test.num_tokens / s for s in seconds], run / chosen if chosen else 1.0)


def _fill(sequence: SingleSequence, length: int, rng: np.random.Generator) -> None:
    sequence.rewind()
    for _ in sequence.extend(_random_ids(sequence, length, rng)):
        pass


def _time_once(sequence: SingleSequence, test: Workload, rng: np.random.Generator) -> float:
    sequence.rewind(test.n_depth)
    ids = _random_ids(sequence, test.num_tokens, rng)
    start = time.perf_counter()
    if test.n_prompt:
        sequence.next_logits(ids)
    else:
        for index in range(test.n_gen):
            sequence.next_logits(ids[index : index + 1])
    return time.perf_counter() - start


def _random_ids(sequence: SingleSequence, count: int, rng: np.random.Generator) -> Any:
    return rng.integers(0, sequence.vocab_size, count, dtype=np.int32)


def make_row(
    test: Workload, setup: Setup, samples_ts: list[float], experts_run: float = 1.0
) -> dict[str, Any]:
    """A row of results as plain JSON values.

    ``stddev_ts`` is the sample deviation, 0 for one sample. ``predicted_ts`` is what the plan expects.
    ``experts_run`` is the share of a token's experts that its threshold left; ``active_bytes`` counts those.
    Null are the limit of prompt processing, which is not measured, and an ``expert_threshold`` that is off.
    """
    average = float(np.mean(samples_ts))
    limit = setup.read_bandwidth if test.n_gen else None
    active_bytes = round(setup.active_bytes - (1 - experts_run) * setup.routed_active_bytes)
    token_bytes = active_bytes + setup.kv_bytes_per_token * test.mean_context
    return {
        **{key: value for key, value in asdict(setup).items() if key not in _OF_ROWS},
        "active_bytes": active_bytes,
        "test": test.label,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "avg_ts": average,
        "stddev_ts": float(np.std(samples_ts, ddof=1)) if len(samples_ts) > 1 else 0.0,
        "samples_ts": samples_ts,
        "limit_kind": None if limit is None else DECODE_LIMIT,
        "limit_value": limit,
        "limit_fraction": None if limit is None else token_bytes * average / limit,
        "predicted_ts": setup.predicted_ts.get(test.label),
    }
