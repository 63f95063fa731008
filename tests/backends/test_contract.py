"""The backends against each other: every operation that `base` promises, with weights of several formats."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from hybrid.backends.base import Backend, RouterConfig
from hybrid.backends.cpu import CpuBackend
from hybrid.backends.fake import FakeBackend
from hybrid.backends.source import TensorSource
from hybrid.config import KV_FORMATS
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter, quantize
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch

HEADS, NOPE, ROPE, LATENT, V_DIM, HIDDEN, WIDTH, EXPERTS, VOCAB = 3, 32, 16, 64, 48, 256, 512, 8, 100
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
FORMATS = [GGMLType.F32, GGMLType.Q8_0, GGMLType.Q4_0]
# Sums of at most 512 products, in another order: 512 units in the last place of their largest term.
TOLERANCE = 512 * 2.0**-24


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


class Setup:
    """One file, loaded by one backend."""

    def __init__(self, backend: Backend, file: GGUFFile) -> None:
        self.backend, self.file = backend, file

    def vector(self, name: str) -> torch.Tensor:
        return self.backend.load_vector(
            TensorSource(self.file, self.file.tensors[name], 1, 1, SHAPES[name][0])
        )

    def matrix(
        self, name: str, batch: int = 1, part: slice | None = None, selected: tuple[int, ...] | None = None
    ):
        rows, cols = int(np.prod(SHAPES[name][:-1])) // batch, SHAPES[name][-1]
        start, stop = (part.start, part.stop) if part else (0, rows)
        return self.backend.load_matrix(
            TensorSource(self.file, self.file.tensors[name], batch, rows, cols, start, stop, selected)
        )


@pytest.fixture(params=FORMATS, ids=lambda type_: type_.name)
def pair(request, tmp_path):
    """The CPU and the reference, which rounds activations as the CPU does."""
    rng = np.random.default_rng(1)
    types = {
        name: request.param if len(shape) > 1 and name != "router" else GGMLType.F32
        for name, shape in SHAPES.items()
    }
    path = tmp_path / "weights.gguf"
    with GGUFWriter(path) as writer:
        for name, shape in SHAPES.items():
            writer.add_tensor(name, shape, types[name])
        for name, shape in SHAPES.items():
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
            writer.write_tensor(name, quantize(values, types[name]))
    with GGUFFile.open(path) as file:
        backend = CpuBackend(2)
        yield Setup(backend, file), Setup(FakeBackend(activation="q8"), file)
        backend.close()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(pair, operation):
    """``operation`` on either backend; results are new float32 tensors."""
    found, expected = (operation(setup) for setup in pair)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert expected.is_contiguous()
    return found, expected


def test_every_operation_has_the_signature_of_the_contract():
    for name, function in inspect.getmembers(Backend, inspect.isfunction):
        for backend in (CpuBackend, FakeBackend):
            if name != "__init__":
                assert inspect.signature(getattr(backend, name)) == inspect.signature(function), name


def test_embed(pair):
    ids = torch.tensor([5, 0, 99, 5], dtype=torch.int32)
    found, expected = both(pair, lambda s: s.backend.embed(ids, s.matrix("table")))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("add", [False, True])
def test_rms_norm(pair, add):
    residuals = [noise(7, HIDDEN, seed=2) if add else None for _ in pair]
    todo = iter(residuals)
    found, expected = both(
        pair, lambda s: s.backend.rms_norm(noise(7, HIDDEN), s.vector("norm"), 1e-6, next(todo))
    )
    assert close(found, expected)
    if add:
        assert torch.equal(residuals[0], residuals[1])
        assert torch.equal(residuals[0], noise(7, HIDDEN) + noise(7, HIDDEN, seed=2))


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_linear(pair, tokens):
    assert close(*both(pair, lambda s: s.backend.linear(noise(tokens, HIDDEN), s.matrix("linear"))))


@pytest.mark.parametrize("transposed", [True, False])
def test_absorb_q(pair, transposed):
    q = noise(5, HEADS, NOPE + ROPE)

    def operation(s):
        k_b = s.matrix("kv_b", HEADS, slice(0, NOPE)) if transposed else s.matrix("k_b", HEADS)
        return s.backend.absorb_q(q, k_b, NOPE, transposed=transposed)

    assert close(*both(pair, operation))


def test_project_v(pair):
    context = noise(5, HEADS, LATENT)
    part = slice(NOPE, NOPE + V_DIM)
    assert close(*both(pair, lambda s: s.backend.project_v(context, s.matrix("kv_b", HEADS, part))))


@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_append_and_attention(pair, fmt):
    # Two sequences: 70 tokens at once, and 3 after a cached one. Blocks lie scattered.
    def batch(positions, tables, starts, lengths):
        slots = [tables[s][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in positions]
        tensors = [[p for _, p in positions], slots, starts, lengths, tables]
        return AttentionBatch(*(torch.tensor(values, dtype=torch.int32) for values in tensors))

    tables = [[3, 1], [0, -1]]
    steps = [
        batch([(0, 0)], [tables[1]], [0, 1], [1]),
        batch([(0, p) for p in range(70)] + [(1, p) for p in (1, 2, 3)], tables, [0, 70, 73], [70, 4]),
    ]
    angles = torch.arange(80.0)[:, None] * torch.logspace(0, -3, ROPE // 2)
    rope = torch.stack((angles.cos(), angles.sin()), -1).contiguous()

    def operation(s):
        cache = s.backend.allocate_latent_cache(4, LATENT, ROPE, fmt)
        for seed, step in enumerate(steps):
            tokens = step.num_tokens
            q = noise(tokens, HEADS, NOPE + ROPE, seed=seed)
            kv = noise(tokens, LATENT + ROPE, seed=seed + 10)
            s.backend.mla_append(q, kv, s.vector("kv_norm"), 1e-6, rope, cache, step)
            q_latent = noise(tokens, HEADS, LATENT, seed=seed + 20)
            out = s.backend.mla_attention(q, q_latent, cache, step, 0.1)
        return torch.cat((out.flatten(), q.flatten()))

    found, expected = both(pair, operation)
    # A number that rounds to another side of a tie moves by a unit of the cache's format; the CPU's fixed
    # point has 12 bits for the largest number of a key.
    unit = 2.0**-12 + {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 127}[fmt]
    assert (found - expected).abs().max() <= (TOLERANCE + unit) * expected.abs().max()


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_grouped_append_and_attention(pair, fmt, halves):
    kv_heads, dim, rope_dim = 2, 64, 48
    angles = torch.arange(80.0)[:, None] * torch.logspace(0, -3, rope_dim // 2)
    rope = torch.stack((angles.cos(), angles.sin()), -1).contiguous()
    positions, slots = [*range(70), 0, 1, 2], [*range(192, 256), *range(64, 70), 0, 1, 2]
    tensors = [positions, slots, [0, 70, 73], [70, 3], [[3, 1], [0, -1]]]
    batch = AttentionBatch(*(torch.tensor(values, dtype=torch.int32) for values in tensors))

    def operation(s):
        cache = s.backend.allocate_kv_cache(4, kv_heads, dim, fmt)
        q, k, v = noise(73, 6, dim), noise(73, kv_heads, dim, seed=1), noise(73, kv_heads, dim, seed=2)
        s.backend.gqa_append(q, k, v, rope, cache, batch, halves=halves)
        out = s.backend.gqa_attention(q, cache, batch, dim**-0.5)
        return torch.cat((out.flatten(), q.flatten()))

    found, expected = both(pair, operation)
    unit = 2.0**-12 + {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 127}[fmt]
    assert (found - expected).abs().max() <= (TOLERANCE + unit) * expected.abs().max()


@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_copied_blocks_hold_the_same(pair, fmt):
    kv_norm, rope = "kv_norm", torch.ones(64, ROPE // 2, 2)

    def step(block):
        slots = torch.arange(block * BLOCK_SIZE, block * BLOCK_SIZE + 50, dtype=torch.int32)
        tensors = [list(range(50)), slots.tolist(), [0, 50], [50], [[block]]]
        return AttentionBatch(*(torch.tensor(values, dtype=torch.int32) for values in tensors))

    for s in pair:
        latents = s.backend.allocate_latent_cache(3, LATENT, ROPE, fmt)
        grouped = s.backend.allocate_kv_cache(3, 1, LATENT, fmt)
        q, kv, q_latent = noise(50, 1, ROPE), noise(50, LATENT + ROPE, seed=1), noise(50, 1, LATENT, seed=2)
        s.backend.mla_append(q, kv, s.vector(kv_norm), 1e-6, rope, latents, step(0))
        k = noise(50, 1, LATENT, seed=3)
        s.backend.gqa_append(q_latent, k, k, rope, grouped, step(0), halves=False)
        for cache in (latents, grouped):
            s.backend.copy_cache_blocks(cache, [(0, 2)])
        found = [s.backend.mla_attention(q, q_latent, latents, step(block), 0.1) for block in (0, 2)]
        assert torch.equal(*found)
        found = [s.backend.gqa_attention(q_latent, grouped, step(block), 0.1) for block in (0, 2)]
        assert torch.equal(*found)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("biased", [True, False])
def test_route(pair, scoring, groups, biased):
    config = RouterConfig(EXPERTS, 3, scoring, groups, 2 if groups > 1 else 1, True, 2.5)
    x = noise(50, HIDDEN) * 3
    results = [
        s.backend.route(x, s.matrix("router"), s.vector("bias") if biased else None, config) for s in pair
    ]
    (found_ids, found), (expected_ids, expected) = results
    assert torch.equal(found_ids, expected_ids)
    assert found_ids.dtype == expected_ids.dtype == torch.int32
    assert close(found, expected)


def test_route_breaks_ties_by_ascending_id(pair):
    config = RouterConfig(EXPERTS, 3, "softmax")
    for s in pair:
        ids, weights = s.backend.route(torch.zeros(2, HIDDEN), s.matrix("router"), None, config)
        assert ids.tolist() == [[0, 1, 2]] * 2
        assert torch.allclose(weights, torch.full((2, 3), 1 / EXPERTS))


def test_moe_skips_ids_of_minus_one(pair):
    ids = torch.tensor([[1, 7, -1], [-1, -1, -1], [0, 1, 2]], dtype=torch.int32)
    weights = noise(3, 3).abs()

    def operation(s):
        stacks = [s.matrix(name, EXPERTS) for name in ("gate", "up", "down")]
        return s.backend.moe(noise(3, HIDDEN, seed=1), *stacks, ids, weights)

    found, expected = both(pair, operation)
    assert close(found, expected)
    assert not found[1].any()


@pytest.mark.parametrize("selected", [(0, 1, 2, 3), (2, 5), (7,)], ids=["run", "apart", "one"])
def test_moe_of_some_experts_is_that_of_the_stack(pair, selected):
    """Loading a part of the experts reads those and no others, whether they follow each other or not."""
    wanted = torch.tensor([[e, -1] for e in selected], dtype=torch.int32)
    places = torch.tensor([[i, -1] for i in range(len(selected))], dtype=torch.int32)
    x, weights = noise(len(selected), HIDDEN), noise(len(selected), 2, seed=1).abs()
    for s in pair:
        names = ("gate", "up", "down")
        whole = [s.matrix(name, EXPERTS) for name in names]
        some = [s.matrix(name, EXPERTS, selected=selected) for name in names]
        found = s.backend.moe(x, *some, places, weights)
        assert torch.equal(found, s.backend.moe(x, *whole, wanted, weights))
        for part, stack in zip(some, whole, strict=True):
            share = s.backend.weight_bytes(stack) * len(selected) / EXPERTS
            assert s.backend.weight_bytes(part) == share


def test_mlp_is_an_expert_of_weight_one(pair):
    x = noise(4, HIDDEN)

    def operation(s):
        source = {name: s.file.tensors[name] for name in ("gate", "up", "down")}
        rows = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        first = [
            s.backend.load_matrix(TensorSource(s.file, source[name], 1, EXPERTS * r, c, 0, r))
            for name, (r, c) in rows.items()
        ]
        dense = s.backend.mlp(x, *first)
        stacks = [s.matrix(name, EXPERTS) for name in rows]
        ids, ones = torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1)
        assert close(s.backend.moe(x, *stacks, ids, ones), dense)
        return dense

    assert close(*both(pair, operation))


def test_weight_bytes_count_padding(pair):
    found, expected = (s.backend.weight_bytes(s.matrix("linear")) for s in pair)
    assert expected == WIDTH * HIDDEN * 4
    assert found == pair[0].file.tensors["linear"].n_bytes
    assert pair[0].backend.weight_bytes(pair[0].matrix("table")) > pair[0].file.tensors["table"].n_bytes
