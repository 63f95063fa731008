"""The GPU backend against the reference: every operation of the contract, for prompts and decoded tokens.

Run by `test_cuda.py` in a process of its own: in Triton's interpreter, or on a GPU.
"""

from __future__ import annotations

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from hybrid.kernels.gpu.target import INTERPRETED

from hybrid.backends.base import Backend, RouterConfig
from hybrid.backends.cuda import CudaBackend
from hybrid.backends.fake import FakeBackend
from hybrid.backends.source import TensorSource
from hybrid.errors import PlacementError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter, quantize
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.placement.capabilities import matrix_bytes

HEADS, NOPE, ROPE, LATENT, V_DIM, HIDDEN, WIDTH, EXPERTS, VOCAB = 2, 32, 32, 64, 32, 256, 64, 8, 20
SHAPES = {
    "norm": (HIDDEN,),
    "kv_norm": (LATENT,),
    "bias": (EXPERTS,),
    "table": (VOCAB, HIDDEN),
    "linear": (WIDTH, HIDDEN),
    "kv_b": (HEADS * (NOPE + V_DIM), LATENT),
    "k_b": (HEADS, LATENT, NOPE),
    "router": (EXPERTS, HIDDEN),
    "gate": (EXPERTS, WIDTH, HIDDEN),
    "up": (EXPERTS, WIDTH, HIDDEN),
    "down": (EXPERTS, HIDDEN, WIDTH),
}
# Formats of wide matrices, and of those whose rows are shorter than a block of 256.
FORMATS = {"float": ("F32", "F16"), "quantized": ("Q4_K", "Q8_0")}
HALF = torch.float32 if INTERPRETED else torch.bfloat16
# Sums of at most 256 products, in another order: so many units in the last place of their largest term. On a
# GPU, prompts and weights are rounded to bfloat16 besides, and activations between two products.
EXACT = 256 * 2.0**-24
ROUNDED = 0.0 if INTERPRETED else 8 * 2.0**-9


def error_of(decoding: bool) -> float:
    return EXACT + (0.0 if decoding else ROUNDED)


def close(found: torch.Tensor, expected: torch.Tensor, error: float) -> bool:
    return bool((found - expected).abs().max() <= error * expected.abs().max())


def write_weights(path, wide, narrow):
    rng = np.random.default_rng(1)
    short = dict.fromkeys(("kv_b", "k_b", "down"), narrow)
    types = {
        name: GGMLType[short.get(name, wide)] if len(shape) > 1 and name != "router" else GGMLType.F32
        for name, shape in SHAPES.items()
    }
    with GGUFWriter(path) as writer:
        for name, shape in SHAPES.items():
            writer.add_tensor(name, shape, types[name])
        for name, shape in SHAPES.items():
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
            writer.write_tensor(name, quantize(values, types[name]))
    return path


class Pair:
    """One file, loaded by the GPU backend and by the reference."""

    def __init__(self, file: GGUFFile, decoding: bool) -> None:
        self.file, self.decoding = file, decoding
        self.gpu = CudaBackend("cuda:0")
        self.gpu.decoding = decoding
        self.fake = FakeBackend(activation="q8" if decoding else "f32")

    def vector(self, backend, name):
        return backend.load_vector(TensorSource(self.file, self.file.tensors[name], 1, 1, SHAPES[name][0]))

    def matrix(self, backend, name, batch=1, part=None, selected=None):
        rows, cols = int(np.prod(SHAPES[name][:-1])) // batch, SHAPES[name][-1]
        start, stop = (part.start, part.stop) if part else (0, rows)
        info = self.file.tensors[name]
        return backend.load_matrix(TensorSource(self.file, info, batch, rows, cols, start, stop, selected))

    def both(self, operation):
        """``operation(backend)`` on either; results on the host."""
        return [operation(backend).cpu() for backend in (self.gpu, self.fake)]

    def check(self, operation):
        found, expected = self.both(operation)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert close(found, expected, error_of(self.decoding))


@pytest.fixture(params=FORMATS)
def file(request, tmp_path):
    with GGUFFile.open(write_weights(tmp_path / "weights.gguf", *FORMATS[request.param])) as opened:
        yield opened


@pytest.fixture(params=[True, False], ids=["decode", "prompt"])
def pair(request, file):
    found = Pair(file, request.param)
    yield found
    found.gpu.close()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_signatures():
    for name, function in inspect.getmembers(Backend, inspect.isfunction):
        if name != "__init__":
            assert inspect.signature(getattr(CudaBackend, name)) == inspect.signature(function), name


def test_embed(pair):
    ids = torch.tensor([5, 0, 19, 5], dtype=torch.int32)
    found, expected = pair.both(lambda b: b.embed(b.receive(ids), pair.matrix(b, "table")))
    assert close(found, expected, 2.0**-22)


@pytest.mark.parametrize("add", [False, True])
def test_norm_and_sum(pair, add):
    sums = []

    def operation(b):
        residual = b.receive(noise(3, HIDDEN, seed=2)) if add else None
        out = b.rms_norm(b.receive(noise(3, HIDDEN)), pair.vector(b, "norm"), 1e-6, residual)
        sums.append(out if residual is None else residual.cpu())
        if residual is not None:
            b.add(residual, out)
        return out

    found, expected = pair.both(operation)
    assert close(found, expected, EXACT)
    if add:
        assert torch.equal(*sums)


@pytest.mark.parametrize("tokens", [1, 7])
def test_linear(pair, tokens):
    pair.check(lambda b: b.linear(b.receive(noise(tokens, HIDDEN)), pair.matrix(b, "linear")))


@pytest.mark.parametrize("transposed", [True, False], ids=["kv_b", "k_b"])
def test_absorb_q(pair, transposed):
    def operation(b):
        q = b.receive(noise(3, HEADS, NOPE + ROPE))
        k_b = pair.matrix(b, "kv_b", HEADS, slice(0, NOPE)) if transposed else pair.matrix(b, "k_b", HEADS)
        return b.absorb_q(q, k_b, NOPE, transposed=transposed)

    found, expected = pair.both(operation)
    # Transposed products round to the type of prompts in both phases.
    assert close(found, expected, error_of(pair.decoding and not transposed))


def test_project_v(pair):
    part = slice(NOPE, NOPE + V_DIM)
    pair.check(lambda b: b.project_v(b.receive(noise(3, HEADS, LATENT)), pair.matrix(b, "kv_b", HEADS, part)))


def batch_of(positions, tables, starts, lengths):
    slots = [tables[s][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in positions]
    tensors = [[p for _, p in positions], slots, starts, lengths, tables]
    return AttentionBatch(*(torch.tensor(values, dtype=torch.int32) for values in tensors))


TABLES = [[3, 1], [0, -1]]
STEPS = (
    batch_of([(0, p) for p in range(70)] + [(1, 0), (1, 1)], TABLES, [0, 70, 72], [70, 2]),  # two prompts
    batch_of([(0, 2), (1, 70)], [TABLES[1], TABLES[0]], [0, 1, 2], [3, 71]),  # a token each
)


@pytest.mark.parametrize("fmt", ["f32", "f16", "q8_0"] if INTERPRETED else ["f16", "bf16", "q8_0"])
def test_append_and_attention(pair, fmt):
    angles = torch.arange(80.0)[:, None] * torch.logspace(0, -3, ROPE // 2)
    rope = torch.stack((angles.cos(), angles.sin()), -1).contiguous()

    def operation(b):
        cache = b.allocate_latent_cache(4, LATENT, ROPE, fmt)
        results = []
        for seed, (step, decoding) in enumerate(zip(STEPS, (False, True), strict=True)):
            b.decoding = decoding
            batch, tokens = b.receive_batch(step), step.num_tokens
            q = b.receive(noise(tokens, HEADS, NOPE + ROPE, seed=seed))
            kv = b.receive(noise(tokens, LATENT + ROPE, seed=seed + 10))
            b.mla_append(q, kv, pair.vector(b, "kv_norm"), 1e-6, b.receive(rope), cache, batch)
            q_latent = b.receive(noise(tokens, HEADS, LATENT, seed=seed + 20))
            results += [b.mla_attention(q, q_latent, cache, batch, 0.1), q]
        b.decoding = pair.decoding
        return torch.cat([result.flatten() for result in results])

    found, expected = pair.both(operation)
    unit = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 127}[fmt]
    # Scores of magnitude up to 8 in a half type move the weights of an average by e^(8u).
    assert (found - expected).abs().max() <= (EXACT + unit + 4 * ROUNDED) * expected.abs().max()


def test_copied_blocks_are_the_same(pair):
    cache = pair.gpu.allocate_latent_cache(4, LATENT, ROPE, "q8_0")
    cache.codes.copy_(torch.arange(cache.codes.numel()).view(cache.codes.shape) % 100)
    cache.scales.copy_(torch.arange(cache.scales.numel()).view(cache.scales.shape) % 50)
    pair.gpu.copy_cache_blocks(cache, [(2, 0), (1, 3)])
    for plane in (cache.codes, cache.scales):
        blocks = plane.view(4, BLOCK_SIZE, -1)
        assert torch.equal(blocks[0], blocks[2])
        assert torch.equal(blocks[1], blocks[3])
        assert not torch.equal(blocks[0], blocks[1])


@pytest.mark.parametrize("fmt", ["f16", "q8_0"])
def test_cache_bytes_and_widths_that_do_not_fit(fmt):
    backend = CudaBackend("cuda:0")
    cache = backend.allocate_latent_cache(2, 512, 64, fmt)
    assert cache.nbytes == 128 * {"f16": 1152, "q8_0": 612}[fmt]
    with pytest.raises(PlacementError, match=r"cuda:0: a cache of .* a power of two, at least 16, as rotary"):
        backend.allocate_latent_cache(2, 512, 48, fmt)


@pytest.mark.parametrize("scoring, groups, biased", [("softmax", 1, False), ("sigmoid", 4, True)])
def test_route(pair, scoring, groups, biased):
    config = RouterConfig(EXPERTS, 3, scoring, groups, 2 if groups > 1 else 1, True, 2.5)
    chosen = []

    def operation(b):
        bias = pair.vector(b, "bias") if biased else None
        ids, weights = b.route(b.receive(noise(20, HIDDEN) * 3), pair.matrix(b, "router"), bias, config)
        assert ids.dtype == torch.int32
        chosen.append(ids.cpu())
        return weights

    found, expected = pair.both(operation)
    assert torch.equal(*chosen)
    assert close(found, expected, EXACT)


def test_moe_skips_ids_of_minus_one(pair):
    ids = torch.tensor([[1, 7, -1], [-1, -1, -1], [0, 1, 2]], dtype=torch.int32)

    def operation(b):
        stacks = [pair.matrix(b, name, EXPERTS) for name in ("gate", "up", "down")]
        return b.moe(
            b.receive(noise(3, HIDDEN, seed=1)), *stacks, b.receive(ids), b.receive(noise(3, 3).abs())
        )

    found, expected = pair.both(operation)
    assert close(found, expected, error_of(pair.decoding))
    assert not found[1].any()


def test_moe_of_some_experts_is_that_of_the_stack(pair):
    b, selected = pair.gpu, (2, 5)
    wanted = b.receive(torch.tensor([[e, -1] for e in selected], dtype=torch.int32))
    places = b.receive(torch.tensor([[i, -1] for i in range(2)], dtype=torch.int32))
    x, weights = b.receive(noise(2, HIDDEN)), b.receive(noise(2, 2, seed=1).abs())
    whole, some = (
        [pair.matrix(b, name, EXPERTS, selected=chosen) for name in ("gate", "up", "down")]
        for chosen in (None, selected)
    )
    assert torch.equal(b.moe(x, *some, places, weights), b.moe(x, *whole, wanted, weights))


def test_mlp(pair):
    def operation(b):
        first = []
        for name in ("gate", "up", "down"):
            rows, cols = SHAPES[name][1:]
            info = pair.file.tensors[name]
            first.append(b.load_matrix(TensorSource(pair.file, info, 1, EXPERTS * rows, cols, 0, rows)))
        return b.mlp(b.receive(noise(4, HIDDEN)), *first)

    pair.check(operation)


def test_a_token_has_the_same_bits_alone_and_in_any_batch(pair):
    b = pair.gpu
    stacks = [pair.matrix(b, name, EXPERTS) for name in ("gate", "up", "down")]
    x, weights = b.receive(noise(3, HIDDEN)), b.receive(noise(3, 2).abs())
    ids = b.receive(torch.tensor([[0, 1], [1, 2], [7, 0]], dtype=torch.int32))
    q = b.receive(noise(3, HEADS, NOPE + ROPE))
    linear, k_b = pair.matrix(b, "linear"), pair.matrix(b, "k_b", HEADS)
    kv_b = pair.matrix(b, "kv_b", HEADS, slice(0, NOPE))
    operations = (
        lambda s: b.linear(x[s], linear),
        lambda s: b.moe(x[s], *stacks, ids[s], weights[s]),
        lambda s: b.absorb_q(q[s], kv_b, NOPE, transposed=True),
        lambda s: b.absorb_q(q[s], k_b, NOPE, transposed=False),
    )
    for operation in operations:
        together = operation(slice(0, 3))
        parts = [operation(slice(first, end)) for first, end in pairwise((0, 1, 3))]
        assert torch.equal(together, torch.cat(parts))


def test_weights_take_the_bytes_of_the_plan(pair):
    for name, batch in (("linear", 1), ("gate", EXPERTS), ("k_b", HEADS), ("router", 1)):
        rows = int(np.prod(SHAPES[name][:-1])) // batch
        planned = matrix_bytes(pair.file.tensors[name].type, "cuda", (batch, rows, SHAPES[name][-1]))
        assert pair.gpu.weight_bytes(pair.matrix(pair.gpu, name, batch)) == planned


def test_announced_weights_lie_in_one_piece_and_are_the_same(pair):
    sources = [
        TensorSource(pair.file, pair.file.tensors[name], EXPERTS, *SHAPES[name][1:])
        for name in ("gate", "down")
    ]
    pair.gpu.prepare(pair.file, sources)
    pointers = []
    for source, name in zip(sources, ("gate", "down"), strict=True):
        weight = pair.gpu.load_matrix(source)
        pointers.append(weight.data.data_ptr())
        alone = pair.matrix(CudaBackend("cuda:0"), name, EXPERTS)
        assert torch.equal(weight.data, alone.data)
        if name == "gate":
            n_bytes = pair.gpu.weight_bytes(weight)
    pair.gpu.loading_done()
    assert pointers[1] - pointers[0] == n_bytes
