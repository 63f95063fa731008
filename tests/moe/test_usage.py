"""Counting which experts tokens use: exact, in both phases, on every path, and nothing when it is off."""

from __future__ import annotations

import pytest
import torch

from hybrid.backends.cpu import CpuBackend
from hybrid.backends.fake import FakeBackend
from hybrid.cli.main import main
from hybrid.engine.load import LoadOptions, load
from hybrid.layers.moe import Router
from hybrid.sampling_params import SamplingParams

PROMPTS = {"a": [7, 11, 13], "b": [5] * 60, "c": list(range(100, 190))}
EXPERTS, PER_TOKEN, LAYERS = 16, 4, (1, 2)
MIXED = {"version": 1, "rules": [{"select": {"role": "routed_experts"}, "place": {"device": "fake:0"}}]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    assert main(["synth", "tiny", "-o", str(path)]) == 0
    return path


class Run:
    """One engine that answers the prompts."""

    def __init__(self, monkeypatch, path, *, count=True, before=False, num_seqs=3, **options):
        options = LoadOptions(max_model_len=256, max_num_seqs=num_seqs, num_threads=2, **options)
        self.engine = load(path, options).engine
        try:
            if before:
                self.generate("before", [3, 4])
            if count:
                self.engine.model.count_usage()
            self.texts = {name: self.generate(name, ids) for name, ids in PROMPTS.items()}
            self.usage = self.engine.model.usage
            steps = self.engine.model._decode_steps.values()
            self.recorded = [len(step._recording._recording) for step in steps]
        finally:
            self.engine.close()

    def generate(self, name, ids):
        self.engine.add_request(name, ids, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        found = []
        while self.engine.has_unfinished_requests():
            found += (output.sampled.token_id for output in self.engine.step())
        return found


def test_recorded_steps_count_what_python_counts(monkeypatch, tiny):
    with monkeypatch.context() as patch:
        patch.setattr(CpuBackend, "can_record", False)
        slow = Run(patch, tiny)
    fast = Run(monkeypatch, tiny)
    assert slow.recorded == [] and len(fast.recorded) == 1
    assert fast.usage == slow.usage
    assert fast.usage.tokens == {"prompt": 3 + 60 + 90, "decode": 3 * 19}
    for layer in LAYERS:
        for phase, tokens in fast.usage.tokens.items():
            assert sum(fast.usage.layers[layer][phase]) == tokens * PER_TOKEN
            assert len(fast.usage.layers[layer][phase]) == EXPERTS


def test_counts_are_the_routers_choices(monkeypatch, tiny):
    seen: dict[int, torch.Tensor] = {}
    route = Router.__call__

    def watched(self, x):
        ids, weights = route(self, x)
        counts = seen.setdefault(id(self), torch.zeros(EXPERTS, dtype=torch.int64))
        counts += torch.bincount(ids.flatten().long(), minlength=EXPERTS)
        return ids, weights

    monkeypatch.setattr(CpuBackend, "can_record", False)
    monkeypatch.setattr(Router, "__call__", watched)
    usage = Run(monkeypatch, tiny).usage
    for layer, counts in zip(LAYERS, seen.values(), strict=True):
        pairs = zip(usage.layers[layer]["prompt"], usage.layers[layer]["decode"], strict=True)
        assert counts.tolist() == [sum(pair) for pair in pairs]


def test_counting_changes_no_text_and_costs_nothing_when_off(monkeypatch, tiny):
    off, on = (Run(monkeypatch, tiny, count=count) for count in (False, True))
    assert on.texts == off.texts
    assert off.usage.layers == {}
    assert on.recorded == [off.recorded[0] + len(LAYERS)]  # an operation a layer, and none before


def test_counting_may_begin_late(monkeypatch, tiny):
    """Steps recorded before are recorded anew."""
    assert Run(monkeypatch, tiny, before=True).usage == Run(monkeypatch, tiny).usage


def test_mixed_placements_count_the_same(monkeypatch, tiny):
    found, expected = Run(monkeypatch, tiny, rules=MIXED), Run(monkeypatch, tiny)
    assert found.recorded == []
    assert found.usage.tokens == expected.usage.tokens
    assert {layer: sum(c["decode"]) for layer, c in found.usage.layers.items()} == dict.fromkeys(LAYERS, 228)


GPU = {
    "version": 1,
    "rules": [
        {"select": {"role": "routed_experts"}, "place": {"device": "cpu"}},
        {"select": {"name": "*"}, "place": {"device": "fakegpu:0"}},
    ],
}


def test_streams_and_graphs_count_every_use(tiny):
    """Three texts at once are two lanes of streams, whose steps are captured."""
    options = LoadOptions(max_model_len=256, max_num_seqs=3, num_threads=2, rules=GPU)
    engine = load(tiny, options).engine
    try:
        engine.model.count_usage()
        for name, ids in PROMPTS.items():
            engine.add_request(name, ids, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()
        usage = engine.model.usage
    finally:
        engine.close()
    assert usage.tokens == {"prompt": 153, "decode": 57}
    for layer in LAYERS:
        assert {phase: sum(counts) for phase, counts in usage.layers[layer].items()} == {
            phase: tokens * PER_TOKEN for phase, tokens in usage.tokens.items()
        }


def test_dropped_experts_are_not_counted(monkeypatch, tiny):
    usage = Run(monkeypatch, tiny, expert_threshold=0.9).usage
    for layer in LAYERS:
        assert 0 < sum(usage.layers[layer]["decode"]) < usage.tokens["decode"] * PER_TOKEN


@pytest.mark.parametrize("backend", [CpuBackend, FakeBackend])
def test_ids_of_minus_one_count_nowhere(backend):
    counts = torch.tensor([5, 0, 0], dtype=torch.int64)
    backend().count_experts(torch.tensor([[0, -1], [2, 0]], dtype=torch.int32), counts)
    assert counts.tolist() == [7, 0, 1]


def test_the_kernel_refuses_ids_of_other_layers():
    counts = torch.zeros(3, dtype=torch.int64)
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=f"id {wrong} at position 1 is none of 3 experts"):
            CpuBackend(1).count_experts(torch.tensor([[0, wrong]], dtype=torch.int32), counts)
    assert counts.tolist() == [0, 0, 0]
