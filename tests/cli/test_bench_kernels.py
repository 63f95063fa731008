"""`hybrid bench-kernels`: figures of sound kernels, and none of broken ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hybrid.kernels import bench, bench_attention, cpu

from hybrid.cli.main import main
from hybrid.gguf import GGMLType, random_blocks


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench, "_ROWS", 48)
    monkeypatch.setattr(bench, "_COLS", 512)
    monkeypatch.setattr(bench, "_SECONDS", 0.0)
    monkeypatch.setattr(bench, "_LIMIT_SECONDS", 0.02)
    monkeypatch.setattr(bench, "_REGION", 32 << 20)
    monkeypatch.setattr(bench, "_BYTES", 1 << 18)
    monkeypatch.setattr(bench, "_CACHED_BYTES", 1 << 14)
    monkeypatch.setattr(bench_attention, "_CASES", ((1, 130), (3, 130)))
    monkeypatch.setattr(bench_attention, "_SECONDS", 0.0)


@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_every_row_passes_its_check(capsys, isa):
    assert main(["bench-kernels", "--isa", isa, "-t", "2", "-o", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    results, attention = printed["results"][:-2], printed["results"][-2:]
    assert [(r["name"], r["num_tokens"]) for r in attention] == [
        ("mla_attention_d129", 1),
        ("mla_attention_d127", 3),
    ]
    assert all(0 < r["error"] < 2e-3 and r["limit_fraction"] > 0 for r in attention)
    names = {cpu.kernel_name(row["ggml_type"], isa) for row in cpu.kernel_rows()}
    rows = [row["name"] for row in cpu.kernel_rows() if row["name"] in names]
    assert [r["name"] for r in results] == [name for name in rows for _ in bench.TOKENS]
    for r in results:
        limit = "read_bandwidth" if r["num_tokens"] == 1 else "int8_rate"
        rate = r["bytes_s"] if r["num_tokens"] == 1 else r["ops_s"]
        assert r["limit_fraction"] == pytest.approx(rate / printed["limits"][limit])
        assert 0 <= r["error"] < 1e-4
        assert (r["cached_bytes_s"] is None) == (r["num_tokens"] > 1)
        assert r["cached_bytes_s"] is None or r["cached_bytes_s"] > 0


def test_formats_can_be_chosen(capsys):
    assert main(["bench-kernels", "Q4_K", "Q8_0", "-t", "1"]) == 0
    out = capsys.readouterr().out
    assert "RAM is read at" in out
    assert out.count("dot_Q8_0") == out.count("dot_Q4_K") == len(bench.TOKENS)
    assert "dot_Q6_K" not in out


def test_attention_can_be_chosen_alone(capsys):
    assert main(["bench-kernels", "attention", "-t", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("mla_attention") == 2
    assert "dot_" not in out


def test_wrong_attention_gets_no_figures(monkeypatch):
    monkeypatch.setattr(bench_attention, "_ERROR", 1e-9)
    with pytest.raises(bench.KernelError, match="mla_attention with 1 tokens is wrong"):
        list(bench_attention.bench_attention(cpu.ThreadPool(1), bench.Limits(1.0, 1.0)))


def test_an_unknown_format_is_refused(capsys):
    assert main(["bench-kernels", "Q5_X"]) == 2
    assert "expected one of BF16, F16" in capsys.readouterr().err


def test_a_wrong_kernel_gets_no_figures(monkeypatch):
    multiply = bench._multiply

    def off_by_a_row(pool, matrix, x):
        return np.roll(multiply(pool, matrix, x), 1, axis=2)

    monkeypatch.setattr(bench, "_multiply", off_by_a_row)
    limits = bench.Limits(1.0, 1.0)

    def random_rows(ggml_type, rows, cols):
        return random_blocks(GGMLType(ggml_type), rows, cols, np.random.default_rng(0))

    with pytest.raises(bench.KernelError, match=r"dot_Q4_K_q8_.* with 1 tokens is wrong"):
        list(bench.bench_kernels(cpu.ThreadPool(1), limits, random_rows, formats=["Q4_K"]))


def test_the_int8_rate_is_that_of_products_done():
    before, rates = cpu.current_isa(), {}
    for isa in cpu.supported_isas():
        cpu.select_isa(isa)
        rates[isa] = cpu.measure_int8_rate(cpu.ThreadPool(1), 0.02)
    cpu.select_isa(before)
    # Products left out would pass 1e13 on a core, which no instruction set here reaches.
    assert all(1e6 < rate < 1e13 for rate in rates.values()), rates
    with pytest.raises(ValueError, match="a positive time"):
        cpu.measure_int8_rate(cpu.ThreadPool(1), 0.0)


def test_without_a_gpu_its_kernels_are_not_measured(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench-kernels", "--device", "cuda"]) == 2
    assert "needs a GPU: torch finds no CUDA device here" in capsys.readouterr().err
