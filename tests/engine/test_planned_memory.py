"""Bytes a plan states against bytes a run takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hybrid.kernels import cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid.calibration import this_machine
from hybrid.config import model_path
from hybrid.forward import SingleSequence
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.kvcache.pool import blocks_for
from hybrid.models.loader import load_model
from hybrid.placement.memory import RunSize
from hybrid.placement.planner import plan
from hybrid.synth import Formats, resolve_shape, synthesise

MIB = 1 << 20


class LiveTensors(TorchDispatchMode):
    """Counts bytes of tensors made while it is active and still alive; ``peak`` is the most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)
        }
        result = function(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in known:
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(n_bytes for _, n_bytes in self.live.values()))
        return result


def _is_tensor(leaf):
    return isinstance(leaf, torch.Tensor)


def synth_path(folder, kv_b):
    path = folder / "lite.gguf"
    shape = resolve_shape("deepseek-v2-lite", num_layers=3, num_experts=16)
    formats = Formats(experts=GGMLType.Q2_K, down=GGMLType.Q4_K, dense=GGMLType.Q8_0)
    synthesise(path, shape, formats, kv_b=kv_b)
    return path


@pytest.mark.parametrize(
    "model, kv_format", [("demo", "f32"), ("demo", "q8_0"), ("split", "f16"), ("joint", "f16")]
)
def test_weights_cache_and_working_memory(model, kv_format, tmp_path):
    if model == "demo":
        path, length, batch = model_path(None), 1024, 512
    else:
        path, length, batch = synth_path(tmp_path, model), 1088, 256
    size = RunSize(length, 1, batch, kv_format)
    with GGUFFile.open(path) as file:
        found = plan(file, machine=this_machine(2), size=size)
        loaded = load_model(file, plan=found, max_model_len=length, num_threads=2, kv_format=kv_format)
    planned = found.memory["cpu"]
    try:
        loaded.allocate_cache(blocks_for(length))
        caches = [layer.attention.cache.data for layer in loaded._network.layers]
        cpu.release_scratch()
        before = cpu.scratch_bytes()
        ids = np.random.default_rng(0).integers(0, loaded.config.vocab_size, length - 1, dtype=np.int32)
        sequence = SingleSequence(loaded, length, batch)
        with LiveTensors() as live:
            sequence.next_logits(ids[: length // 2])
            sequence.next_logits(ids[length // 2 :])
            sequence.next_logits(ids[:1])
        kernels = cpu.scratch_bytes() - before
        assert planned.weights_bytes == loaded.weight_bytes["cpu"]
        assert planned.kv_cache_bytes == sum(cache.nbytes for cache in caches)
        rope = loaded._network.layers[0].attention.rope.nbytes
        assert planned.scratch_parts["rotary table"] == rope
        assert_close(planned.scratch_parts["kernels"], kernels)
        assert_close(planned.scratch_parts["activations"], live.peak)
        staging = planned.scratch_parts["staging"]
        assert_close(planned.scratch_bytes - staging, kernels + live.peak + rope)
    finally:
        loaded.close()


def assert_close(planned, measured):
    assert measured > 0
    assert abs(planned - measured) <= max(0.03 * measured, 4 * MIB), (planned, measured)
