"""Prometheus metrics: vLLM's names under our prefix, read from the engine when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hybrid.server.engine_api import Stats
from hybrid.server.record import Record

PREFIX = "hybrid:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_GAP_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48)
_FIRST_TOKEN_BUCKETS = (0.01, 0.04, 0.16, *(0.32 * 2**power for power in range(14)))  # to 2,621 s
_REQUEST_BUCKETS = (*_FIRST_TOKEN_BUCKETS[1:], 10485.76)

# Name of the metric, attribute of the statistics, what it says.
_GAUGES = (
    ("num_requests_running", "num_requests_running", "Requests that are computed."),
    ("num_requests_waiting", "num_requests_waiting", "Requests that wait."),
    ("kv_cache_usage_perc", "kv_cache_usage", "Share of the cache in use, 0 to 1."),
)
_COUNTERS = (
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked for in the prefix cache."),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found there."),
    ("prompt_tokens", "prompt_tokens_total", "Prompt tokens computed."),
    ("generation_tokens", "generation_tokens_total", "Tokens written."),
    ("num_preemptions", "num_preemptions_total", "Requests put back to make room."),
    ("prompt_steps", "prompt_steps_total", "Steps with prompt tokens."),
    ("prompt_seconds", "prompt_seconds_total", "Time of those steps."),
    ("decode_steps", "decode_steps_total", "Steps without."),
    ("decode_seconds", "decode_seconds_total", "Time of those steps."),
    ("expert_cpu_seconds", "expert_cpu_seconds_total", "Time of the CPU's experts."),
    ("expert_cache_uses", "expert_cache_uses_total", "Uses of experts that the device's cache may hold."),
    ("expert_cache_hits", "expert_cache_hits_total", "Experts found in the device's cache."),
    ("expert_cache_copies", "expert_cache_copies_total", "Experts copied to the device's cache."),
    ("h2d_bytes", "h2d_bytes_total", "Bytes copied to devices."),
    ("dram_read_bytes", "dram_read_bytes_total", "Weight bytes read from RAM."),
)


class ServerMetrics:
    """``stats`` gives the engine's, or ``None`` while there is no engine."""

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats))
        self._success = self._counter("request_success", "Requests answered.", ("finished_reason",))
        self._errors = self._counter("request_errors", "Requests not answered.", ("reason",))
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_BUCKETS
        )
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens.", _GAP_BUCKETS)
        self._total = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_BUCKETS
        )
        self._queue = self._histogram("request_queue_time_seconds", "Waiting.", _FIRST_TOKEN_BUCKETS)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Computing the prompt.", _FIRST_TOKEN_BUCKETS
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", _REQUEST_BUCKETS
        )
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS
        )
        self._generated = self._histogram(
            "request_generation_tokens", "Tokens written for a request.", _TOKEN_BUCKETS
        )

    def finished(self, record: Record, total_s: float) -> None:
        """Count a request that was answered in full."""
        for reason in record.finish_reasons:
            self._success.labels(reason).inc()
        self._total.observe(total_s)
        self._prompt_tokens.observe(record.num_prompt_tokens)
        self._generated.observe(record.generated_tokens)
        for histogram, seconds in (
            (self._queue, record.queue_s),
            (self._prefill, record.prompt_s),
            (self._decode, record.generation_s),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def gap(self, seconds: float, num_tokens: int) -> None:
        """A pause of ``seconds`` before ``num_tokens`` that came together."""
        for _ in range(num_tokens):
            self._gap.observe(seconds / num_tokens)

    def failed(self, reason: str) -> None:
        """Count a request that was refused, failed or given up."""
        self._errors.labels(reason).inc()

    def text(self) -> bytes:
        """All metrics as Prometheus reads them."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"{PREFIX}{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}{name}", help, buckets=buckets, registry=self.registry)


class _EngineCollector:
    """What the engine counts by itself. What an engine does not count is left out."""

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        for name, attribute, help in _GAUGES:
            if getattr(stats, attribute, None) is not None:
                yield GaugeMetricFamily(f"{PREFIX}{name}", help, getattr(stats, attribute))
        for name, attribute, help in _COUNTERS:
            if getattr(stats, attribute, None) is not None:
                yield CounterMetricFamily(f"{PREFIX}{name}", help, getattr(stats, attribute))

    def describe(self) -> list[Metric]:
        return []
