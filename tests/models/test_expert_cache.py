"""Copies of hot experts on a device, in whole models: the same numbers, whatever is copied and when."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hybrid.backends import fake_streams
from hybrid.backends.fake_streams import FakeEvent, FakeOptions
from hybrid.engine.torch_threads import single_torch_thread
from hybrid.errors import DeviceError, PlacementError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.models.loader import load_model
from hybrid.moe.cache import PolicyOptions
from hybrid.moe.copier import BUFFER_READ, SLOT_IS_FREE
from hybrid.moe.copies import ExpertCopies
from hybrid.placement.planner import plan
from hybrid.placement.usage import Usage, UsageProfile, identify, write_profile
from hybrid.synth import Formats, resolve_shape, synthesise

EXPERTS, LAYERS, PROMPT, STEPS = 16, (1, 2), 12, 24
F32 = GGMLType.F32
EXPERT_BYTES = 3 * 64 * 256 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of float weights, so that devices differ by the order of sums alone, and a profile of it."""
    path = tmp_path_factory.mktemp("cache")
    shape = resolve_shape("tiny", num_experts=EXPERTS, moe_intermediate_size=64)
    synthesise(path / "tiny.gguf", shape, Formats(F32, F32, F32, F32, F32, F32))
    with GGUFFile.open(path / "tiny.gguf") as file:
        counts = {"prompt": (0,) * EXPERTS, "decode": tuple(range(EXPERTS))}
        usage = Usage({"prompt": 0, "decode": 100}, dict.fromkeys(LAYERS, counts))
        write_profile(UsageProfile(identify(file), EXPERTS, 4, usage), path / "usage.json")
    return path


def rules(folder, device, cache=None, **changes):
    found = {
        "version": 1,
        "rules": [
            {"select": {"role": "routed_experts"}, "place": {"device": "cpu"}},
            {"select": {"name": "*"}, "place": {"device": device}},
        ],
    }
    if cache is not None:
        found["experts"] = {"cache": {"device": device, "bytes": f"{cache * EXPERT_BYTES}B", **changes}}
        if changes.get("policy") == "static":
            found["experts"]["cache"]["profile"] = str(folder / "usage.json")
    return found


@pytest.fixture
def options(monkeypatch):
    """Those of all test devices that are made from now on."""
    found = FakeOptions(seed=1, max_delay_s=2e-4)
    monkeypatch.setattr(fake_streams, "FakeOptions", lambda: found)
    return found


@dataclass
class Result:
    logits: torch.Tensor
    stats: object
    copies: ExpertCopies | None


def run(
    folder, rule, *, num_seqs=2, steps=STEPS, policy=None, each=lambda model, step: None, pause=0.0, **more
):
    """Logits of some sequences after a prompt and in each of ``steps`` steps, fed with given tokens."""
    with GGUFFile.open(folder / "tiny.gguf") as file:
        found = plan(file, rule)
        model = load_model(file, plan=found, max_model_len=256, num_threads=2, kv_format="f32",
                           cache_options=policy, **more)  # fmt: skip
    ids = torch.randint(0, 1024, (num_seqs, PROMPT + steps), generator=torch.Generator().manual_seed(3)).int()
    rows = []
    try:
        model.allocate_cache(num_seqs)
        with single_torch_thread(), torch.inference_mode():
            for sequence in range(num_seqs):
                hidden = model.forward(ids[sequence, :PROMPT].contiguous(), batch([sequence], 0, PROMPT))
                rows.append(model.compute_logits(hidden).clone())
            for step in range(PROMPT, PROMPT + steps):
                each(model, step)
                logits = model.decode(ids[:, step].contiguous(), batch(range(num_seqs), step, 1))
                rows.append(logits.clone())
                time.sleep(pause)
        return Result(torch.cat(rows), model.copy_stats, model._copies)
    finally:
        model.close()


def batch(sequences, start, count):
    """Tokens of sequences that have a cache block each."""
    sequences = list(sequences)
    positions = torch.arange(start, start + count, dtype=torch.int32).repeat(len(sequences))
    blocks = torch.tensor(sequences, dtype=torch.int32)
    return AttentionBatch(
        positions=positions,
        slot_mapping=positions + blocks.repeat_interleave(count) * BLOCK_SIZE,
        query_start=torch.arange(len(sequences) + 1, dtype=torch.int32) * count,
        seq_lens=torch.full((len(sequences),), start + count, dtype=torch.int32),
        block_tables=blocks[:, None],
    )


def assert_close(found, expected):
    # Sums of at most 256 float products in another order, through three layers.
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    gap = expected.topk(2).values
    clear = (gap[:, 0] - gap[:, 1]) > 4e-3 * expected.abs().max()
    assert clear.sum() > len(expected) // 2
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


RESTLESS = PolicyOptions(half_life=8, hysteresis=1.0, min_uses=0.0, max_copies=3, interval=1)


@pytest.fixture(scope="module")
def expected(folder):
    """By device: without copies. What decode steps hand over is rounded to bfloat16 with and without them."""
    return {device: run(folder, rules(folder, device)).logits for device in ("fake:0", "fakegpu:0")}


@pytest.mark.parametrize("policy", ["static", "dynamic"])
@pytest.mark.parametrize("device", ["fake:0", "fakegpu:0"])
@pytest.mark.parametrize("count", [1, 8, 32])
def test_copies_change_no_text(folder, expected, options, device, policy, count):
    found = run(folder, rules(folder, device, count, policy=policy), policy=RESTLESS, pause=1e-3)
    assert_close(found.logits, expected[device])
    assert found.stats.copies >= count and found.stats.n_bytes == found.stats.copies * EXPERT_BYTES
    assert 0 < found.stats.hits <= found.stats.uses
    if count == 32:
        assert found.stats.hits == found.stats.uses  # there is a copy of every expert
    if policy == "dynamic" and count == 8:
        assert found.stats.copies > 12


@pytest.mark.parametrize("use_graphs", [True, False])
def test_graphs_follow_the_table(folder, expected, options, use_graphs):
    cache = rules(folder, "fakegpu:0", 6, policy="dynamic")
    found = run(folder, cache, policy=RESTLESS, pause=2e-3, use_graphs=use_graphs)
    assert_close(found.logits, expected["fakegpu:0"])
    assert found.stats.copies > 20


def test_a_static_cache_gives_the_same_bits_again(folder, options):
    cache = rules(folder, "fakegpu:0", 8, policy="static")
    first, second = (run(folder, cache).logits for _ in range(2))
    assert torch.equal(first, second)


def test_hits_are_counted_exactly(folder, options):
    """Against the routers' choices, seen by Python in every step."""
    seen = {layer: [] for layer in LAYERS}
    tables = []

    def watch(model, step):
        if step == PROMPT:
            for layer in LAYERS:
                model._network.moes[layer].router.backend.count_experts  # noqa: B018
        tables.append(model._copies.slots.ready.copy())

    cache = rules(folder, "fakegpu:0", 8, policy="static")
    found = run(folder, cache, each=watch)
    assert all((table == tables[0]).all() for table in tables) and seen
    assert (tables[0].sum(1) == [4, 4]).all() and tables[0][:, -4:].all()  # the most used of the profile
    assert found.stats.uses % 4 == 0 and found.stats.uses >= 2 * PROMPT * 4 * len(LAYERS)


def test_a_corrupted_slot_is_noticed(folder, expected, options):
    def corrupt(model, step):
        if step == PROMPT + 4:
            model._copies._stacks[0][2].values[0] *= -1

    found = run(folder, rules(folder, "fakegpu:0", 32, policy="static"), each=corrupt)
    same = 2 * PROMPT + 2 * 4
    assert_close(found.logits[:same], expected["fakegpu:0"][:same])
    with pytest.raises(AssertionError):
        assert_close(found.logits[same:], expected["fakegpu:0"][same:])


class Slow:
    """A copy whose unpacking takes long, as of a large expert."""

    def __init__(self, monkeypatch, seconds):
        from hybrid.backends.fake import FakeBackend

        unpack = FakeBackend.unpack

        def slow(backend, stack, index, packed):
            stack.values[index] = float("nan")
            time.sleep(seconds)
            unpack(backend, stack, index, packed)

        monkeypatch.setattr(FakeBackend, "unpack", slow)


def test_no_step_waits_for_a_copy(folder, expected, options, monkeypatch):
    cache = rules(folder, "fakegpu:0", 4, policy="dynamic")
    begun = time.monotonic()
    slow = []

    def each(model, step):
        if step == PROMPT:
            Slow(monkeypatch, 0.25)  # the copies at the start were quick
        slow.append((time.monotonic() - begun, len(model._copies._jobs)))

    found = run(folder, cache, policy=RESTLESS, each=each)
    assert max(under_way for _, under_way in slow) == 3  # and no more at once
    assert_close(found.logits, expected["fakegpu:0"])
    assert slow[-1][0] - slow[1][0] < 20 * 0.75 * 0.5  # a fraction of what the copies take


def test_a_table_that_is_early_is_noticed(folder, expected, options, monkeypatch):
    """If a copy counted as there before it is, a step would use half of it."""

    def each(model, step):
        if step == PROMPT:
            Slow(monkeypatch, 0.05)
            monkeypatch.setattr(FakeEvent, "is_done", lambda self: True)

    cache = rules(folder, "fakegpu:0", 8, policy="dynamic")
    found = run(folder, cache, policy=RESTLESS, each=each)
    with pytest.raises(AssertionError):
        assert_close(found.logits, expected["fakegpu:0"])


@pytest.mark.parametrize("site", [SLOT_IS_FREE, BUFFER_READ])
def test_every_wait_is_needed(folder, expected, options, monkeypatch, site):
    options.max_delay_s = 5e-3
    options.drop = site, None
    monkeypatch.setattr("hybrid.moe.copier._NUM_BUFFERS", 1)
    wrong = 0
    for seed in range(6):
        options.seed = seed
        cache = rules(folder, "fakegpu:0", 8, policy="dynamic")
        found = run(folder, cache, policy=RESTLESS, pause=5e-3)
        try:
            assert_close(found.logits, expected["fakegpu:0"])
        except AssertionError:
            wrong += 1
            break
    assert wrong, f"nothing misses the wait {site!r}"


def test_a_copy_that_fails_ends_the_model(folder, options, monkeypatch):
    from hybrid.moe.copier import CopySource

    def each(model, step):
        if step == PROMPT:
            monkeypatch.setattr(CopySource, "read", lambda *_: (_ for _ in ()).throw(OSError("broken")))

    with pytest.raises(DeviceError, match="copying an expert to fakegpu:0 failed: OSError"):
        run(folder, rules(folder, "fakegpu:0", 4, policy="dynamic"), policy=RESTLESS, each=each, pause=1e-3)


def test_a_cache_needs_a_device_of_the_layers(folder):
    rule = rules(folder, "fakegpu:0", 4)
    rule["experts"]["cache"]["device"] = "fakegpu:1"
    with pytest.raises(PlacementError, match="no layer runs on fakegpu:1"):
        run(folder, rule)


def test_no_thread_is_left(folder, options):
    import threading

    run(folder, rules(folder, "fakegpu:0", 4), steps=1)
    assert not [thread.name for thread in threading.enumerate() if "copies" in thread.name]


def test_packed_parts_are_read_as_one_piece(tmp_path):
    """Of copies, slices of the rows and of the columns, as nodes have them."""
    from hybrid.kernels import cpu

    from hybrid.backends.cpu import CpuBackend
    from hybrid.gguf import quantize

    backend = CpuBackend(1)
    values = np.random.default_rng(0).standard_normal((3, 80, 512), dtype=np.float32)
    for type_ in (GGMLType.Q4_K, GGMLType.F32, GGMLType.IQ1_S if False else GGMLType.Q8_0):
        rows = np.ascontiguousarray(quantize(values, type_)).view(np.uint8).reshape(3, 80, -1)
        pieces = []
        for division, cuts in (("none", []), ("copies", []), ("batch", [0, 2, 3]), ("rows", [0, 32, 80]),
                               ("cols", [0, 256, 512])):  # fmt: skip
            nodes = [-1] if division == "none" else [-1, -1]
            matrix = cpu.PackedMatrix(int(type_), 3, 80, 512, division, nodes, cuts)
            for index in range(3):
                matrix.pack_rows(backend.pool, index, 0, 80, rows[index].ctypes.data)
            out = torch.full((3, backend.packed_shape(matrix).n_bytes), 7, dtype=torch.uint8)
            for index in range(3):
                backend.read_packed(matrix, index, out[index])
            pieces.append(out)
        assert all(torch.equal(piece, pieces[0]) for piece in pieces)
        again = np.empty_like(rows[1])
        cpu.PackedMatrix.over(int(type_), 1, 80, 512, pieces[0][1].data_ptr()).unpack_rows(
            0, 0, 80, again.ctypes.data
        )
        np.testing.assert_array_equal(again, rows[1])
    backend.close()
