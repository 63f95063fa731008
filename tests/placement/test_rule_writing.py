"""Plans written as rule files mean the same plan; llama.cpp's flags mean the same placement."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.config import model_path
from hybrid.errors import PlacementError
from hybrid.gguf import GGUFFile
from hybrid.placement.machine import GIB, Device, Machine
from hybrid.placement.memory import RunSize
from hybrid.placement.planner import Planner
from hybrid.placement.rules import load_rules
from hybrid.placement.rules.flags import PlacementFlags, with_flags
from hybrid.placement.rules.writing import rule_file
from hybrid.synth import resolve_shape, synthesise

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for shape in ("deepseek-v3", "deepseek-v2-lite"):
        synthesise(folder / shape, resolve_shape(shape), header_only=True)
    synthesise(folder / "tiny", resolve_shape("tiny", num_layers=5), header_only=True)
    return folder


def machine(*gpus: int, nodes: int = 1) -> Machine:
    devices = [Device(f"cuda:{i}", n_bytes) for i, n_bytes in enumerate(gpus)]
    return Machine((Device("cpu", 600 * GIB), *devices), nodes, num_threads=8, numa=nodes > 1)


def written(file, given, size, path):
    """Digests of auto's plan and of the plan of what is written about it."""
    planner = Planner(file, "auto", given)
    found = planner.plan(size)
    text = rule_file(planner.model, found, file.path.name, file.architecture)
    path.write_text(text, encoding="utf-8")
    return found, Planner(file, path, given).plan(size), text


CASES = {
    "demo": (None, machine(), 2048),
    "demo on a GPU": (None, machine(GIB), 2048),
    "all of V2-Lite": ("deepseek-v2-lite", machine(24 * GIB), 8192),
    "some of V2-Lite": ("deepseek-v2-lite", machine(6 * GIB), 8192),
    "little of V2-Lite": ("deepseek-v2-lite", machine(GIB), 8192),
    "V3": ("deepseek-v3", machine(24 * GIB, nodes=2), 32768),
    "V3 on two": ("deepseek-v3", machine(24 * GIB, 16 * GIB), 32768),
    "V3 on a small one": ("deepseek-v3", machine(8 * GIB), 32768),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_gives_the_same_plan(folder, tmp_path, case):
    name, given, tokens = CASES[case]
    path = model_path(None) if name is None else folder / name
    with GGUFFile.open(path, header_only=True) as file:
        found, again, text = written(file, given, RunSize(tokens), tmp_path / "r.yaml")
    assert again.digest() == found.digest()
    assert {n: m.total_bytes for n, m in again.memory.items()} == {
        n: m.total_bytes for n, m in found.memory.items()
    }
    assert all(line.startswith(("#", " ", "version", "arch", "rules", "budget", "kv")) or not line
               for line in text.splitlines())  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(700 * MIB, 760 * MIB), min_size=1, max_size=2))
def test_whatever_fits_the_gpus(folder, tmp_path_factory, gpus):
    with GGUFFile.open(folder / "tiny", header_only=True) as file:
        path = tmp_path_factory.mktemp("w") / "r.yaml"
        found, again, _ = written(file, machine(*gpus), RunSize(2048), path)
    assert again.digest() == found.digest()


def test_the_text(folder, tmp_path):
    with GGUFFile.open(folder / "deepseek-v3", header_only=True) as file:
        *_, text = written(file, machine(24 * GIB), RunSize(32768), tmp_path / "r.yaml")
    assert (
        text
        == """\
# Placement of deepseek-v3, as auto chose it for this machine with 600.00 GiB of cpu and 24.00 GiB of cuda:0
# and a context of 32768 tokens.
# The first rule that matches a tensor decides; auto places what no rule matches.
# `hybrid rules check FILE --model MODEL` tells what is wrong, `hybrid plan MODEL --rules FILE` what it does.
version: 1
architecture: ["deepseek2"]
rules:
  # embedding: 0.49 GiB
  - select: {role: embedding}
    place: {device: cpu}
  # norm, output, attention, dense_ffn, router, shared_experts: 9.29 GiB
  - select: {role: [norm, output, attention, dense_ffn, router, shared_experts]}
    place: {device: "cuda:0"}
  # routed_experts: 336.66 GiB
  - select: {role: routed_experts, layers: "3-59"}
    place: {device: cpu}
  # routed_experts: 5.91 GiB
  - select: {role: routed_experts, layers: "60"}
    place: {device: "cuda:0"}

# Sections that may be changed. An option on the command line wins over the file.
# kv_cache: {max_tokens: 32768, format: f16}
# budget: {cpu: 614400MiB}
budget:
  "cuda:0": 24GiB
"""
    )


def test_odd_names_do_no_harm(tmp_path):
    with GGUFFile.open(model_path(None), header_only=True) as file:
        planner = Planner(file, "auto", machine())
        text = rule_file(planner.model, planner.plan(RunSize(64)), "a\nversion: 2\x00", "x: [")
    (tmp_path / "r.yaml").write_text(text)
    assert load_rules(tmp_path / "r.yaml").architectures == {"x: ["}


def flagged(**flags):
    return with_flags("auto", PlacementFlags(**flags), 5, ("cuda:0",))


def devices(folder, rules):
    with GGUFFile.open(folder / "tiny", header_only=True) as file:
        found = Planner(file, rules, machine(4 * GIB)).plan(RunSize(2048))
    return {name: placement.device for name, placement in found.placements.items()}


def layers_on_gpu(on):
    return sorted(
        {int(n.split(".")[1]) for n, device in on.items() if n[:4] == "blk." and device == "cuda:0"}
    )


@pytest.mark.parametrize(
    "number, layers, output",
    [
        (0, [], "cpu"),
        (1, [], "cuda:0"),
        (3, [3, 4], "cuda:0"),
        (6, [0, 1, 2, 3, 4], "cuda:0"),
        (99, [0, 1, 2, 3, 4], "cuda:0"),
    ],
)
def test_ngl_counts_the_output_first_and_then_the_last_layers(folder, number, layers, output):
    rules = flagged(num_gpu_layers=number)
    assert {rule.origin for rule in rules.rules} == {f"-ngl {number}"}
    on = devices(folder, rules)
    assert layers_on_gpu(on) == layers
    assert {on["output.weight"], on["output_norm.weight"]} == {output}
    assert on["token_embd.weight"] == "cpu"
    assert {on[f"blk.{i}.ffn_gate_exps.weight"] for i in layers if i} <= {"cuda:0"}


def test_experts_stay_on_the_cpu(folder):
    on = devices(folder, flagged(num_gpu_layers=99, cpu_moe=True))
    assert {device for name, device in on.items() if "_exps" in name} == {"cpu"}
    assert on["blk.1.attn_output.weight"] == "cuda:0"
    some = devices(folder, flagged(num_gpu_layers=99, num_cpu_moe_layers=3))
    assert [some[f"blk.{i}.ffn_up_exps.weight"] for i in (1, 2, 3, 4)] == ["cpu", "cpu", "cuda:0", "cuda:0"]
    every = devices(folder, flagged(num_gpu_layers=99, num_cpu_moe_layers=999))
    assert {device for name, device in every.items() if "_exps" in name} == {"cpu"}


def test_layers_whose_experts_stay_may_be_dense(folder):
    """Layer 0 is: as in llama.cpp that is no mistake."""
    on = devices(folder, flagged(num_gpu_layers=99, num_cpu_moe_layers=1))
    assert on["blk.1.ffn_up_exps.weight"] == "cuda:0"


def test_overrides_come_first_and_in_order(folder):
    texts = (r"blk\.[1-2]{1,2}\.ffn_.*_exps=CUDA0,token_embd=cuda:0", "^output=fake:0")
    rules = flagged(overrides=texts, cpu_moe=True, num_gpu_layers=0)
    assert [rule.origin for rule in rules.rules][:4] == [
        r"-ot blk\.[1-2]{1,2}\.ffn_.*_exps=CUDA0", "-ot token_embd=cuda:0", "-ot ^output=fake:0", "-cmoe",
    ]  # fmt: skip
    on = devices(folder, rules)
    assert on["token_embd.weight"] == on["blk.2.ffn_down_exps.weight"] == "cuda:0"
    assert on["blk.3.ffn_down_exps.weight"] == "cpu" and on["output.weight"] == "fake:0"
    assert on["blk.3.attn_output.weight"] == "cpu"


def test_flags_come_before_rules_and_may_override_them(folder):
    inner = {
        "version": 1,
        "rules": [{"select": {"role": "routed_experts"}, "place": {"device": "fake:1"}}],
        "kv_cache": {"max_tokens": 777},
    }
    rules = with_flags(inner, PlacementFlags(cpu_moe=True), 5, ())
    assert [(rule.origin, rule.depth) for rule in rules.rules] == [("-cmoe", 0), ("<rules>.rules[0]", 1)]
    assert rules.kv_cache.max_tokens == 777
    assert devices(folder, rules)["blk.1.ffn_up_exps.weight"] == "cpu"


def test_without_flags_rules_are_as_they_were():
    inner = {"version": 1}
    assert with_flags(inner, PlacementFlags(num_cpu_moe_layers=0), 5, ()) is inner


NOT_A_PAIR = "-ot: expected REGEX=DEVICE, as in exps=CPU, found "
WRONG = [
    ({"overrides": ("exps",)}, 1, "auto", f"{NOT_A_PAIR}'exps'"),
    ({"overrides": ("a=CPU,b",)}, 1, "auto", f"{NOT_A_PAIR}'a=CPU,b'"),
    ({"overrides": ("=CPU",)}, 1, "auto", "-ot =CPU: regex: expected 1 to 1000 characters, found 0"),
    (
        {"overrides": ("a=GPU1",)},
        1,
        "auto",
        "-ot a=GPU1: device: expected cpu, cuda:N or fake:N, found 'GPU1'; did you mean 'cuda:1'?",
    ),
    (
        {"num_gpu_layers": 3},
        1,
        "all-cpu",
        "-ngl: it places all layers, and so do --rules; give one of them",
    ),
    (
        {"num_gpu_layers": 3},
        2,
        "auto",
        "-ngl 3: it fills one GPU, and there are cuda:0, cuda:1; write rules, or leave it out to fill them "
        "all",
    ),
]


@pytest.mark.parametrize("flags, gpus, rules, message", WRONG)
def test_wrong_flags(flags, gpus, rules, message):
    with pytest.raises(PlacementError) as caught:
        with_flags(rules, PlacementFlags(**flags), 5, [f"cuda:{i}" for i in range(gpus)])
    assert str(caught.value) == message
