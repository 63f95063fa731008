"""Training in small, export, and the file that ships."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid import LLM, SamplingParams
from hybrid.config import model_path
from hybrid.gguf import GGUFFile, dequantize


def test_train_export_and_run(part: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = replace(part("model").DemoConfig(), vocab_size=512, num_hidden_layers=2, n_routed_experts=4)
    documents = list(itertools.islice(part("corpus").documents(seed=1), 60))
    tokenizer = part("vocabulary").train_vocabulary((d.text for d in documents), config.vocab_size)
    ids = np.fromiter(part("vocabulary").token_stream(tokenizer, documents, 10_000), dtype=np.uint16)
    model = part("model").DemoModel(config)
    before = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    settings = part("train").TrainConfig(minutes=5, max_steps=2, batch=2, length=64)
    part("train").train(model, ids, settings, tmp_path / "checkpoint.pt")
    assert not torch.equal(model.model.layers[1].mlp.experts.down_proj, before)
    part("export").export_gguf(model, tokenizer, tmp_path / "tiny.gguf")
    with GGUFFile.open(tmp_path / "tiny.gguf") as file:
        for name, value in part("export").gguf_tensors(model).items():
            info = file.tensors[name]
            stored = dequantize(file.data(name), info.type, info.shape)
            # The coarsest format is Q4_K: a step is a fifteenth of a block's range.
            assert np.abs(stored - value).max() <= np.abs(value).max() / 7.5
    with LLM(tmp_path / "tiny.gguf") as llm:
        output = llm.generate(
            "Once", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False
        )
        assert len(output[0].outputs[0].token_ids) == 5


def test_training_model_is_deepseek_v3_of_transformers(part: Any) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    c = replace(part("model").DemoConfig(), vocab_size=128, num_hidden_layers=2, n_routed_experts=4)
    torch.manual_seed(0)
    ours = part("model").DemoModel(c).eval()
    for layer in ours.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.uniform_(-0.3, 0.3)
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.1)
    ours_only = ("rope_theta", "num_attention_heads")
    shared = {name: value for name, value in asdict(c).items() if name not in ours_only}
    config = DeepseekV3Config(
        **shared,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_attention_heads,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )
    theirs = DeepseekV3ForCausalLM(config).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and not [name for name in missing if "inv_freq" not in name]
    ids = torch.randint(0, c.vocab_size, (2, 40))
    with torch.inference_mode():
        expected, found = theirs(ids).logits, ours(ids)
    assert (found - expected).abs().max() <= 2e-4 * (expected.max() - expected.min())


def test_the_file_that_ships() -> None:
    path = model_path("demo")
    assert path.stat().st_size <= 12_000_000
    with GGUFFile.open(path) as file:
        assert file.architecture == "deepseek2"
        assert file.get("general.license", str) == "mit"
        assert file.get("deepseek2.expert_count", int) >= 16
        assert file.get("deepseek2.expert_used_count", int) == 4
        assert file.get("deepseek2.expert_gating_func", int) == 2
        assert file.get("deepseek2.leading_dense_block_count", int) == 1
        assert file.get("deepseek2.attention.q_lora_rank", int) % 256 == 0
        assert len({info.type for info in file.tensors.values()}) >= 4


def test_the_demo_model_writes_sentences_of_its_lexicon(part: Any) -> None:
    lexicon = {word.lower() for section in part("corpus").LEXICON.values() for word in section}
    with LLM("demo") as llm:
        outputs = llm.generate(
            ["Once upon a time, a"] * 4,
            SamplingParams(temperature=0.7, seed=5, max_tokens=80),
            use_tqdm=False,
        )
    words = [word.strip('.,!?"').lower() for output in outputs for word in output.outputs[0].text.split()]
    assert len(words) > 100
    # Content words come from the lexicon; the rest are the templates' function words.
    assert sum(word in lexicon for word in words) / len(words) > 0.2
