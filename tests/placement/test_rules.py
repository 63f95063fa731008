"""What rule files mean, and that any text is either rules or refused."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import PlacementError
from hybrid.placement.roles import ROLES
from hybrid.placement.rules import ExpertCacheRule, KVCacheRule, load_rules
from hybrid.placement.rules.nodes import read_yaml, typed
from hybrid.placement.rules.parser import NUMA_MODES, PLACE_KEYS, SELECT_KEYS, TOP_KEYS, parse
from hybrid.placement.rules.ranges import parse_ranges, ranges_of

EVERYTHING = """\
version: 1
architecture: [deepseek2, deepseek3]
complete: true
rules:
  - select: {role: routed_experts, layers: 3-60, experts: [0-15, 200-]}
    place: {device: cpu, numa: node:1, backend: cpu}
    optional: true
  - select:
      role: [attention, router]
      layers: [0, 2-3, "7,9-10"]
    place: {device: cuda:0, format: Q8_0}
  - select: {name: "blk.*.ffn_*", regex: "up|down"}
    place: {device: fake:1}
experts:
  per_token: 6
  threshold: 0.25
  cache: {device: cuda:0, bytes: fill, policy: static, profile: hot.json}
kv_cache: {device: cuda:0, format: q8_0, max_tokens: 65536}
budget: {cuda:0: 22.5GiB, cpu: 512GB}
"""


def load(folder: Path, text: str, name: str = "rules.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_rules(path)


def test_every_key(tmp_path):
    rules = load(tmp_path, EVERYTHING)
    assert rules.architectures == {"deepseek2", "deepseek3"} and rules.complete
    experts, attention, named = rules.rules
    assert (experts.device, attention.device, named.device) == ("cpu", "cuda:0", "fake:1")
    assert [n for n in range(300) if n in experts.layers] == list(range(3, 61))
    assert [n for n in range(210) if n in experts.experts] == [*range(16), *range(200, 210)]
    assert [n for n in range(99) if n in attention.layers] == [0, 2, 3, 7, 9, 10]
    assert (experts.numa, attention.numa, experts.backend) == ("node:1", "auto", "cpu")
    assert attention.roles == {"attention", "router"} and attention.format == "Q8_0"
    assert (named.name, named.regex) == ("blk.*.ffn_*", "up|down")
    assert [rule.optional for rule in rules.rules] == [True, False, False]
    assert (rules.experts.per_token, rules.experts.threshold) == (6, 0.25)
    assert rules.experts.cache == ExpertCacheRule("cuda:0", None, "static", str(tmp_path / "hot.json"))
    assert rules.kv_cache == KVCacheRule("cuda:0", "q8_0", 65536)
    assert rules.budgets == {"cuda:0": 45 << 29, "cpu": 512 * 10**9}


def test_places(tmp_path):
    rules = load(tmp_path, EVERYTHING)
    assert [rule.origin.rsplit("/")[-1] for rule in rules.rules] == [
        "rules.yaml:5:5",
        "rules.yaml:8:5",
        "rules.yaml:12:5",
    ]
    assert rules.rules[1].where("layers").endswith("rules.yaml:10:15")
    assert rules.where("kv_cache.format").endswith("rules.yaml:18:36")
    assert rules.where("budget.cpu").endswith("rules.yaml:19:27")


def test_a_dict_means_the_same(tmp_path):
    data = {
        "version": 1,
        "rules": [{"select": {"role": "output", "layers": 3}, "place": {"device": "cpu"}}],
        "kv_cache": {"max_tokens": 100},
    }
    text = "version: 1\nrules: [{select: {role: output, layers: 3}, place: {device: cpu}}]\n"
    (rule,) = load_rules(data).rules
    (same,) = load(tmp_path, text).rules
    assert (rule.roles, rule.layers, rule.device) == (same.roles, same.layers, same.device)
    assert rule.origin == "<rules>.rules[0]" and load_rules(data).kv_cache.max_tokens == 100


def test_sections_alone_are_enough(tmp_path):
    rules = load(tmp_path, "version: 1\nkv_cache: {format: bf16}\n")
    assert rules.rules == () and rules.kv_cache.format == "bf16"


@pytest.mark.parametrize(
    "text, value",
    [
        ("off", "off"), ("no", "no"), ("Yes", "Yes"), ("y", "y"), ("1:30", "1:30"), ("1_000", "1_000"),
        ("true", True), ("FALSE", False), ("~", None), ("", None), ("Null", None),
        ("017", 17), ("0o17", 15), ("0x1F", 31), ("-7", -7), ("1e3", 1000.0), (".5", 0.5), ("1.", 1.0),
        ("-.inf", float("-inf")), ("2026-01-01", "2026-01-01"), ("3-60", "3-60"), ("=", "="),
    ],
)  # fmt: skip
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    assert typed(text) == value and type(typed(text)) is type(value)


def test_quoted_scalars_are_text(tmp_path):
    text = "version: 1\nrules:\n  - select: {name: 'true'}\n    place: {device: \"cpu\"}\n"
    assert load(tmp_path, text).rules[0].name == "true"


def test_a_byte_order_mark_and_a_pipe_are_read(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\r\nrules: []\r\n")
    assert load_rules(path).rules == ()


@pytest.mark.parametrize("text", ["0", "3-60", "0,2-3,8-", "12-12"])
def test_ranges_read_back(text):
    ranges = parse_ranges(text)
    assert str(ranges) == text.replace("12-12", "12")


@given(st.sets(st.integers(0, 40)))
def test_ranges_of_numbers_hold_them_alone(numbers):
    ranges = ranges_of(numbers)
    assert {n for n in range(50) if n in ranges} == numbers
    beyond = ranges.beyond(20)
    outside = {n for n in numbers if n >= 20}
    assert ({n for n in range(50) if n in beyond} if beyond else set()) == outside


INNER = """\
version: 1
architecture: deepseek2
complete: true
rules:
  - {select: {role: attention}, place: {device: cuda:0}}
kv_cache: {format: f16, max_tokens: 4096}
budget: {cuda:0: 24GiB}
"""


def test_own_rules_come_first_and_own_sections_win(tmp_path):
    (tmp_path / "inner.yaml").write_text(INNER)
    outer = (
        "version: 1\ninclude: ./inner.yaml\n"
        "rules:\n  - {select: {layers: 0}, place: {device: cpu}}\nbudget: {cuda:0: 16GiB}\n"
    )
    rules = load(tmp_path, outer)
    assert [(rule.device, rule.depth) for rule in rules.rules] == [("cpu", 0), ("cuda:0", 1)]
    assert rules.rules[1].origin.endswith("inner.yaml:5:5")
    assert rules.budgets == {"cuda:0": 16 << 30}
    assert rules.kv_cache == KVCacheRule(None, "f16", 4096)
    assert rules.architectures == {"deepseek2"} and rules.complete
    assert not load(tmp_path, "version: 1\ninclude: inner.yaml\ncomplete: false\n").complete


def test_a_section_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "inner.yaml").write_text(INNER)
    rules = load(tmp_path, "version: 1\ninclude: inner.yaml\nkv_cache: {format: bf16}\n")
    assert rules.kv_cache == KVCacheRule(None, "bf16", None)


def test_both_guards_hold(tmp_path):
    (tmp_path / "inner.yaml").write_text(INNER)
    both = load(tmp_path, "version: 1\ninclude: inner.yaml\narchitecture: [deepseek2, llama]\n")
    assert both.architectures == {"deepseek2"}
    with pytest.raises(PlacementError, match=r"rules\.yaml:3:15: .* included rules are for deepseek2 alone"):
        load(tmp_path, "version: 1\ninclude: inner.yaml\narchitecture: llama\n")


def test_names_of_included_files_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "inner.yaml").write_text("version: 1\ninclude: b/innermost.yaml\n")
    (tmp_path / "a" / "b" / "innermost.yaml").write_text(INNER)
    rules = load(tmp_path, "version: 1\ninclude: a/inner.yaml\n")
    assert rules.rules[0].depth == 2
    monkeypatch.chdir(tmp_path)
    assert load_rules({"version": 1, "include": "a/inner.yaml"}).rules[0].device == "cuda:0"
    (tmp_path / "a" / "inner.yaml").write_text("version: 7\n")
    with pytest.raises(PlacementError, match=r"a/inner\.yaml:1:10: version: expected 1"):
        load_rules({"version": 1, "include": "a/inner.yaml"})


def test_a_circle_of_files(tmp_path):
    (tmp_path / "b.yaml").write_text("version: 1\ninclude: a.yaml\n")
    with pytest.raises(
        PlacementError, match=r"b\.yaml:2:10: include: 'a\.yaml' includes itself: .*a\.yaml -> "
    ):
        load(tmp_path, "version: 1\ninclude: b.yaml\n", "a.yaml")


def test_a_long_chain_of_files(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"version: 1\ninclude: {number + 1}.yaml\n")
    with pytest.raises(PlacementError, match=r"16\.yaml:2:10: include: more than 16 files"):
        load_rules(tmp_path / "0.yaml")


@given(
    st.text(min_size=1)
    | st.sampled_from(["\0", "\ud800", "a" * 900, "a/" * 400, "..", "/", "~", "loop.yaml"])
)
def test_any_name_to_include_is_there_or_refused(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("include")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    rules = folder / "rules.yaml"
    rules.write_text("version: 1\ninclude: " + json.dumps(name), encoding="utf-8")
    with contextlib.suppress(PlacementError):
        load_rules(rules)


@pytest.mark.parametrize("name", ["a" * 300, "\0", "\ud800.yaml", "a" * 5000])
def test_odd_names_of_rules(name):
    with pytest.raises(PlacementError):
        load_rules(name)


WORDS = st.sampled_from(
    [*TOP_KEYS, *SELECT_KEYS, *PLACE_KEYS, *NUMA_MODES, *ROLES, "select", "place", "optional", "cache",
     "bytes", "cpu", "cuda:0", "3-60", "24GiB", "fill", "*", "q8_0", "f16", "Q4_K", "x"]
)  # fmt: skip
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=8)
STRUCTURES = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=30,
)
PIECES = st.sampled_from(
    [*",[]{}?&*!|>%@`#'\"\n\t\u2028\ufeff", ": ", "- ", "<<", "---", "...", "\\U00", "\\x", "  ", "%YAML 1.",
     "!!str ", "version: 1\n", "rules:\n", "  - select: {role: output}\n", "    place: {device: cpu}\n"]
)  # fmt: skip
TEXTS = st.text(max_size=60) | st.lists(PIECES | WORDS, max_size=25).map("".join)


@settings(max_examples=300, deadline=1000)
@given(st.dictionaries(st.sampled_from(TOP_KEYS), STRUCTURES, max_size=5))
def test_any_structure_is_rules_or_refused(data):
    with contextlib.suppress(PlacementError):
        load_rules({**data, "version": 1})


@settings(max_examples=500, deadline=1000)
@given(TEXTS, st.booleans())
def test_any_text_is_rules_or_refused(text, after_version):
    data = (("version: 1\n" if after_version else "") + text).encode("utf-8", "surrogatepass")
    try:
        parse(read_yaml(data, "f.yaml"), "f.yaml")
    except PlacementError as error:
        assert str(error).startswith("f.yaml:")


@settings(max_examples=200, deadline=1000)
@given(st.binary(max_size=80))
def test_any_bytes_are_rules_or_refused(data):
    with contextlib.suppress(PlacementError):
        parse(read_yaml(data, "f.yaml"), "f.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "? " * 100_000,
        "- " * 100_000,
        "{" * 200_000,
        "a: &a [" + "*a," * 50_000,
        "version: 1\nrules:\n" + "  - {select: {layers: 1}, place: {device: cpu}}\n" * 5000,
        "version: 1\nrules: [" + "x, " * 50_000 + "]\n",
        '"' + "\\n" * 100_000,
        "version: 1\nrules: [{select: {regex: '" + "(a*)*" * 190 + "'}, place: {device: cpu}}]\n",
        "version: 1\nrules: [{select: {regex: '" + "(" * 900 + "'}, place: {device: cpu}}]\n",
        "version: 1\nrules: [{select: {regex: '((((a{9999}){9999}){9999}){9999})'}, place: {device: cpu}}]\n",
    ],
    ids=range(11),
)
def test_hostile_texts_end_soon(text):
    begin = time.process_time()
    with contextlib.suppress(PlacementError):
        parse(read_yaml(text.encode(), "f.yaml"), "f.yaml")
    assert time.process_time() - begin < 10
