"""Copies of hot experts on a device, in whole models: the same numbers, whatever is copied and when."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hybrid.backends import fake_streams
from hybrid.backends.fake import FakeBackend
from hybrid.backends.fake_streams import FakeEvent, FakeOptions
from hybrid.engine.torch_threads import single_torch_thread
from hybrid.errors import DeviceError, PlacementError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.models.loader import load_model
from hybrid.moe.cache import PolicyOptions
from hybrid.moe.copier import BUFFER_READ, SLOT_IS_FREE
from hybrid.moe.copies import ExpertCopies
from hybrid.moe.divide import StreamRates
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
    folder, rule, *, num_seqs=2, room=2, steps=STEPS, policy=None, each=lambda *_: None, pause=0.0, **more
):
    """Logits of some sequences after a prompt and in each of ``steps`` steps, fed with given tokens."""
    with GGUFFile.open(folder / "tiny.gguf") as file:
        found = plan(file, rule)
        model = load_model(file, plan=found, max_model_len=256, num_threads=2, kv_format="f32",
                           cache_options=policy, **more)  # fmt: skip
    ids = torch.randint(0, 1024, (num_seqs, PROMPT + steps), generator=torch.Generator().manual_seed(3)).int()
    rows = []
    try:
        model.allocate_cache(room)
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
    """Against counts of the routers' choices."""
    tables, usage = [], []

    def watch(model, step):
        tables.append(model._copies.slots.ready.copy())
        if step == PROMPT + STEPS - 1:
            usage.append(model.usage)
            usage.append(model.copy_stats)

    def count(model, step):
        if step == PROMPT:
            model.count_usage()
        watch(model, step)

    policy = PolicyOptions(interval=1)
    found = run(folder, rules(folder, "fakegpu:0", 8, policy="static"), policy=policy, each=count, pause=2e-3)
    assert all((table == tables[0]).all() for table in tables)
    assert (tables[0].sum(1) == 4).all() and tables[0][:, -4:].all()  # the most used of the profile
    counted, stats = usage
    # All prompts, and the steps but for the last three: two are on their way to the host, one is to come.
    prompts, steps = 2 * PROMPT, 2 * (STEPS - 1)
    assert counted.tokens == {"prompt": 0, "decode": steps}
    assert stats.uses == 4 * len(LAYERS) * (prompts + steps - 4)
    assert found.stats.uses > stats.uses > found.stats.hits > 0


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


def test_buffers_are_read_before_they_are_filled(folder, expected, options, monkeypatch):
    options.max_delay_s, options.drop = 5e-3, (BUFFER_READ, None)
    monkeypatch.setattr("hybrid.moe.copier._NUM_BUFFERS", 1)
    cache = rules(folder, "fakegpu:0", 8, policy="dynamic")
    found = run(folder, cache, policy=RESTLESS, pause=5e-3)
    with pytest.raises(AssertionError):
        assert_close(found.logits, expected["fakegpu:0"])


class BetweenLayers:
    """A prompt that is computed layer by layer between steps, over and over, on a device that is behind."""

    def __init__(self, monkeypatch, slow):
        self.steps, self.logits = None, []
        self.ids = torch.arange(40, 40 + PROMPT, dtype=torch.int32)
        moe = FakeBackend.moe

        def late(backend, x, *args):
            time.sleep(0.03 if slow and len(x) == PROMPT else 0)
            return moe(backend, x, *args)

        monkeypatch.setattr(FakeBackend, "moe", late)

    def __call__(self, model, step):
        if self.steps is None:
            self.steps = model.forward_layers(self.ids, batch([2], 0, PROMPT))
        try:
            while next(self.steps) == "attention":
                pass  # to the end of the layer
        except StopIteration as done:
            self.logits.append(model.compute_logits(done.value).clone())
            self.steps = None


@pytest.mark.parametrize("drop", [None, (SLOT_IS_FREE, None)])
def test_prompts_between_steps_keep_the_copies_they_use(folder, expected, options, monkeypatch, drop):
    """Replacement races with a layer that is still queued; the wait is what keeps its slot."""
    plain, raced = BetweenLayers(monkeypatch, slow=False), BetweenLayers(monkeypatch, slow=True)
    run(folder, rules(folder, "fakegpu:0"), each=plain, room=3)
    options.drop = drop
    cache = rules(folder, "fakegpu:0", 8, policy="dynamic")
    # As where experts are streamed, layers of prompts end with work queued.
    rates = StreamRates(0.0, 0.0, 1.0, 0.0)
    found = run(folder, cache, policy=RESTLESS, each=raced, room=3, pause=1e-2, stream_rates=rates)
    assert len(raced.logits) == len(plain.logits) == STEPS // 4
    if drop is None:
        assert_close(torch.cat(raced.logits), torch.cat(plain.logits))
        assert_close(found.logits, expected["fakegpu:0"])
    else:
        with pytest.raises(AssertionError):
            assert_close(torch.cat(raced.logits), torch.cat(plain.logits))


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
    for type_ in (GGMLType.Q4_K, GGMLType.F32, GGMLType.Q8_0):
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
