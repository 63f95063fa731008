"""From a model's name to an engine that runs it."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

from hybrid import env
from hybrid.backends.isa import select_isa
from hybrid.backends.locality import Locality
from hybrid.calibration import this_machine
from hybrid.chat import ChatTemplate
from hybrid.config import KV_FORMATS, EngineConfig, ExpertUse, KVFormat, model_path
from hybrid.engine.engine import Engine, check_context
from hybrid.engine.guidance import Guidance
from hybrid.errors import ConfigError
from hybrid.gguf import GGUFFile
from hybrid.log import get_logger
from hybrid.models.loader import load_model
from hybrid.models.registry import family_of
from hybrid.placement.capabilities import kind_of
from hybrid.placement.machine import Machine
from hybrid.placement.memory import Model, RunSize
from hybrid.placement.numa import check_mode
from hybrid.placement.planner import Plan, Planner
from hybrid.placement.rules import Rules, RuleSet
from hybrid.placement.settings import context_of, kv_format_of
from hybrid.tokenizer import Tokenizer
from hybrid.trace import Trace

logger = get_logger(__name__)


class ModelOptions(TypedDict, total=False):
    """Keywords of `LLM` and `AsyncLLM`, with the defaults of `LoadOptions`; `LLM` documents them."""

    num_threads: int | None
    isa: str | None
    kv_format: KVFormat | None
    seed: int
    max_num_seqs: int
    max_num_batched_tokens: int
    ram_bytes: int | None
    fit: bool
    experts_per_token: int | None
    expert_threshold: float | None
    kv_cache_tokens: int | None
    numa: str
    packed_cache: str | Path | None
    cuda_graph: bool
    trace: str | Path | None
    vram_bytes: Mapping[str, int] | None


@dataclass(frozen=True)
class LoadOptions:
    """Options of `load`; `LLM` documents them.

    Raises:
        ConfigError: a value is of the wrong type or unknown.
    """

    rules: Rules = "auto"
    max_model_len: int | None = None
    num_threads: int | None = None
    isa: str | None = None
    kv_format: KVFormat | None = None
    seed: int = 0
    max_num_seqs: int = 1
    max_num_batched_tokens: int = 512
    ram_bytes: int | None = None
    fit: bool = False
    experts_per_token: int | None = None
    expert_threshold: float | None = None
    kv_cache_tokens: int | None = None
    numa: str = "auto"
    packed_cache: str | Path | None = None
    cuda_graph: bool = True
    trace: str | Path | None = None
    vram_bytes: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.kv_format not in (None, *KV_FORMATS):
            raise ConfigError(f"kv_format: expected {', '.join(KV_FORMATS)}, found {self.kv_format!r}")
        if self.num_threads is not None and (type(self.num_threads) is not int or self.num_threads < 1):
            raise ConfigError(f"num_threads: expected an integer >= 1, found {self.num_threads!r}")
        if self.ram_bytes is not None and (type(self.ram_bytes) is not int or self.ram_bytes < 1):
            raise ConfigError(f"ram_bytes: expected a number of bytes, found {self.ram_bytes!r}")
        for device, n_bytes in (self.vram_bytes or {}).items():
            if kind_of(device) != "cuda" or type(n_bytes) is not int or n_bytes < 1:
                raise ConfigError(f"vram_bytes: expected bytes of cuda:N, found {n_bytes!r} of {device!r}")
        if type(self.cuda_graph) is not bool:
            raise ConfigError(f"cuda_graph: expected True or False, found {self.cuda_graph!r}")
        ExpertUse(self.experts_per_token, self.expert_threshold)
        check_mode(self.numa, "numa")


Init = TypeVar("Init", bound=Callable[..., None])


def shows_model_options(init: Init) -> Init:
    """Let the signature of an ``__init__`` with ``**options: Unpack[ModelOptions]`` list them one by one."""
    own = inspect.signature(init)
    given = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = {p.name for p in given}
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(LoadOptions)
        if f.name not in names
    ]
    first = [p for p in given if p.kind is not p.KEYWORD_ONLY]
    rest = [p for p in given if p.kind is p.KEYWORD_ONLY]
    init.__signature__ = own.replace(parameters=[*first, *options, *rest])  # type: ignore[attr-defined]
    return init


@dataclass(frozen=True)
class LoadedModel:
    """Everything that answers requests. ``header`` is what planning knows of the file."""

    path: Path
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    plan: Plan
    header: Model
    isa: str
    num_threads: int
    experts: ExpertUse
    locality: Locality | None = None
    trace: Trace | None = None

    def describe(self) -> str:
        """One line: what runs where, with which kernels, threads and context."""
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        cpu = f"ISA {self.isa}, {threads}, " if self.num_threads else ""
        use = self.experts
        reduced = "" if use.per_token is None else f", experts per token {use.per_token}"
        reduced += f", expert threshold {use.threshold:g}" if use.threshold else ""
        local = "" if self.locality is None else f", {self.locality}"
        nodes = f"NUMA {self.plan.numa} ({self.plan.numa_reason}{local}), "
        cpu += nodes if self.plan.machine.num_nodes > 1 else ""
        context = self.engine.config.max_model_len
        return f"{self.path.name}: {self.plan.one_line()}; {cpu}context {context}{reduced}"


def load(
    model: str | Path | None, options: LoadOptions, progress: Callable[[int, int], None] | None = None
) -> LoadedModel:
    """Open, plan, read. ``progress`` gets the bytes read so far and in all.

    Raises:
        GGUFError, ModelError, TokenizerError: the file is not a model this build can run.
        ConfigError: an option is invalid.
        PlacementError, CapacityError: the rules are wrong, or the model does not fit.
        OSError: the file cannot be read.
    """
    _check_process()
    path = model_path(model)
    trace = None if options.trace is None else Trace(options.trace)
    isa = select_isa(options.isa)
    num_threads = options.num_threads or env.get("HYBRID_THREADS")
    with GGUFFile.open(path) as file:
        hparams = family_of(file).read_config(file)
        tokenizer = Tokenizer.from_gguf(file)
        tokenizer.check_embedding(hparams.vocab_size)
        planner = _planner(file, options, this_machine(num_threads, isa))
        config = engine_config(options, hparams.max_position_embeddings, planner.rule_set)
        placements = _plan(planner, options, config)
        config = replace(
            config,
            max_model_len=placements.size.max_model_len,
            max_num_batched_tokens=placements.size.max_num_batched_tokens,
            kv_cache_tokens=placements.size.cache_tokens,
        )
        loaded = load_model(
            file,
            plan=placements,
            max_model_len=config.max_model_len,
            num_threads=num_threads,
            kv_format=cast(KVFormat, placements.size.kv_format),
            progress=progress,
            config=_with_experts(hparams, planner.experts),
            packed_cache=None if options.packed_cache is None else Path(options.packed_cache),
            use_graphs=options.cuda_graph,
            trace=trace,
        )
        with contextlib.ExitStack() as undo:
            undo.callback(loaded.close)
            engine = Engine(
                loaded, config, end_token_ids=tokenizer.stop_ids, constraint_factory=Guidance(tokenizer)
            )
            loaded.warm_up()
            template = ChatTemplate.from_gguf(file, tokenizer)
            undo.pop_all()
    return LoadedModel(
        path, engine, tokenizer, template, placements, planner.model, isa, loaded.num_threads,
        planner.experts, loaded.locality, trace,
    )  # fmt: skip


_loading_process: int | None = None  # the process that loaded a model first


def _check_process() -> None:
    """Raise `ConfigError` in a child of a process that has loaded a model: after a fork torch hangs."""
    global _loading_process
    if _loading_process not in (None, os.getpid()):
        raise ConfigError(
            "this process was forked from one that has loaded a model, whose threads are missing here; "
            'start it with multiprocessing.get_context("spawn")'
        )
    _loading_process = os.getpid()


def _planner(file: GGUFFile, options: LoadOptions, machine: Machine) -> Planner:
    if options.ram_bytes is not None:
        machine = machine.with_budget("cpu", options.ram_bytes)
    for device, n_bytes in (options.vram_bytes or {}).items():
        machine = machine.with_budget(device, n_bytes)
    experts = ExpertUse(options.experts_per_token, options.expert_threshold)
    return Planner(file, options.rules, machine, experts, options.numa)


def _plan(planner: Planner, options: LoadOptions, config: EngineConfig) -> Plan:
    size = RunSize(
        config.max_model_len,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        kv_format_of(options.kv_format, planner.rule_set),
        options.kv_cache_tokens,
    )
    planned = planner.plan(size, fit=options.fit)
    for warning in planned.warnings:
        logger.warning("%s", warning)
    return planned


def _with_experts(hparams: Any, use: ExpertUse) -> Any:
    """The hyper-parameters of a family with a reduced router."""
    router = hparams.router
    router = replace(
        router,
        num_experts_per_tok=use.per_token or router.num_experts_per_tok,
        expert_threshold=use.threshold or 0.0,
    )
    return replace(hparams, router=router)


def engine_config(options: LoadOptions, limit: int, rule_set: RuleSet | None = None) -> EngineConfig:
    """Sizes of the engine for a model made for ``limit`` tokens, as options and rules have them.

    Raises:
        ConfigError: an option is out of range.
    """
    config = EngineConfig(
        max_model_len=context_of(options.max_model_len, rule_set, limit),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        seed=options.seed,
        kv_cache_tokens=options.kv_cache_tokens,
    )
    check_context(config, limit)
    return config
