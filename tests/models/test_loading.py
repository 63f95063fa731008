"""What loading does besides computing: progress, interruption, split files, unused tensors, memory."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import torch

from hybrid.backends import cpu as cpu_backend
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.models.loader import load_model
from hybrid.placement.planner import plan


def load(path, **options):
    with GGUFFile.open(path) as file:
        return load_model(file, plan=plan(file), max_model_len=512, **options)


def test_progress_counts_every_byte_once(make_reference):
    reference = make_reference("v3")
    calls = []
    model = load(reference.path, progress=lambda done, total: calls.append((done, total)))
    with GGUFFile.open(reference.path) as file:
        sizes = [info.n_bytes for info in file.tensors.values()]
    model.close()
    assert {total for _, total in calls} == {sum(sizes)}
    assert calls[-1][0] == sum(sizes)
    assert (np.diff([0, *(done for done, _ in calls)]) > 0).all()
    assert len(calls) >= len(sizes)


def test_progress_may_interrupt(make_reference):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(make_reference("v3").path, progress=stop)


def test_small_staging_memory_gives_the_same_weights(make_reference, open_model, monkeypatch):
    reference = make_reference("v3")
    expected = open_model(reference.path).logits(reference.ids)
    monkeypatch.setattr(cpu_backend, "PIECE_BYTES", 1)  # 16 rows at a time
    assert torch.equal(open_model(reference.path).logits(reference.ids), expected)


def test_readers_end_with_the_loading(make_reference):
    model = load(make_reference("v3").path)
    assert model._backends["cpu"]._reader is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hybrid-read")]
    model.close()


def test_split_file(make_reference, open_model, write_model, tmp_path):
    reference = make_reference("v3")
    keys, tensors = reference.contents(False)
    path = write_model(tmp_path / "split.gguf", keys, tensors, split_max_bytes=200_000)
    shards = sorted(tmp_path.glob("split-*.gguf"))
    assert len(shards) > 2
    assert not path.exists()
    for shard in (shards[0], shards[1]):
        found = open_model(shard).logits(reference.ids)
        assert torch.equal(found, open_model(reference.path).logits(reference.ids))


def test_prediction_layer_is_counted_and_not_loaded(
    make_reference, open_model, write_model, tmp_path, caplog
):
    reference = make_reference("v3")
    keys, tensors = reference.contents(False)
    keys |= {"deepseek2.block_count": 4, "deepseek2.nextn_predict_layers": 1}
    tensors |= {name.replace("blk.2.", "blk.3."): tensors[name] for name in list(tensors) if "blk.2." in name}
    tensors["blk.3.nextn.eh_proj.weight"] = np.ones((96, 192), dtype=np.float32)
    path = write_model(tmp_path / "nextn.gguf", keys, tensors)
    with caplog.at_level(logging.INFO, logger="hybrid"):
        runner = open_model(path)
    assert runner.model.config.num_layers == 3
    count = sum("blk.3." in name for name in tensors)
    assert f"{count} tensors of next-token prediction layers" in caplog.text
    assert torch.equal(runner.logits(reference.ids), open_model(reference.path).logits(reference.ids))


def test_gate_and_up_in_one_tensor(make_reference, open_model, write_model, tmp_path):
    reference = make_reference("v3")
    keys, tensors = reference.contents(False)
    for layer in (1, 2):
        prefix = f"blk.{layer}.ffn_"
        halves = [tensors.pop(f"{prefix}{kind}_exps.weight") for kind in ("gate", "up")]
        tensors[prefix + "gate_up_exps.weight"] = np.concatenate(halves, axis=1)
    found = open_model(write_model(tmp_path / "fused.gguf", keys, tensors)).logits(reference.ids)
    assert torch.equal(found, open_model(reference.path).logits(reference.ids))


def test_output_tied_to_the_embedding(make_reference, open_model, write_model, tmp_path):
    keys, tensors = make_reference("v3").contents(False)
    ids = make_reference("v3").ids
    tensors["output.weight"] = tensors["token_embd.weight"]
    apart = open_model(write_model(tmp_path / "apart.gguf", keys, tensors)).logits(ids)
    del tensors["output.weight"]
    assert torch.equal(open_model(write_model(tmp_path / "tied.gguf", keys, tensors)).logits(ids), apart)


def test_formats_may_differ_within_a_layer(make_reference, open_model, write_model, tmp_path):
    reference = make_reference("v3")
    keys, tensors = reference.contents(False)
    types = {"up_exps": GGMLType.F16, "kv_b": GGMLType.F16, "attn_output": GGMLType.BF16}

    def type_of(name):
        return next((type_ for part, type_ in types.items() if part in name), GGMLType.F32)

    path = write_model(tmp_path / "mixed.gguf", keys, tensors, type_of)
    plain = {"version": 1, "rules": [{"select": {"name": "*"}, "place": {"device": "fake:0"}}]}
    expected = open_model(path, plain).logits(reference.ids)
    found = open_model(path).logits(reference.ids)
    assert (found - expected).abs().max() <= 2e-4 * (expected.max() - expected.min())


def test_torch_defaults_do_not_matter(make_reference, open_model):
    reference = make_reference("v3")
    runner = open_model(reference.path)
    expected = runner.logits(reference.ids)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = open_model(reference.path).logits(reference.ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "ids", [torch.arange(4), torch.arange(8, dtype=torch.int32)[::2]], ids=["int64", "gaps"]
)
def test_token_ids_of_another_kind_are_refused(make_reference, open_model, ids):
    model = open_model(make_reference("v3").path).model
    with pytest.raises(ValueError, match="token_ids"):
        model.forward(ids, None)


def test_closing_twice(make_reference):
    model = load(make_reference("v3").path)
    model.close()
    model.close()
