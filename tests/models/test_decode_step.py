"""Decode steps that are recorded once: the bits of steps that Python runs."""

from __future__ import annotations

import pytest
import torch

from hybrid import LLM, SamplingParams
from hybrid.cli.main import main
from hybrid.engine.load import LoadOptions, load
from hybrid.kvcache.blocks import AttentionBatch
from hybrid.models.deepseek2 import DeepseekForCausalLM

PROMPTS = [{"prompt_token_ids": ids} for ids in ([7, 11, 13], [5] * 60, list(range(100, 190)))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    assert main(["synth", "tiny", "-o", str(path)]) == 0
    return path


def generate(path, prompts, max_num_seqs=1):
    # 80 tokens: every prompt crosses a border of cache blocks on the way.
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, logprobs=-1)
    with LLM(path, max_model_len=256, max_num_seqs=max_num_seqs, num_threads=2) as llm:
        return llm.generate(prompts, params, use_tqdm=False)


def by_python(monkeypatch, path, prompts):
    with monkeypatch.context() as patch:
        patch.setattr("hybrid.backends.cpu.CpuBackend.can_record", False)
        return generate(path, prompts)


@pytest.mark.parametrize("together", [False, True])
def test_recorded_steps_have_the_bits_of_steps_run_by_python(monkeypatch, tiny, together):
    expected = by_python(monkeypatch, tiny, PROMPTS)
    found = generate(tiny, PROMPTS, max_num_seqs=3 if together else 1)
    for a, b in zip(found, expected, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        for x, y in zip(a.outputs[0].logprobs, b.outputs[0].logprobs, strict=True):
            assert (x.row == y.row).all()


def test_python_runs_the_prompt_and_one_step(monkeypatch, tiny):
    counts: list[int] = []
    forward = DeepseekForCausalLM.forward_layers

    def counting(self, token_ids, batch):
        counts.append(len(token_ids))
        return forward(self, token_ids, batch)

    monkeypatch.setattr(DeepseekForCausalLM, "forward_layers", counting)
    generate(tiny, PROMPTS[:1])
    assert counts == [3, 1]


def test_an_interrupted_recording_is_made_again(monkeypatch, tiny):
    expected = generate(tiny, PROMPTS[:1])[0].outputs[0].token_ids
    compute_logits = DeepseekForCausalLM.compute_logits
    fail = iter([False, True])

    def interrupted(self, hidden_states):
        if next(fail, False):
            raise KeyboardInterrupt
        return compute_logits(self, hidden_states)

    monkeypatch.setattr(DeepseekForCausalLM, "compute_logits", interrupted)
    engine = load(tiny, LoadOptions(max_model_len=256, num_threads=2)).engine
    try:
        params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
        engine.add_request("a", PROMPTS[0]["prompt_token_ids"], params)
        found = []
        interrupted = 0
        while engine.has_unfinished_requests():
            try:
                found += (output.sampled.token_id for output in engine.step())
            except KeyboardInterrupt:
                interrupted += 1
        assert (interrupted, found) == (1, expected)
    finally:
        engine.close()


def test_logits_are_the_callers_own(open_model, tiny):
    model = open_model(tiny).model
    model.allocate_cache(1)

    def decode(position: int) -> torch.Tensor:
        here, length = torch.tensor([position], dtype=torch.int32), torch.tensor([position + 1]).int()
        starts, table = torch.tensor([0, 1]).int(), torch.zeros(1, 1, dtype=torch.int32)
        return model.decode(
            torch.tensor([position + 5]).int(), AttentionBatch(here, here, starts, length, table)
        )

    with torch.inference_mode():
        first = decode(0)
        kept = first.clone()
        second = decode(1)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
