"""What rules cannot mean for a model and a machine: messages in full."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from hybrid.errors import CapacityError, PlacementError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.moe.groups import group_experts
from hybrid.placement.machine import GIB, Device, Machine
from hybrid.placement.memory import RunSize
from hybrid.placement.planner import Planner, plan
from hybrid.placement.roles import ROLES
from hybrid.synth import Formats, resolve_shape, synthesise

MACHINE = Machine((Device("cpu", 64 * GIB), Device("cuda:0", 8 * GIB)), num_nodes=2, num_threads=4)
ON_CPU = "place: {device: cpu}"
ATTENTION = "attn_kv_a_mqa, attn_kv_a_norm"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Layers 0-2, of which 1 and 2 have 8 experts, 4 of them used."""
    path = tmp_path_factory.mktemp("checks") / "tiny.gguf"
    shape = resolve_shape("tiny", num_layers=3, num_experts=8)
    synthesise(path, shape, Formats(experts=GGMLType.IQ2_XXS), header_only=True)
    with GGUFFile.open(path, header_only=True) as file:
        yield file


def rule(select: str, place: str = "device: cpu", *more: str) -> str:
    return f"  - select: {{{select}}}\n    place: {{{place}}}\n" + "".join(f"    {line}\n" for line in more)


def check(tiny, folder: Path, text: str, machine: Machine = MACHINE) -> str | None:
    """The message, or None."""
    path = folder / "r.yaml"
    path.write_text("version: 1\n" + text, encoding="utf-8")
    try:
        plan(tiny, path, machine=machine)
    except PlacementError as error:
        return str(error).replace(f"{folder}/", "")
    return None


CASES = {
    "architecture": (
        "architecture: [llama, qwen3moe]\n",
        "r.yaml:2:15: architecture: these rules are for llama or qwen3moe, but tiny.gguf is deepseek2; "
        "take rules for it, or auto",
    ),
    "no such gpu": (
        "rules:\n" + rule("role: attention", "device: cuda:1"),
        "r.yaml:4:21: device: there is no cuda:1 on this machine, which has cpu or cuda:0; "
        "`hybrid plan --vram cuda:1=24GiB` plans for one",
    ),
    "no such gpu for the cache": (
        "kv_cache: {device: cuda:3}\n",
        "r.yaml:2:20: device: there is no cuda:3 on this machine, which has cpu or cuda:0; "
        "`hybrid plan --vram cuda:3=24GiB` plans for one",
    ),
    "no such node": (
        "rules:\n" + rule("role: routed_experts", "device: cpu, numa: node:2"),
        "r.yaml:4:32: numa: expected a NUMA node of this machine, which has 0, 1, found 'node:2'",
    ),
    "layers": (
        "rules:\n" + rule("role: attention, layers: 1-60"),
        "r.yaml:3:39: layers: 3-60 is out of range, tiny.gguf has layers 0-2; "
        "name fewer, or set optional: true",
    ),
    "experts": (
        "rules:\n" + rule("role: routed_experts, experts: [0-3, 9]"),
        "r.yaml:3:45: experts: 9 is out of range, tiny.gguf has experts 0-7; name fewer, or "
        "set optional: true",
    ),
    "no such role": (
        "rules:\n" + rule("role: rope"),
        "r.yaml:3:5: this rule matches no tensor of tiny.gguf: it has no rope, its roles are attention, "
        "dense_ffn, embedding, norm, output, routed_experts, router or shared_experts",
    ),
    "no such name": (
        "rules:\n" + rule('name: "blk.*.ffn_gate_exp.weight"'),
        "r.yaml:3:5: this rule matches no tensor of tiny.gguf: no name fits the name "
        "'blk.*.ffn_gate_exp.weight'; a name that is near is 'blk.2.ffn_gate_exps.weight'",
    ),
    "no name has it": (
        "rules:\n" + rule("regex: 'exps$'"),
        "r.yaml:3:5: this rule matches no tensor of tiny.gguf: no name fits the regex 'exps$'",
    ),
    "role elsewhere": (
        "rules:\n" + rule("role: routed_experts, layers: 0"),
        "r.yaml:3:5: this rule matches no tensor of tiny.gguf: its routed_experts are in layers 1-2; "
        "select others, or set optional: true",
    ),
    "experts of attention": (
        "rules:\n" + rule("role: attention, experts: 0-3"),
        "r.yaml:3:5: this rule matches no tensor of tiny.gguf: only routed experts are divided; "
        "select them alone",
    ),
    "nothing in common": (
        "rules:\n" + rule('role: attention, name: "output*"'),
        "r.yaml:3:5: this rule matches no tensor of tiny.gguf: no tensor fits all conditions at once; "
        "name fewer",
    ),
    "shadowed": (
        "rules:\n" + rule("role: routed_experts, layers: 1") + rule("layers: 2") + rule('name: "*exps*"'),
        "r.yaml:7:5: this rule decides nothing: all 6 tensors that it matches are taken by r.yaml:3:5 and "
        "r.yaml:5:5; put it above, or remove it",
    ),
    "shadowed expert by expert": (
        "rules:\n" + rule("experts: 0-3") + rule("experts: 4-") + rule("role: routed_experts"),
        "r.yaml:7:5: this rule decides nothing: all 6 tensors that it matches are taken by r.yaml:3:5 and "
        "r.yaml:5:5; put it above, or remove it",
    ),
    "no kernel": (
        "rules:\n" + rule("role: routed_experts, layers: 2", "device: cuda:0"),
        "r.yaml:3:5: format: blk.2.ffn_gate_exps.weight and 1 more: IQ2_XXS has no kernel on "
        "cuda:0; give the "
        "rule another format, or leave them on the cpu",
    ),
    "no kernel for the format": (
        "rules:\n" + rule("role: output", "device: cuda:0, format: Q4_1"),
        "r.yaml:4:37: format: output.weight: Q4_1 has no kernel on cuda:0; give the rule another format, or "
        "leave them on the cpu",
    ),
    "blocks": (
        "rules:\n" + rule("name: blk.0.attn_k_b.weight", "device: cpu, format: Q4_K"),
        "r.yaml:4:34: format: blk.0.attn_k_b.weight: its rows of 128 weights are no whole blocks of Q4_K, "
        "which have 256",
    ),
    "triple": (
        "rules:\n" + rule("regex: gate_exps", "device: fake:0") + rule("role: routed_experts"),
        "r.yaml:5:5: blk.1.ffn_up_exps.weight goes to cpu, but blk.1.ffn_gate_exps.weight, which is computed "
        "with it, goes to fake:0 (r.yaml:3:5); select them by role in one rule",
    ),
    "triple of an expert": (
        "rules:\n"
        + rule("experts: 0-3, name: '*gate_exps*'", "device: fake:0")
        + rule("experts: 0-2", "device: fake:0")
        + rule("role: routed_experts"),
        "r.yaml:7:5: expert 3 of blk.1.ffn_up_exps.weight goes to cpu, but blk.1.ffn_gate_exps.weight, which "
        "is computed with it, goes to fake:0 (r.yaml:3:5); select them by role in one rule",
    ),
    "half of a triple": (
        "rules:\n" + rule("experts: 2, name: '*down_exps*'", "device: fake:0"),
        "r.yaml:3:5: expert 2 of blk.1.ffn_down_exps.weight goes to fake:0, but blk.1.ffn_gate_exps.weight, "
        "which is computed with it, is left open; select them by role in one rule",
    ),
    "attention": (
        "rules:\n"
        + rule("name: '*attn_output*'", "device: fake:0")
        + rule("role: attention", "device: fake:1"),
        "r.yaml:3:5: blk.0.attn_output.weight goes to fake:0, but blk.0.attn_q_a.weight, "
        "which is computed with "
        "it, goes to fake:1 (r.yaml:5:5); select them by role in one rule",
    ),
    "complete": (
        "complete: true\nrules:\n" + rule("layers: 0-"),
        "r.yaml:2:11: complete: no rule places token_embd.weight and 2 more; add a rule for them, or remove "
        "complete to let auto place them",
    ),
    "complete experts": (
        "complete: true\nrules:\n" + rule("experts: 1-5") + rule("regex: '^(?!.*_exps)'"),
        "r.yaml:2:11: complete: no rule places experts 0,6-7 of blk.1.ffn_gate_exps.weight and 5 more; add a "
        "rule for them, or remove complete to let auto place them",
    ),
    "context": (
        "kv_cache: {max_tokens: 1000000}\n",
        "r.yaml:2:24: max_tokens: expected at most 4096, the context that tiny.gguf was made "
        "for, found 1000000",
    ),
    "experts of a token": (
        "experts: {per_token: 5}\n",
        "r.yaml:2:22: per_token: expected at most 4, the experts that tiny.gguf uses for a token, found 5",
    ),
    "cache elsewhere": (
        "rules:\n" + rule("role: attention, layers: 1-") + "kv_cache: {device: cuda:0}\n",
        "r.yaml:5:20: device: the cache lies where attention runs, and that of layers 1-2 "
        "runs on cpu, not on "
        "cuda:0; place attention there, or leave device out",
    ),
    "cache smaller than an expert": (
        "experts: {cache: {device: cuda:0, bytes: 1KiB}}\n",
        "r.yaml:2:42: bytes: expected at least the 70656 bytes of one expert, found 1024",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_message(tiny, tmp_path, case):
    text, message = CASES[case]
    assert check(tiny, tmp_path, text) == message


def test_a_regex_that_takes_long(tiny, tmp_path):
    begin = time.monotonic()
    message = check(tiny, tmp_path, "rules:\n" + rule("regex: '^(([a-z0-9._])|([a-z0-9._]{2}))*$(?<=!)'"))
    assert "r.yaml:3:21: regex: '^(([a-z0-9._])|([a-z0-9._]{2}))*$(?<=!)' takes more than 0.5 s on" in message
    assert message.endswith("write it without nested repeats, or use a glob (name)")
    assert time.monotonic() - begin < 5


OPTIONAL = [
    rule("role: rope", "device: cpu", "optional: true"),
    rule("role: attention, layers: 1-60", "device: cpu", "optional: true"),
    rule("role: routed_experts, experts: 0-255", "device: cpu", "optional: true"),
]


@pytest.mark.parametrize("text", OPTIONAL)
def test_optional_rules_may_name_what_is_not_there(tiny, tmp_path, text):
    assert check(tiny, tmp_path, "rules:\n" + text) is None


def test_an_optional_rule_is_told_when_it_decides_nothing(tiny, tmp_path):
    text = "rules:\n" + rule("layers: 0-") + rule("role: attention", "device: cpu", "optional: true")
    assert "r.yaml:5:5: this rule decides nothing" in check(tiny, tmp_path, text)


def test_rules_of_ones_own_may_override_all_of_an_included_one(tiny, tmp_path):
    (tmp_path / "inner.yaml").write_text("version: 1\nrules:\n" + rule("role: attention", "device: cuda:0"))
    assert check(tiny, tmp_path, "include: inner.yaml\nrules:\n" + rule("role: attention")) is None
    twice = rule("role: attention") + rule("role: attention")
    assert "r.yaml:6:5: this rule" in check(tiny, tmp_path, "include: inner.yaml\nrules:\n" + twice)


def test_an_included_rule_must_match(tiny, tmp_path):
    (tmp_path / "inner.yaml").write_text("version: 1\nrules:\n" + rule("role: rope"))
    assert "inner.yaml:3:5: this rule matches no" in check(tiny, tmp_path, "include: inner.yaml\n")


def test_open_ranges_go_to_the_end(tiny, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\nrules:\n" + rule("layers: 2-", "device: fake:0"))
    placements = plan(tiny, path, machine=MACHINE).placements
    assert {name.split(".")[1] for name, p in placements.items() if p.device == "fake:0"} == {"2"}


ROLE = st.sampled_from([*ROLES, ["attention", "norm"]])
LAYERS = st.sampled_from([0, 1, "1-2", "0-", "2,1", 3])
EXPERTS = st.sampled_from([0, "0-3", "4-", "2-5", "0-7", 8])
NAMES = st.sampled_from(["*", "blk.1.*", "*gate_exps*", "output*", "*.attn_*", "x"])
SELECTS = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLE,
        "layers": LAYERS,
        "experts": EXPERTS,
        "name": NAMES,
        "regex": NAMES.map(lambda name: name.strip("*.")).filter(bool).map(re.escape),
    },
).filter(bool)
PLACES = st.fixed_dictionaries(
    {"device": st.sampled_from(["cpu", "cpu", "cuda:0", "fake:0"])},
    optional={"format": st.sampled_from(["Q8_0", "Q4_K", "F32", "Q4_1"])},
)
RULES = st.fixed_dictionaries({"select": SELECTS, "place": PLACES}, optional={"optional": st.just(True)})
FILES = st.fixed_dictionaries(
    {"version": st.just(1), "rules": st.lists(RULES, max_size=5)},
    optional={
        "complete": st.booleans(),
        "experts": st.just({"cache": {"device": "cuda:0", "bytes": "fill"}}),
        "budget": st.just({"cuda:0": "4GiB"}),
    },
)


@settings(max_examples=300, deadline=None)
@given(FILES)
def test_rules_are_refused_or_place_every_byte_once(tiny, data):
    try:
        planner = Planner(tiny, data, MACHINE)
        found = planner.plan(RunSize(512))
    except (PlacementError, CapacityError):
        event("refused")
        return
    event("planned")
    for tensor in planner.model.tensors:
        placement = found.placements[tensor.name]
        assert placement.n_bytes == sum(part.n_bytes for part in placement.parts)
        for part in placement.parts:
            kind, format_ = part.device.split(":")[0], None if part.format is None else GGMLType[part.format]
            count = None if part.experts is None else len(part.experts)
            assert part.n_bytes == tensor.bytes_on(kind, format_, count)
        if placement.shares:
            experts = [expert for share in placement.shares for expert in share.experts]
            assert sorted(experts) == list(range(8))
            group_experts({tensor.name: placement}, 8)
    for layer in (1, 2):
        names = [f"blk.{layer}.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")]
        group_experts({name: found.placements[name] for name in names}, 8)  # or it could not be loaded
    for memory in found.memory.values():
        assert memory.weights_bytes == found.bytes_on(memory.device)
        assert memory.budget_bytes is None or memory.total_bytes <= memory.budget_bytes
    assert found.prediction.decode_tps > 0
