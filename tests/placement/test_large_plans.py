"""Plans of a 671 B model on one 24 GiB GPU and much RAM, from headers alone."""

from __future__ import annotations

import math
import time

import gguf
import pytest

from hybrid.errors import CapacityError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.placement.machine import GIB, Device, Machine
from hybrid.placement.memory import RunSize
from hybrid.placement.planner import plan
from hybrid.synth import Formats, resolve_shape, synthesise

# Formats of experts' gate and up, experts' down, dense blocks, attention, embedding, output.
MIXES = {
    "IQ1_S": ("IQ1_S", "IQ2_XXS", "Q6_K", "Q6_K", "Q4_K", "Q6_K"),
    "Q2_K": ("Q2_K", "Q3_K", "Q4_K", "Q8_0", "Q4_K", "Q6_K"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K", "Q8_0", "Q4_K", "Q6_K"),
}
TOTAL_BYTES = {"IQ1_S": 155608159744, "Q2_K": 252645015552, "Q4_K_M": 440927731712}
# Without experts, and with those of as many last layers as fit beside the cache.
GPU_BYTES = {
    "IQ1_S": {4096: 13747246592, 32768: 13747246592, 65536: 13747246592},
    "Q2_K": {4096: 23584522240, 32768: 19503464448, 65536: 19503464448},
    "Q4_K_M": {4096: 23698178048, 32768: 16387506176, 65536: 16387506176},
}
CACHE_BYTES = {4096: 287834112, 32768: 2302672896, 65536: 4605345792}
# (GiB of RAM, NUMA nodes) -> what becomes of the CPU's weights, for every context; None: refused.
NUMA = {
    "IQ1_S": {
        (192, 1): "none", (192, 2): "shard", (384, 1): "none", (384, 2): "replicate",
        (512, 1): "none", (512, 2): "replicate", (768, 1): "none", (768, 2): "replicate",
    },
    "Q2_K": {
        (192, 1): None, (192, 2): None, (384, 1): "none", (384, 2): "shard",
        (512, 1): "none", (512, 2): "replicate", (768, 1): "none", (768, 2): "replicate",
    },
    "Q4_K_M": {
        (192, 1): None, (192, 2): None, (384, 1): None, (384, 2): None,
        (512, 1): "none", (512, 2): "shard", (768, 1): "none", (768, 2): "shard",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    for mix, names in MIXES.items():
        formats = Formats(*(GGMLType[name] for name in names))
        synthesise(folder / mix, resolve_shape("deepseek-v3"), formats, header_only=True)
    return folder


def machine(gib: int, nodes: int) -> Machine:
    devices = (Device("cpu", gib * GIB), Device("cuda:0", 24 * GIB))
    return Machine(devices, nodes, num_threads=64, isa="avx2", numa=nodes > 1, imagined=True)


def brute_force(file: GGUFFile) -> int:
    """Bytes by the gguf package's own block sizes."""
    total = 0
    for info in file.tensors.values():
        block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[info.type.name]]
        total += math.prod(info.shape) // block * n_bytes
    return total


def recoding_bytes(file: GGUFFile) -> int:
    """What packing IQ1_S adds: 920 bytes for 16 rows of a block in place of 800. All is on the CPU."""
    shapes = [info.shape for info in file.tensors.values() if info.type.name == "IQ1_S"]
    return sum(math.prod(shape) // 256 // 16 * 120 for shape in shapes)


@pytest.fixture(scope="module", params=MIXES)
def opened(request, headers):
    """Name of the mix, and its file."""
    with GGUFFile.open(headers / request.param, header_only=True) as file:
        yield request.param, file


def test_totals_are_those_of_the_gguf_package(opened):
    mix, file = opened
    assert brute_force(file) == TOTAL_BYTES[mix]


@pytest.mark.parametrize("context", CACHE_BYTES)
@pytest.mark.parametrize("gib, nodes", NUMA["Q2_K"])
def test_bytes_on_each_device(opened, gib, nodes, context):
    mix, file = opened
    numa = NUMA[mix][gib, nodes]
    if numa is None:
        table = r"\n  device .*\n  cpu .*\n  cuda:0 "
        with pytest.raises(CapacityError, match=rf"does not fit on cpu \(.* too much\){table}"):
            plan(file, machine=machine(gib, nodes), size=RunSize(context))
        return
    found = plan(file, machine=machine(gib, nodes), size=RunSize(context))
    cpu, gpu = found.memory["cpu"], found.memory["cuda:0"]
    assert gpu.weights_bytes == GPU_BYTES[mix][context]
    copies = 2 if numa == "replicate" else 1
    on_cpu = TOTAL_BYTES[mix] - gpu.weights_bytes + recoding_bytes(file)
    assert cpu.weights_bytes == on_cpu * copies
    assert {p.numa for p in found.placements.values() if p.device == "cpu"} == {numa}
    assert (gpu.kv_cache_bytes, cpu.kv_cache_bytes) == (CACHE_BYTES[context], 0)
    assert gpu.total_bytes <= 24 * GIB and cpu.total_bytes <= gib * GIB


@pytest.mark.parametrize("context", CACHE_BYTES)
@pytest.mark.parametrize("gib, nodes", NUMA["Q2_K"])
@pytest.mark.parametrize("mix", MIXES)
def test_opening_and_planning_take_less_than_a_second(headers, mix, gib, nodes, context):
    """Of processor time, refusals included."""
    begin = time.process_time()
    with GGUFFile.open(headers / mix, header_only=True) as file:
        if NUMA[mix][gib, nodes] is None:
            with pytest.raises(CapacityError):
                plan(file, machine=machine(gib, nodes), size=RunSize(context))
        else:
            plan(file, machine=machine(gib, nodes), size=RunSize(context))
    assert time.process_time() - begin < 1


def test_a_refusal_that_finds_what_fits_takes_less_than_two_seconds(headers):
    """It tries contexts, batches and cache formats on both nodes: about 0.7 s."""
    tight = Machine((Device("cpu", 236 * GIB),), 2, num_threads=64, isa="avx2", numa=True, imagined=True)
    size = RunSize(163840, max_num_seqs=4, max_num_batched_tokens=4096)
    begin = time.process_time()
    with (
        GGUFFile.open(headers / "Q2_K", header_only=True) as file,
        pytest.raises(CapacityError, match=r"a context of 768 tokens \(-c 768\) and 256 tokens a step"),
    ):
        plan(file, machine=tight, size=size)
    assert time.process_time() - begin < 2


def test_the_gpu_takes_what_every_token_reads(headers):
    with GGUFFile.open(headers / "Q4_K_M", header_only=True) as file:
        found = plan(file, machine=machine(512, 1), size=RunSize(32768))
    on = {name: placement.device for name, placement in found.placements.items()}
    assert on["token_embd.weight"] == "cpu"
    assert on["output.weight"] == on["blk.0.attn_q_b.weight"] == on["blk.60.ffn_up_shexp.weight"] == "cuda:0"
    assert on["blk.3.ffn_gate_exps.weight"] == on["blk.60.ffn_down_exps.weight"] == "cpu"


def test_auto_composes_with_rules(headers):
    experts = {"role": "routed_experts", "layers": "3-4"}
    rules = {
        "version": 1,
        "rules": [
            {"select": experts, "place": {"device": "cuda:0"}},
            {"select": {"role": "attention", "layers": "0-9"}, "place": {"device": "cpu"}},
        ],
    }
    with GGUFFile.open(headers / "Q2_K", header_only=True) as file:
        found = plan(file, rules, machine=machine(512, 1), size=RunSize(32768))
    on = {name: placement.device for name, placement in found.placements.items()}
    assert on["blk.4.ffn_up_exps.weight"] == "cuda:0" and on["blk.5.ffn_up_exps.weight"] == "cpu"
    # What is computed with it and not named goes along; the cache lies where attention runs.
    assert on["blk.9.attn_norm.weight"] == "cpu" and on["blk.10.attn_norm.weight"] == "cuda:0"
    assert found.memory["cpu"].kv_cache_bytes == CACHE_BYTES[32768] // 61 * 10
    assert found.memory["cuda:0"].kv_cache_bytes == CACHE_BYTES[32768] // 61 * 51
    assert on["blk.9.ffn_up_shexp.weight"] == "cuda:0"
    assert found.memory["cuda:0"].total_bytes <= 24 * GIB


def test_rules_that_overfill_a_gpu_are_refused(headers):
    rules = {"version": 1, "rules": [{"select": {"layers": "3-9"}, "place": {"device": "cuda:0"}}]}
    with (
        GGUFFile.open(headers / "Q2_K", header_only=True) as file,
        pytest.raises(CapacityError, match=r"(?s)fit on cuda:0.*that take .* from cuda:0 to the cpu, such"),
    ):
        plan(file, rules, machine=machine(512, 1), size=RunSize(4096))


def test_fitting_shortens_the_context_to_the_longest_that_fits(headers):
    small = Machine((Device("cpu", 160 * GIB),), num_threads=8)
    with GGUFFile.open(headers / "IQ1_S", header_only=True) as file:
        with pytest.raises(CapacityError, match=r"a context of (\d+) tokens \(-c \1\)"):
            plan(file, machine=small, size=RunSize(163840))
        found = plan(file, machine=small, size=RunSize(163840), fit=True)
        told = f"there is: {found.size.max_model_len} tokens of context in place of 163840"
        assert told in found.warnings[0]
        assert found.size.max_num_batched_tokens == 512
        longer = RunSize(found.size.max_model_len + 256)
        with pytest.raises(CapacityError):
            plan(file, machine=small, size=longer)


def test_a_cache_for_fewer_contexts_than_may_run_is_told(headers):
    with GGUFFile.open(headers / "IQ1_S", header_only=True) as file:
        one, eight = (RunSize(8192, max_num_seqs=n) for n in (1, 8))
        room = plan(file, size=one).memory["cpu"].total_bytes + GIB
        found = plan(file, machine=Machine((Device("cpu", room),), num_threads=1), size=eight)
        whole = plan(file, size=eight)
    assert found.size.cache_tokens < 8 * 8192
    told = f"{found.size.cache_tokens} tokens of cache for all sequences in place of {8 * 8192}"
    assert told in found.warnings[0]
    assert not any("tokens of cache" in warning for warning in whole.warnings)


def test_fitting_takes_smaller_steps_where_no_context_fits(headers):
    with GGUFFile.open(headers / "IQ1_S", header_only=True) as file:
        weights = plan(file).memory["cpu"].weights_bytes
        tight = Machine((Device("cpu", weights + 400 * (1 << 20)),), num_threads=8)
        found = plan(file, machine=tight, size=RunSize(4096), fit=True)
        assert found.size.max_num_batched_tokens < 512
        assert f"{found.size.max_num_batched_tokens} tokens a step in place of 512" in found.warnings[0]
        hopeless = Machine((Device("cpu", weights),), num_threads=8)
        with pytest.raises(CapacityError, match=r"more RAM \(--ram\), or as much less of weights"):
            plan(file, machine=hopeless, size=RunSize(4096), fit=True)


def test_warnings_say_what_cannot_be_loaded(headers):
    with GGUFFile.open(headers / "IQ1_S", header_only=True) as file:
        size = RunSize(4096, kv_format="q8_0")
        found = plan(file, machine=machine(384, 2), size=size)
    text = "\n".join(found.warnings)
    assert "has not run on a GPU yet" in text
    assert found.memory["cuda:0"].kv_cache_bytes == 61 * 4096 * 612
