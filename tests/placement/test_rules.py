"""Rule files: what they mean, and errors with file, line and column."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import PlacementError
from hybrid.placement.rules import load_rules


def parse(tmp_path, text):
    path = tmp_path / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return load_rules(path)


GOOD = """\
version: 1
architecture: [deepseek2]
rules:
  - select: {role: routed_experts, layers: 3-60}
    place: {device: cpu}
  - select:
      role: [attention, router]
      layers: [0, "2-3", "7,9-10"]
    place: {device: "cuda:0"}
  - select: {name: "blk.*.ffn_*"}
    place: {device: fake:1}
"""


def test_fields(tmp_path):
    rules = parse(tmp_path, GOOD)
    assert rules.architectures == {"deepseek2"}
    experts, attention, glob = rules.rules
    assert (experts.device, attention.device, glob.device) == ("cpu", "cuda:0", "fake:1")
    assert experts.layers == set(range(3, 61))
    assert attention.layers == {0, 2, 3, 7, 9, 10}
    assert attention.roles == {"attention", "router"}
    assert [rule.origin.rsplit(":", 2)[1] for rule in rules.rules] == ["4", "6", "10"]


@pytest.mark.parametrize(
    "name, matches",
    [
        ("blk.3.ffn_up_exps.weight", [0, 2]),
        ("blk.2.ffn_up_exps.weight", [2]),
        ("blk.3.attn_q.weight", [1]),
        ("blk.4.attn_q.weight", []),
        ("output.weight", []),
    ],
)
def test_all_conditions_of_a_rule_must_hold(tmp_path, name, matches):
    rules = parse(tmp_path, GOOD).rules
    assert [index for index, rule in enumerate(rules) if rule.matches(name)] == matches


def test_a_dict_means_the_same(tmp_path):
    data = {"version": 1, "rules": [{"select": {"role": "output", "layers": 3}, "place": {"device": "cpu"}}]}
    (rule,) = load_rules(data).rules
    assert rule.roles == {"output"}
    assert rule.layers == {3}


RULE = "version: 1\nrules:\n  - select: {%s}\n    place: {%s}\n"
PLACE, SELECT = "device: cpu", "name: '*'"
BAD = {
    "empty file": ("", 0, 0, "an empty file"),
    "list": ("- 1\n", 1, 1, "expected a mapping"),
    "no version": ("rules: []\n", 1, 1, "lacks 'version'"),
    "version 2": ("version: 2\nrules: []\n", 1, 10, "expected 1, found 2"),
    "rules no list": ("version: 1\nrules: 7\n", 2, 8, "expected a list"),
    "unknown key": ("version: 1\nrule: []\n", 2, 1, "did you mean 'rules'"),
    "duplicate key": ("version: 1\nversion: 1\nrules: []\n", 2, 1, "duplicate key 'version'"),
    "unknown select key": (RULE % ("roles: output", PLACE), 3, 14, "did you mean 'role'"),
    "empty select": (RULE % ("", PLACE), 3, 13, "found nothing"),
    "no place": ("version: 1\nrules:\n  - select: {name: a}\n", 3, 5, "lacks 'place'"),
    "unknown role": (RULE % ("role: experts", PLACE), 3, 20, "did you mean"),
    "layers reversed": (RULE % ("layers: 9-3", PLACE), 3, 22, "ascending"),
    "layers text": (RULE % ("layers: all", PLACE), 3, 22, "such as 3-60"),
    "layers huge": (RULE % ("layers: 0-99999999999", PLACE), 3, 22, "below 10000"),
    "unknown device": (RULE % (SELECT, "device: gpu"), 4, 21, "cuda:N"),
    "device a list": (RULE % (SELECT, "device: [cpu]"), 4, 21, "found a list"),
    "unknown place key": (RULE % (SELECT, "device: cpu, numma: none"), 4, 26, "unknown key 'numma'"),
    "no device": (RULE % (SELECT, ""), 4, 12, "lacks 'device'"),
    "nested role": (RULE % ("role: [[output]]", PLACE), 3, 21, "expected text"),
    "empty list": (RULE % ("role: []", PLACE), 3, 20, "empty list"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_says_where(tmp_path, case):
    text, line, column, words = BAD[case]
    with pytest.raises(PlacementError) as caught:
        parse(tmp_path, text)
    assert words in str(caught.value)
    where = f"rules.yaml:{line}:{column}: " if line else "rules.yaml: "
    assert where in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "version: [1\n",
        "version: 1\n\trules: []\n",
        "a: &a [*a]\n",
        "[" * 5000,
        "version: 1\nrules: !!python/object/apply:os.system ['true']\n",
        "\x00",
    ],
)
def test_malformed_yaml(tmp_path, text):
    with pytest.raises(PlacementError, match=r"rules\.yaml"):
        parse(tmp_path, text)


def test_words_of_yaml_1_1_stay_words(tmp_path):
    (rule,) = parse(tmp_path, RULE % ("name: off", PLACE)).rules
    assert rule.name == "off"


def test_alias_bomb_is_harmless(tmp_path):
    text = "version: 1\na: &a [x, x, x, x, x, x, x, x, x]\n"
    text += "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
    )
    with pytest.raises(PlacementError, match="unknown key 'a'"):
        parse(tmp_path, text)


@pytest.mark.parametrize("rules", ["", 7, None, ["cpu"], "no/such.yaml"])
def test_neither_rules_nor_file(rules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlacementError):
        load_rules(rules)


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan")])
def test_dict_with_odd_values(value):
    with pytest.raises(PlacementError):
        load_rules({"version": 1, "rules": value})


KEYS = st.sampled_from(["version", "rules", "select", "place", "role", "x"])
STRUCTURES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
)


@given(STRUCTURES)
def test_any_structure_loads_or_is_refused(data):
    with contextlib.suppress(PlacementError):
        load_rules({"version": 1, "rules": data})
