"""Well-formed files that are no model this build can run: one clear error each, before weights are read."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid.errors import GGUFError, HybridError, ModelError, PlacementError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType, tensor_bytes
from hybrid.models.loader import load_model
from hybrid.models.registry import family_of
from hybrid.placement.planner import plan


@pytest.fixture
def refused(tmp_path, make_reference, write_model):
    """``refused(change)``: the error of a small V3 model that ``change(keys, tensors)`` has spoilt."""
    reference = make_reference("v3")

    def attempt(change, split_kv_b=False, types=None, rules="auto") -> HybridError:
        keys, tensors = reference.contents(split_kv_b)
        change(keys, tensors)
        path = write_model(tmp_path / "bad.gguf", keys, tensors, types)
        read: list[int] = []
        with GGUFFile.open(path) as file, pytest.raises(HybridError) as caught:
            config = family_of(file).read_config(file)
            load_model(
                file,
                plan=plan(file, rules),
                max_model_len=64,
                progress=lambda done, total: read.append(done),
                config=config,
            )
        assert not read, "weights were read before the error"
        assert str(path) in str(caught.value) or isinstance(caught.value, PlacementError)
        return caught.value

    return attempt


def set_key(name, value):
    return lambda keys, tensors: keys.__setitem__(f"deepseek2.{name}", value)


def drop_key(name):
    return lambda keys, tensors: keys.pop(f"deepseek2.{name}")


def drop_tensor(name):
    return lambda keys, tensors: tensors.pop(name)


@pytest.mark.parametrize(
    "metadata, word",
    [
        ({}, "general.architecture"),
        ({"general.architecture": "llama"}, "deepseek2"),
        ({"general.architecture": "clip", "general.type": "mmproj"}, "projector"),
        ({"general.architecture": "clip"}, "projector"),
        ({"general.architecture": "deepseek2", "general.type": "adapter"}, "LoRA"),
        ({"general.architecture": "deepseek2", "general.type": "imatrix"}, "importance"),
        ({"general.architecture": "deepseek2", "general.type": "vocab"}, "vocabulary"),
        ({"general.architecture": 7}, "expected str, found int 7"),
    ],
)
def test_file_of_another_kind(tmp_path, metadata, word):
    path = tmp_path / "other.gguf"
    with GGUFWriter(path) as writer:
        for key, value in metadata.items():
            writer.add_metadata(key, value)
        writer.add_tensor("a.weight", (2,), GGMLType.F32)
        writer.write_tensor("a.weight", bytes(8))
    with GGUFFile.open(path) as file, pytest.raises((GGUFError, ModelError), match=word):
        family_of(file)


def test_file_without_tensors(tmp_path):
    path = tmp_path / "vocab.gguf"
    with GGUFWriter(path) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
    with GGUFFile.open(path) as file, pytest.raises(GGUFError, match="vocabulary"):
        family_of(file)


REQUIRED = [
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon", "attention.kv_lora_rank", "attention.key_length",
    "attention.value_length", "rope.dimension_count", "expert_count", "expert_used_count",
]  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_required_key_missing(refused, name):
    error = refused(drop_key(name))
    assert isinstance(error, GGUFError)
    assert error.key == f"deepseek2.{name}"


@pytest.mark.parametrize("name", [*REQUIRED, "expert_weights_scale", "rope.freq_base"])
def test_key_of_wrong_type(refused, name):
    error = refused(set_key(name, "three"))
    assert isinstance(error, GGUFError)
    assert error.key == f"deepseek2.{name}"
    assert "'three'" in str(error)


NAN, INF = float("nan"), float("inf")
IMPOSSIBLE = [
    ("block_count", 0),
    ("block_count", 100_000),
    ("block_count", 4),  # a layer without tensors
    ("block_count", 2),  # tensors without a layer
    ("nextn_predict_layers", 3),
    ("embedding_length", 0),
    ("attention.head_count", 0),
    ("attention.head_count_kv", 3),
    ("attention.head_count_kv", 2),
    ("attention.layer_norm_rms_epsilon", NAN),
    ("attention.layer_norm_rms_epsilon", 0.0),
    ("rope.freq_base", INF),
    ("rope.freq_base", -1.0),
    ("rope.dimension_count", 15),
    ("rope.dimension_count", 64),
    ("attention.key_length", 999),
    ("attention.key_length_mla", 8),
    ("attention.kv_lora_rank", 63),
    ("attention.q_lora_rank", 31),
    ("leading_dense_block_count", 4),
    ("leading_dense_block_count", 2),  # a layer with experts instead of a dense one
    ("leading_dense_block_count", 0),  # a layer without its experts
    ("expert_count", 0),
    ("expert_count", 7),
    ("expert_count", 16),
    ("expert_used_count", 0),
    ("expert_used_count", 9),
    ("expert_group_count", 3),
    ("expert_group_used_count", 5),
    ("expert_group_count", 8),  # groups of one cannot be scored by their two best
    ("expert_gating_func", 3),
    ("expert_weights_scale", NAN),
    ("expert_shared_count", 0),  # its tensors are left over
    ("expert_shared_count", 2),
    ("expert_feed_forward_length", 49),
    ("feed_forward_length", 127),
    ("vocab_size", 161),
    ("rope.scaling.type", "linear"),
]


@pytest.mark.parametrize("name, value", IMPOSSIBLE, ids=lambda v: str(v))
def test_impossible_value(refused, name, value):
    assert isinstance(refused(set_key(name, value)), ModelError)


YARN_KEYS = {"type": "yarn", "factor": 4.0, "original_context_length": 64}


@pytest.mark.parametrize(
    "name, value",
    [
        ("factor", 0.5),
        ("factor", NAN),
        ("original_context_length", 0),
        ("yarn_log_multiplier", -1.0),
        ("yarn_beta_fast", NAN),
        ("yarn_ext_factor", 0.5),
        ("attn_factor", 2.0),
    ],
)
def test_impossible_yarn(refused, name, value):
    def change(keys, tensors):
        for key, good in YARN_KEYS.items():
            keys[f"deepseek2.rope.scaling.{key}"] = good
        keys[f"deepseek2.rope.scaling.{name}"] = value

    error = refused(change)
    assert isinstance(error, ModelError)
    assert name in str(error)


def test_per_layer_values(refused, tmp_path, make_reference, write_model):
    key = "feed_forward_length"
    assert "2 values" in str(refused(set_key(key, np.array([128, 128], dtype=np.uint32))))
    assert "same value" in str(refused(set_key(key, np.array([128, 64, 128], dtype=np.uint32))))
    keys, tensors = make_reference("v3").contents(False)
    keys[f"deepseek2.{key}"] = np.array([128, 128, 128], dtype=np.uint32)
    with GGUFFile.open(write_model(tmp_path / "good.gguf", keys, tensors)) as file:
        assert family_of(file).read_config(file).intermediate_size == 128


TENSORS = [
    "token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight",
    "blk.0.attn_q_a.weight", "blk.0.attn_q_a_norm.weight", "blk.0.attn_q_b.weight",
    "blk.0.attn_kv_a_mqa.weight", "blk.0.attn_kv_a_norm.weight", "blk.0.attn_kv_b.weight",
    "blk.0.attn_output.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight",
    "blk.1.ffn_gate_inp.weight", "blk.2.ffn_gate_exps.weight", "blk.2.ffn_up_exps.weight",
    "blk.2.ffn_down_exps.weight", "blk.1.ffn_gate_shexp.weight", "blk.1.ffn_up_shexp.weight",
    "blk.1.ffn_down_shexp.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_missing(refused, name):
    error = refused(drop_tensor(name))
    assert isinstance(error, ModelError)
    assert repr(name) in str(error)
    assert "missing" in str(error)


@pytest.mark.parametrize("name", [*TENSORS, "output.weight", "blk.1.exp_probs_b.bias"])
def test_tensor_of_wrong_shape(refused, name):
    def shrink(keys, tensors):
        tensors[name] = tensors[name][..., :-1]

    error = refused(shrink)
    assert isinstance(error, ModelError)
    assert repr(name) in str(error)
    assert "shape" in str(error)


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_number_of_experts_differs(refused, name):
    tensor = f"blk.1.ffn_{name}_exps.weight"

    def halve(keys, tensors):  # the same elements, as half as many experts
        values = tensors[tensor]
        tensors[tensor] = values.reshape(4, 2 * values.shape[1], values.shape[2])

    assert repr(tensor) in str(refused(halve))


@pytest.mark.parametrize("dropped, named", [("attn_v_b", "attn_v_b"), ("attn_k_b", "attn_kv_b")])
def test_split_kv_b_needs_both(refused, dropped, named):
    error = refused(drop_tensor(f"blk.1.{dropped}.weight"), split_kv_b=True)
    assert f"'blk.1.{named}.weight' is missing" in str(error)


@pytest.mark.parametrize(
    "name", ["blk.1.attn_bias.weight", "rope_freqs.weight", "blk.3.attn_norm.weight", "blk.9.x"]
)
def test_tensor_left_over(refused, name):
    error = refused(lambda keys, tensors: tensors.__setitem__(name, np.ones(4, dtype=np.float32)))
    assert isinstance(error, ModelError)
    assert name in str(error)


@pytest.mark.parametrize(
    "type_", [GGMLType.NVFP4, GGMLType.Q1_0, GGMLType.IQ4_K, GGMLType.IQ2_KS, GGMLType.Q4_K_R4]
)
def test_format_without_a_kernel(tmp_path, make_reference, type_):
    keys, tensors = make_reference("v3").contents(False)
    hidden = 96
    path = tmp_path / "model.gguf"
    with GGUFWriter(path) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        keys |= {"deepseek2.expert_feed_forward_length": 256}
        for key, value in keys.items():
            writer.add_metadata(key, value, ValueType.FLOAT32 if isinstance(value, float) else None)
        shapes = {name: value.shape for name, value in tensors.items()}
        for layer in (1, 2):
            shapes[f"blk.{layer}.ffn_gate_exps.weight"] = shapes[f"blk.{layer}.ffn_up_exps.weight"] = (
                8,
                256,
                hidden,
            )
            shapes[f"blk.{layer}.ffn_down_exps.weight"] = (8, hidden, 256)
            for kind, shape in (("gate", (256, hidden)), ("up", (256, hidden)), ("down", (hidden, 256))):
                shapes[f"blk.{layer}.ffn_{kind}_shexp.weight"] = shape
        types = {name: type_ if "down_exps" in name else GGMLType.F32 for name in shapes}
        for name, shape in shapes.items():
            writer.add_tensor(name, shape, types[name])
        for name, shape in shapes.items():
            writer.write_tensor(name, bytes(tensor_bytes(types[name], shape)))
    with GGUFFile.open(path) as file, pytest.raises(ModelError) as caught:
        load_model(file, plan=plan(file), max_model_len=64)
    for word in (type_.name, "blk.1.ffn_down_exps.weight", "blk.2.ffn_down_exps.weight", "cpu ("):
        assert word.lower() in str(caught.value).lower()


def rules_of(*rules):
    return {
        "version": 1,
        "rules": [{"select": select, "place": {"device": device}} for select, device in rules],
    }


def test_tensors_that_belong_together_are_apart(refused):
    error = refused(
        lambda keys, tensors: None,
        rules=rules_of(
            ({"name": "blk.1.ffn_down_exps.weight"}, "fake:0"),
            ({"name": "blk.1.ffn_gate_exps.weight"}, "cpu"),
        ),
    )
    assert isinstance(error, PlacementError)
    for word in ("blk.1.ffn_down_exps.weight goes to fake:0", "goes to cpu", "<rules>"):
        assert word in str(error)


def test_device_that_is_not_there(refused):
    error = refused(lambda keys, tensors: None, rules=rules_of(({"role": "attention"}, "cuda:0")))
    assert isinstance(error, PlacementError)
    assert "cuda:0" in str(error)
