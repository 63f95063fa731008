"""The load generator: what it counts, and what it does not do."""

from __future__ import annotations

import asyncio
import json
import os
import random

import pytest

from hybrid.bench_serve.client import check_loopback
from hybrid.bench_serve.load import measure, percentiles
from hybrid.bench_serve.memory import ProcessSample, slope
from hybrid.bench_serve.options import Lengths, LoadOptions
from hybrid.cli.main import main
from hybrid.errors import ConfigError


def test_lengths():
    generator = random.Random(0)
    assert Lengths("7").draw(generator) == 7
    uniform = [Lengths("3-9").draw(generator) for _ in range(500)]
    assert (min(uniform), max(uniform)) == (3, 9)
    normal = [Lengths("normal:100,10").draw(generator) for _ in range(500)]
    assert 98 < sum(normal) / 500 < 102
    assert min(Lengths("normal:1,50").draw(generator) for _ in range(100)) == 1


@pytest.mark.parametrize("text", ["", "0", "9-3", "-5", "many", "normal:5", "99999999", "1-9999999"])
def test_lengths_that_are_none(text):
    with pytest.raises(ConfigError, match="LOW-HIGH"):
        Lengths(text)


def test_percentiles():
    values = [index / 1000 for index in range(1, 101)]
    assert percentiles(values) == {"mean": 50.5, "p50": 50, "p90": 90, "p99": 99}
    assert percentiles([None, 0.5]) == {"mean": 500, "p50": 500, "p90": 500, "p99": 500}
    assert percentiles([]) is None


def run(server, **options):
    options = {"num_clients": 4, "num_requests": 12, **options}
    return asyncio.run(measure(LoadOptions(url=server.url, **options)))


@pytest.fixture
def mock(serve, monkeypatch):
    """A server whose model card has what prompts are made from."""

    def start(**script):
        server = serve(**script)
        server.context.card.meta.update(n_vocab=4096, n_ctx=8000)
        return server

    return start


def test_what_it_counts(mock):
    server = mock(pieces=["a"] * 10, prefill_s=0.1, step_s=0.02, num_cached_tokens=3)
    lengths = {"prompt_tokens": Lengths("5-9"), "output_tokens": Lengths("4"), "shared_prefix": 10}
    summary = run(server, **lengths).summary()
    assert (summary["requests"], summary["answered"], summary["errors"]) == (12, 12, {})
    assert summary["output_tokens"] == 48
    assert summary["cached_tokens"] == 36
    assert summary["output_tokens_per_second"] == pytest.approx(48 / summary["duration_s"], rel=0.01)
    assert summary["ttft_ms"]["p50"] >= 100
    assert summary["inter_token_ms"]["p50"] >= 15
    assert summary["total_ms"]["p50"] >= 180
    lengths = [len(ids) for ids, _ in server.engine.requests]
    assert sum(lengths) == summary["prompt_tokens"]
    assert all(15 <= length <= 19 for length in lengths)
    assert len({tuple(ids[:10]) for ids, _ in server.engine.requests}) == 1
    assert len({tuple(ids[10:]) for ids, _ in server.engine.requests}) == 12
    assert all((p.min_tokens, p.max_tokens, p.ignore_eos) == (4, 4, True) for _, p in server.engine.requests)


def test_never_more_clients_than_asked_for(mock):
    server = mock(step_s=0.02, max_num_seqs=3, max_queue=0)
    assert run(server, num_clients=3).summary()["answered"] == 12


def test_failures_are_counted_by_kind(mock):
    server = mock(pieces=["a"] * 5, step_s=0.02, max_num_seqs=1, max_queue=1)
    summary = run(server, num_clients=12).summary()
    assert summary["errors"] == {"HTTP 429": 10}
    assert summary["answered"] == 2
    assert run(mock(fail_at={1: ValueError()}), num_requests=2).summary()["errors"] == {"server_error": 2}
    assert run(mock(step_s=5), num_requests=1, request_timeout_s=0.3).summary()["errors"] == {"timeout": 1}


def test_a_rate_spreads_the_requests(mock):
    result = run(mock(), num_clients=12, rate=40.0)
    assert result.duration_s > 0.1


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000", "https://127.0.0.1", "127.0.0.1:8000", "http://["])
def test_addresses_it_does_not_take(url, capsys):
    assert main(["bench-serve", "--url", url]) == 2
    assert "--url" in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys):
    assert main(["bench-serve", "--url", "http://127.0.0.1:9"]) == 1
    assert "is `hybrid serve` running?" in capsys.readouterr().err


def test_the_command(mock, capsys):
    server = mock()
    arguments = ["bench-serve", "--url", server.url, "--requests", "4", "--clients", "2", "-n", "3"]
    assert main([*arguments, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 4
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 of 4 requests answered")
    assert "| first token " in printed


def test_loopback_names():
    check_loopback("http://localhost:8000")
    check_loopback("http://[::1]:8000/base")


def test_a_duration_instead_of_a_number(mock):
    server = mock(pieces=["a"] * 5, step_s=0.02)
    result = run(server, num_clients=2, duration_s=0.5)
    summary = result.summary()
    assert 0.4 < result.duration_s < 2
    assert 4 <= summary["answered"] == summary["requests"]


def lines(noise, per_second):
    generator = random.Random(1)
    return [
        ProcessSample(10.0 * i, round(1e8 + 10.0 * i * per_second + generator.gauss(0, noise)), 5, 5)
        for i in range(180)
    ]


def test_a_slope_is_found_with_its_error():
    grows = slope(lines(20_000, 1000.0))
    assert abs(grows.bytes_per_second - 1000) < 3 * grows.standard_error < 100
    still = slope(lines(20_000, 0.0))
    assert abs(still.bytes_per_second) < 3 * still.standard_error
    assert slope([]) is None
    steps = [ProcessSample(10.0 * i, 10**8 + (i // 30 % 2) * 10**6, 5, 5) for i in range(180)]
    found = slope(steps)
    alone = slope(lines(500_000, 0.0))  # as large, each sample for itself
    assert abs(found.bytes_per_second) < 2 * found.standard_error
    assert found.standard_error > 3 * alone.standard_error


def test_watching_a_process(mock, capsys):
    server = mock(pieces=["a"] * 5, step_s=0.02)
    arguments = ["bench-serve", "--url", server.url, "--duration", "0.6", "--clients", "2", "-n", "3"]
    assert main([*arguments, "--watch", str(os.getpid()), "--watch-interval", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "KiB a minute (standard error)" in printed
    assert main([*arguments, "--watch", "4194304"]) == 2
    assert "--watch: process 4194304" in capsys.readouterr().err


def test_a_long_prompt_beside_streams(mock, capsys):
    server = mock(pieces=["a"] * 4000, step_s=0.01, prefill_s=0.2, max_model_len=8000)
    arguments = ["bench-serve", "--url", server.url, "--clients", "3", "-p", "5", "--long-prompt", "50"]
    assert main([*arguments, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["streams"], found["long_prompt"]) == (3, 50)
    assert 8 < found["usual_gap_ms"] <= found["usual_largest_gap_ms"]
    assert found["gaps"] >= 3
    assert found["largest_gaps_ms"][0] >= found["gap_ms"]["p99"] >= found["gap_ms"]["p50"]
    assert 0.3 < found["prefill_share"] < 3  # the mock computes prompts beside streams
    assert main(arguments) == 0
    assert "x the median alone" in capsys.readouterr().out
