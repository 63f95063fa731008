"""A small model on GPUs, on the CPU and on both: teacher-forced, every placement computes the same.

Run by `tests/backends/test_cuda.py` in a process of its own: in Triton's interpreter, or on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hybrid.kernels.gpu.target import INTERPRETED

from hybrid.backends.cuda import CudaBackend
from hybrid.backends.fake import FakeBackend, round_to_q8
from hybrid.backends.registry import create_backend
from hybrid.errors import CapacityError
from hybrid.forward import SingleSequence
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType, quantize
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.models import weights as weights_module
from hybrid.models.loader import load_model
from hybrid.placement.machine import Device, Machine
from hybrid.placement.planner import plan

HIDDEN, WIDTH, VOCAB, HEADS, NOPE, ROPE, V_DIM, LATENT, Q_RANK, EXPERTS, LENGTH = (
    64, 64, 48, 2, 32, 16, 32, 32, 32, 4, 8 if INTERPRETED else 60,
)  # fmt: skip
METADATA = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": WIDTH,
    "vocab_size": VOCAB,
    "leading_dense_block_count": 1,
    "rope.dimension_count": ROPE,
    "rope.freq_base": 10000.0,
    "attention.head_count": HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.kv_lora_rank": LATENT,
    "attention.q_lora_rank": Q_RANK,
    "attention.key_length": NOPE + ROPE,
    "attention.value_length": V_DIM,
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_feed_forward_length": WIDTH,
    "expert_weights_scale": 1.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
}
ATTENTION = {
    "attn_norm": (HIDDEN,),
    "attn_q_a": (Q_RANK, HIDDEN),
    "attn_q_a_norm": (Q_RANK,),
    "attn_q_b": (HEADS * (NOPE + ROPE), Q_RANK),
    "attn_kv_a_mqa": (LATENT + ROPE, HIDDEN),
    "attn_kv_a_norm": (LATENT,),
    "attn_kv_b": (HEADS * (NOPE + V_DIM), LATENT),
    "attn_output": (HIDDEN, HEADS * V_DIM),
    "ffn_norm": (HIDDEN,),
}


def _ffn(suffix, *batch):
    return {
        f"ffn_gate{suffix}": (*batch, WIDTH, HIDDEN),
        f"ffn_up{suffix}": (*batch, WIDTH, HIDDEN),
        f"ffn_down{suffix}": (*batch, HIDDEN, WIDTH),
    }


MOE = {"ffn_gate_inp": (EXPERTS, HIDDEN), **_ffn("_exps", EXPERTS), **_ffn("_shexp")}
SHAPES = {
    "token_embd.weight": (VOCAB, HIDDEN),
    **{f"blk.0.{name}.weight": shape for name, shape in {**ATTENTION, **_ffn("")}.items()},
    **{f"blk.1.{name}.weight": shape for name, shape in {**ATTENTION, **MOE}.items()},
    "blk.1.exp_probs_b.bias": (EXPERTS,),
    "output_norm.weight": (HIDDEN,),
    "output.weight": (VOCAB, HIDDEN),
}


def type_of(name, shape):
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return GGMLType.F32
    if "_exps" in name:
        return GGMLType.Q4_0
    return GGMLType.F16 if name == "token_embd.weight" else GGMLType.Q8_0


def write_model(path):
    rng = np.random.default_rng(3)
    with GGUFWriter(path) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        for key, value in METADATA.items():
            writer.add_metadata(
                f"deepseek2.{key}", value, ValueType.FLOAT32 if isinstance(value, float) else None
            )
        for name, shape in SHAPES.items():
            writer.add_tensor(name, shape, type_of(name, shape))
        for name, shape in SHAPES.items():
            values = rng.standard_normal(shape, dtype=np.float32)
            values = 1 + 0.1 * values if "norm" in name else values * np.float32(shape[-1] ** -0.5)
            writer.write_tensor(name, quantize(values, type_of(name, shape)))
    return path


def place(*places):
    """Rules from (select, device)."""
    return {"version": 1, "rules": [{"select": s, "place": {"device": d}} for s, d in places]}


EVERYTHING = {"name": "*"}
SPLITS = {
    "all on the GPU": place((EVERYTHING, "cuda:0")),
    "experts in the cpu": place(({"role": "routed_experts"}, "cpu"), (EVERYTHING, "cuda:0")),
    "some experts in the cpu": place(
        ({"role": "routed_experts", "experts": [1, 3]}, "cpu"), (EVERYTHING, "cuda:0")
    ),
    "layers on two GPUs": place(({"layers": 1}, "cuda:1"), (EVERYTHING, "cuda:0")),
    "embedding in the cpu": place(({"name": "token_embd.*"}, "cpu"), (EVERYTHING, "cuda:0")),
}
# Root of the mean square over all logits, of deviation 1: float sums in another order, and the int8 codes of
# activations that this tips over; on a GPU prompts are rounded to bfloat16 besides.
ERROR = 0.005 if INTERPRETED else 0.05
MEAN_KL = 1e-4 if INTERPRETED else 1e-2


class FakeGpu(FakeBackend):
    """Rounds activations of decoded tokens alone."""

    def _input(self, x, weight):
        return round_to_q8(x) if self.decoding and weight.quantized else x


def create(device, num_threads=None):
    """``fake:0`` rounds as a GPU does, ``fake:1`` as the CPU."""
    if device.startswith("fake"):
        return FakeGpu(device) if device == "fake:0" else FakeBackend(device, "q8")
    return create_backend(device, num_threads)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def load(path, monkeypatch):
    monkeypatch.setattr(weights_module, "create_backend", create)
    models = []

    def load_(rules, kv_format="f16"):
        machine = Machine((Device("cpu"), *(Device(f"cuda:{i}", 1 << 34) for i in range(2))))
        with GGUFFile.open(path) as file:
            found = plan(file, rules, machine=machine)
            model = load_model(file, plan=found, max_model_len=128, num_threads=1, kv_format=kv_format)
        models.append(model)
        return model, found

    yield load_
    for model in models:
        model.close()


IDS = np.random.default_rng(0).integers(0, VOCAB, LENGTH, dtype=np.int32)


def teacher_forced(model):
    """Log-probabilities ``[LENGTH, vocab]``: a prompt of two chunks, then one token after another."""
    model.allocate_cache(1)
    sequence, prompt = SingleSequence(model, BLOCK_SIZE, chunk=3), LENGTH // 2 + 1
    rows = [model.compute_logits(hidden) for hidden in sequence.extend(IDS[:prompt])]
    rows += [sequence.next_logits(IDS[i : i + 1]) for i in range(prompt, LENGTH)]
    return torch.cat(rows).double()


@pytest.mark.parametrize("split", SPLITS)
def test_placements_agree_with_the_reference(load, split):
    model, found = load(SPLITS[split])
    logits = teacher_forced(model)
    fakes = {"cuda:0": "fake:0", "cuda:1": "fake:0", "cpu": "fake:1"}
    places = [(rule["select"], fakes[rule["place"]["device"]]) for rule in SPLITS[split]["rules"]]
    expected = teacher_forced(load(place(*places))[0])
    assert logits.device.type == "cpu"
    assert (logits - expected).square().mean().sqrt() <= ERROR
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > 4 * ERROR
    assert clear.sum() >= LENGTH // 2
    assert torch.equal(logits.argmax(1)[clear], expected.argmax(1)[clear])
    kl = (expected.softmax(1) * (expected.log_softmax(1) - logits.log_softmax(1))).sum(1)
    assert kl.mean() <= MEAN_KL
    for name, placement in found.placements.items():
        for device in placement.devices:
            assert model.loaded_bytes[name, device] == placement.bytes_on(device), name


def test_decoded_tokens_have_the_same_bits_alone_and_together(load):
    model, _ = load(SPLITS["all on the GPU"])

    def decode(seqs):
        model.allocate_cache(2)
        for s in (0, 1):
            slots = torch.arange(3, dtype=torch.int32) + s * BLOCK_SIZE
            table = torch.tensor([[s]], dtype=torch.int32)
            first = torch.tensor(IDS[3 * s : 3 * s + 3].copy())
            lens = torch.tensor([3], dtype=torch.int32)
            starts = torch.tensor([0, 3], dtype=torch.int32)
            model.forward(first, AttentionBatch(slots - s * BLOCK_SIZE, slots, starts, lens, table))
        n = len(seqs)
        values = [3] * n, [s * BLOCK_SIZE + 3 for s in seqs], list(range(n + 1)), [4] * n
        tensors = [torch.tensor(v, dtype=torch.int32) for v in values]
        tables = torch.tensor([[s] for s in seqs], dtype=torch.int32)
        return model.decode(
            torch.tensor([7 + s for s in seqs], dtype=torch.int32), AttentionBatch(*tensors, tables)
        )

    both = decode([0, 1])
    assert torch.equal(both, torch.cat((decode([0]), decode([1]))))
    assert not torch.equal(both[0], both[1])


def test_cache_takes_the_bytes_of_the_plan(load):
    model, found = load(SPLITS["layers on two GPUs"])
    model.allocate_cache(found.size.cache_tokens // BLOCK_SIZE)
    caches = {layer.attention.backend.name: layer.attention.cache.nbytes for layer in model._network.layers}
    assert caches == {name: found.memory[name].kv_cache_bytes for name in ("cuda:0", "cuda:1")}


def test_a_gpu_that_is_full_is_told_with_the_plan(load, monkeypatch):
    def full(self, *args):
        raise torch.OutOfMemoryError("no 3 GiB are left")

    monkeypatch.setattr(CudaBackend, "allocate_latent_cache", full)
    model, _ = load(SPLITS["all on the GPU"])
    with pytest.raises(CapacityError, match=r"(?s)no 3 GiB are left.*The plan was:.*cuda:0 .*16\.00 GiB"):
        model.allocate_cache(1)
