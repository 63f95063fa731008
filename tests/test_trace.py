"""Traces: the figures of steps, the file, and what runs put there."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest

from hybrid import LLM, SamplingParams
from hybrid import trace as trace_module
from hybrid.cli.main import main
from hybrid.trace import Span, Trace, step_figures

MS = 1_000_000


def span(kind, start, end, track="t"):
    return Span(track, "x", kind, start * MS, end * MS)


def test_figures_of_steps():
    spans = [
        span("step", 0, 10),
        span("device", 1, 4),
        span("device", 2, 5, "other stream"),
        span("cpu", 4, 7),
        span("wait", 0, 10),
        span("step", 20, 30),
        span("device", 19, 22),  # begun before the step
        span("cpu", 28, 35),
    ]
    figures = step_figures(spans)
    assert figures is not None
    assert figures.num_steps == 2
    found = dataclasses.astuple(figures)[1:]
    assert found == pytest.approx((10e-3, 2.5e-3, 3e-3, 0.5e-3, 2e-3, 5e-3))
    assert str(figures).startswith("2 decode steps of 10.000 ms: experts on the CPU 2.500 ms (2.000 ms of it")
    assert step_figures(spans[1:5]) is None
    assert str(step_figures([span("step", 0, 10)])) == "1 decode steps of 10.000 ms"  # all on the CPU


def test_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_module, "MAX_SPANS", 2)
    trace = Trace(tmp_path / "trace.json")
    for number in range(3):
        trace.add(Span("engine", f'a "name" {number}', "step", 5 * MS + number, 7 * MS))
    trace.write()
    content = json.loads((tmp_path / "trace.json").read_text())
    assert content["otherData"]["dropped_spans"] == 1
    assert content["otherData"]["steps"]["num_steps"] == 2
    names, first, second = content["traceEvents"]
    assert (names["ph"], names["args"]) == ("M", {"name": "engine"})
    assert first == {
        "ph": "X", "pid": 1, "tid": names["tid"], "name": 'a "name" 0', "cat": "step", "ts": 0.0,
        "dur": 2000.0,
    }  # fmt: skip
    assert second["ts"] == 0.001


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    with pytest.raises(OSError, match="no-such-folder"):
        LLM(trace=tmp_path / "no-such-folder" / "trace.json")


RULES = {
    "version": 1,
    "rules": [
        {"select": {"role": "routed_experts"}, "place": {"device": "cpu"}},
        {"select": {"name": "*"}, "place": {"device": "fakegpu:0"}},
    ],
}


@pytest.mark.parametrize("rules", ["auto", RULES])
def test_what_runs_is_there(tmp_path, rules):
    path = tmp_path / "trace.json"
    began = time.perf_counter_ns()
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    with LLM(rules=rules, max_model_len=256, num_threads=2, trace=path) as llm:
        llm.generate(["Once upon a time"], params, use_tqdm=False)
        figures = llm.step_figures()
        header = llm.plan()
    took_s = (time.perf_counter_ns() - began) * 1e-9
    assert figures is not None
    assert figures.num_steps == 5
    assert 0 < figures.step_s < took_s
    content = json.loads(path.read_text())
    tracks = {e["tid"]: e["args"]["name"] for e in content["traceEvents"] if e["ph"] == "M"}
    spans = [e for e in content["traceEvents"] if e["ph"] == "X"]
    named = {(tracks[e["tid"]], e["name"]) for e in spans}
    assert ("engine", "decode step of 1") in named
    assert all(e["dur"] >= 0 and e["ts"] + e["dur"] <= took_s * 1e6 for e in spans)
    if rules == "auto":
        assert set(tracks.values()) == {"engine"}
        return
    assert set(tracks.values()) == {"engine", "fakegpu:0 main", "fakegpu:0 a", "cpu experts"}
    assert {("fakegpu:0 a", "mla_attention"), ("fakegpu:0 a", "experts are computed")} <= named
    experts = [e for e in spans if tracks[e["tid"]] == "cpu experts"]
    layers = {e["name"] for e in experts}
    assert len(experts) == 5 * len(layers)
    assert len(layers) == sum("ffn_down_exps" in name for name in header.placements)
    assert figures.cpu_s > 0
    assert figures.device_s > 0
    assert figures.exposed_cpu_s <= figures.cpu_s
    assert figures.idle_s >= 0


def test_run_prints_the_figures(tmp_path, capsys):
    path = tmp_path / "trace.json"
    assert main(["run", "-n", "4", "--ignore-eos", "--trace", str(path), "Once"]) == 0
    assert f"{path}: 3 decode steps of " in capsys.readouterr().err
    assert json.loads(path.read_text())["otherData"]["steps"]["num_steps"] == 3


def test_no_cuda_graph_gives_the_same_tokens(tmp_path):
    def tokens(cuda_graph: bool) -> list[list[int]]:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        with LLM(rules=RULES, max_model_len=128, max_num_seqs=3, num_threads=2, cuda_graph=cuda_graph) as llm:
            prompts = ["Once upon a time", "The little dog", "One day"]
            return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]

    assert tokens(True) == tokens(False)
