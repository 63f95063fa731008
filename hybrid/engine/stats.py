"""Counts of an engine's work since it was made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """One look at an engine. ``_total`` counts only grow; seconds are wall-clock time of the engine's thread.

    Attributes:
        kv_cache_usage: share of the cache's blocks that running requests hold; 0 to 1.
        kv_cache_tokens: tokens the cache has room for.
        prefix_cache_queries: prompt tokens looked up in the prefix cache.
        prefix_cache_hits: of those, the ones found there.
        prompt_tokens_total: tokens of the prompts accepted, whether computed or found in the prefix cache.
        expert_cache_uses_total: uses of routed experts that may have copies on a device; ``None``: without
            such a cache, as the next three.
        expert_cache_hits_total: of those, the ones that found a copy.
        expert_cache_copies_total: experts copied, those at the start included.
        h2d_bytes_total: bytes uploaded for it.
        expert_cpu_seconds_total: time of routed experts on the CPU; ``None`` where it is not measured.
    """

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    kv_cache_tokens: int
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    num_preemptions_total: int = 0
    prompt_steps_total: int = 0
    prompt_seconds_total: float = 0.0
    decode_steps_total: int = 0
    decode_seconds_total: float = 0.0
    expert_cpu_seconds_total: float | None = None
    expert_cache_uses_total: int | None = None
    expert_cache_hits_total: int | None = None
    expert_cache_copies_total: int | None = None
    h2d_bytes_total: int | None = None


@dataclass
class Counters:
    """What `EngineStats` reports of the past; fields are named as there."""

    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    num_preemptions_total: int = 0
    prompt_steps_total: int = 0
    prompt_seconds_total: float = 0.0
    decode_steps_total: int = 0
    decode_seconds_total: float = 0.0
