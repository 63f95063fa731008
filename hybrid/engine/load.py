"""From a model's name to an engine that runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid import env
from hybrid.chat import ChatTemplate
from hybrid.config import DEFAULT_MAX_MODEL_LEN, EngineConfig, KVFormat, model_path
from hybrid.engine.engine import Engine
from hybrid.errors import ConfigError, HybridError
from hybrid.gguf import GGUFFile
from hybrid.kernels import cpu
from hybrid.models.loader import load_model
from hybrid.placement.planner import Plan, plan
from hybrid.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadOptions:
    """Options of `load`; `LLM` documents them."""

    rules: str | Path | dict[str, Any] = "auto"
    max_model_len: int | None = None
    num_threads: int | None = None
    isa: str | None = None
    kv_format: KVFormat = "f16"
    seed: int = 0
    max_num_seqs: int = 1
    max_num_batched_tokens: int = 512


@dataclass(frozen=True)
class LoadedModel:
    """Everything that answers requests. ``chat_template`` is an error if there is no usable one."""

    path: Path
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | HybridError
    plan: Plan
    isa: str
    num_threads: int


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
    path = model_path(model)
    isa = select_isa(options.isa)
    num_threads = options.num_threads or env.get("HYBRID_THREADS")
    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
        config = engine_config(options, context_length(file))
        placements = plan(file, options.rules)
        loaded = load_model(
            file,
            plan=placements,
            max_model_len=config.max_model_len,
            num_threads=num_threads,
            kv_format=options.kv_format,
            progress=progress,
        )
        with contextlib.ExitStack() as undo:
            undo.callback(loaded.close)
            tokenizer.check_embedding(loaded.config.vocab_size)
            engine = Engine(loaded, config, end_token_ids=tokenizer.stop_ids)
            template = chat_template(file, tokenizer)
            undo.pop_all()
    return LoadedModel(path, engine, tokenizer, template, placements, isa, loaded.num_threads)


def select_isa(name: str | None) -> str:
    """Make ``name``, ``HYBRID_ISA`` or the best of the host the ISA of this process.

    Raises:
        ConfigError: the host does not support it.
    """
    name = name or env.get("HYBRID_ISA")
    try:
        return cpu.select_isa(name)
    except ValueError as error:
        raise ConfigError(f"isa: {error}") from None


def context_length(file: GGUFFile) -> int:
    """Tokens the model was made for."""
    return int(file.get(f"{file.architecture}.context_length", int))


def engine_config(options: LoadOptions, limit: int) -> EngineConfig:
    """Sizes of the engine for a model made for ``limit`` tokens.

    Raises:
        ConfigError: an option is out of range.
    """
    length = min(limit, DEFAULT_MAX_MODEL_LEN) if options.max_model_len is None else options.max_model_len
    config = EngineConfig(
        max_model_len=length or limit,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        seed=options.seed,
    )
    if config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len (-c): expected at most the {limit} tokens the model was made for, "
            f"found {config.max_model_len}"
        )
    return config


def chat_template(file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate | HybridError:
    """The template in the file, or why it cannot be used: the model still writes text without."""
    try:
        return ChatTemplate.from_gguf(file.metadata, tokenizer)
    except HybridError as error:
        return error
