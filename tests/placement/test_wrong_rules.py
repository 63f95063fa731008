"""Wrong rule files, each with the whole of its message: file, line, column, what was expected and found."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import PlacementError
from hybrid.placement.rules import load_rules, shipped_names
from hybrid.placement.rules.nodes import MAX_BYTES, Node, from_python, read_yaml
from hybrid.placement.rules.parser import parse

RULE = "version: 1\nrules:\n  - select: {%s}\n    place: {%s}\n"
PLACE, SELECT = "device: cpu", "name: '*'"
ROLES = (
    "attention, router, norm, routed_experts, shared_experts, dense_ffn, "
    "embedding, output, rope, nextn or other"
)
FORMATS = (
    "BF16, F16, F32, IQ4_NL, IQ4_XS, MXFP4, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, "
    "Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, TQ1_0 or TQ2_0"
)
TOP = "version, architecture, include, complete, rules, experts, kv_cache or budget"
WRONG = {
    "empty": (
        "",
        "rules.yaml: an empty file; a rule file begins with version: 1",
    ),
    "only a comment": (
        "# nothing\n",
        "rules.yaml: an empty file; a rule file begins with version: 1",
    ),
    "null": (
        "~\n",
        "rules.yaml: an empty file; a rule file begins with version: 1",
    ),
    "list": (
        "- 1\n",
        "rules.yaml:1:1: a rule file: expected a mapping, found a list",
    ),
    "text": (
        "hello\n",
        "rules.yaml:1:1: a rule file: expected a mapping, found 'hello'",
    ),
    "no version": (
        "rules: []\n",
        "rules.yaml:1:1: a rule file lacks 'version'",
    ),
    "version 2": (
        "version: 2\n",
        "rules.yaml:1:10: version: expected 1, found the number 2",
    ),
    "version text": (
        "version: '1'\n",
        "rules.yaml:1:10: version: expected 1, found '1'",
    ),
    "version true": (
        "version: true\n",
        "rules.yaml:1:10: version: expected 1, found true",
    ),
    "two documents": (
        "version: 1\n---\nversion: 1\n",
        "rules.yaml:2:1: a second document; a rule file has one, so remove the line ---",
    ),
    "unclosed list": (
        "version: [1\n",
        "rules.yaml:2:1: not YAML: expected ',' or ']', but got '<stream end>' (while "
        "parsing a flow sequence)",
    ),
    "tab": (
        "version: 1\nrules:\n\t- x\n",
        "rules.yaml:3:1: not YAML: found character '\\t' that cannot start any token "
        "(while scanning for the next token)",
    ),
    "bad indent": (
        "version: 1\n rules: []\n",
        "rules.yaml:2:7: not YAML: mapping values are not allowed here",
    ),
    "anchor": (
        "version: 1\nrules: &a []\n",
        "rules.yaml:2:8: the anchor &a is not allowed, since aliases are not",
    ),
    "alias": (
        "version: 1\nrules: *a\n",
        "rules.yaml:2:8: the alias *a is not allowed; write the value out",
    ),
    "tag": (
        "version: 1\nrules: !!python/object/apply:os.system ['true']\n",
        "rules.yaml:2:8: the tag !!python/object/apply:os.system is not allowed; values need none",
    ),
    "str tag": (
        "version: !!str 1\n",
        "rules.yaml:1:10: the tag !!str is not allowed; values need none",
    ),
    "merge key": (
        "version: 1\n<<: {rules: []}\n",
        "rules.yaml:2:1: the merge key << is not allowed; write the keys out",
    ),
    "duplicate key": (
        "version: 1\nrules: []\nversion: 1\n",
        "rules.yaml:3:1: duplicate key 'version', which stands at rules.yaml:1:1 already",
    ),
    "key a list": (
        "version: 1\n[a]: 1\n",
        "rules.yaml:2:1: a key must be text, found a list or a mapping",
    ),
    "too deep": (
        "version: 1\nrules: " + "[" * 40,
        "rules.yaml:2:23: nested deeper than 16 levels",
    ),
    "bad escape": (
        'version: 1\nrules: "\\U99999999"\n',
        "rules.yaml:2:11: not YAML: a number here is out of range",
    ),
    "unknown key": (
        "version: 1\nrule: []\n",
        f"rules.yaml:2:1: unknown key 'rule' in a rule file: expected {TOP}; did you mean 'rules'?",
    ),
    "far unknown key": (
        "version: 1\nxyzzy: []\n",
        f"rules.yaml:2:1: unknown key 'xyzzy' in a rule file: expected {TOP}",
    ),
    "number as key": (
        "version: 1\n7: []\n",
        f"rules.yaml:2:1: unknown key '7' in a rule file: expected {TOP}",
    ),
    "rules no list": (
        "version: 1\nrules: 7\n",
        "rules.yaml:2:8: rules: expected a list, found the number 7",
    ),
    "rules nothing": (
        "version: 1\nrules:\n",
        "rules.yaml:2:7: rules: expected a list, found nothing",
    ),
    "rule no mapping": (
        "version: 1\nrules:\n  - role\n",
        "rules.yaml:3:5: a rule: expected a mapping, found 'role'",
    ),
    "no select": (
        "version: 1\nrules:\n  - place: {device: cpu}\n",
        "rules.yaml:3:5: a rule lacks 'select'",
    ),
    "no place": (
        "version: 1\nrules:\n  - select: {name: a}\n",
        "rules.yaml:3:5: a rule lacks 'place'",
    ),
    "unknown rule key": (
        "version: 1\nrules:\n  - select: {name: a}\n    place: {device: cpu}\n    optinal: true\n",
        "rules.yaml:5:5: unknown key 'optinal' in a rule: expected select, place or "
        "optional; did you mean 'optional'?",
    ),
    "optional yes": (
        "version: 1\nrules:\n  - select: {name: a}\n    place: {device: cpu}\n    optional: yes\n",
        "rules.yaml:5:15: optional: expected true or false, found 'yes'",
    ),
    "unknown select key": (
        RULE % ("roles: output", PLACE),
        "rules.yaml:3:14: unknown key 'roles' in select: expected role, layers, experts, "
        "name or regex; did you mean 'role'?",
    ),
    "empty select": (
        RULE % ("", PLACE),
        "rules.yaml:3:13: select: expected one or more of role, layers, experts, name, regex, found none",
    ),
    "unknown role": (
        RULE % ("role: experts", PLACE),
        f"rules.yaml:3:20: role: expected {ROLES}, found 'experts'; did you mean 'routed_experts'?",
    ),
    "role capital": (
        RULE % ("role: Attention", PLACE),
        f"rules.yaml:3:20: role: expected {ROLES}, found 'Attention'; did you mean 'attention'?",
    ),
    "nested role": (
        RULE % ("role: [[output]]", PLACE),
        "rules.yaml:3:21: role: expected text, found a list",
    ),
    "empty role list": (
        RULE % ("role: []", PLACE),
        "rules.yaml:3:20: role: expected at least one, found an empty list",
    ),
    "layers descend": (
        RULE % ("layers: 9-3", PLACE),
        "rules.yaml:3:22: layers: expected an ascending range, found '9-3'",
    ),
    "layers text": (
        RULE % ("layers: all", PLACE),
        "rules.yaml:3:22: layers: expected numbers and ranges such as 3-60 or 0,8-, found 'all'",
    ),
    "layers time": (
        RULE % ("layers: 1:30", PLACE),
        "rules.yaml:3:22: layers: expected numbers and ranges such as 3-60 or 0,8-, found '1:30'",
    ),
    "layers huge": (
        RULE % ("layers: 0-99999999999", PLACE),
        "rules.yaml:3:22: layers: expected numbers and ranges such as 3-60 or 0,8-, found '0-99999999999'",
    ),
    "layers negative": (
        RULE % ("layers: -1", PLACE),
        "rules.yaml:3:22: layers: expected a whole number from 0 to 9999, found the number -1",
    ),
    "layers fraction": (
        RULE % ("layers: [1, 2.5]", PLACE),
        "rules.yaml:3:26: layers: expected a whole number from 0 to 9999, found the number 2.5",
    ),
    "layers true": (
        RULE % ("layers: true", PLACE),
        "rules.yaml:3:22: layers: expected a whole number from 0 to 9999, found true",
    ),
    "experts empty": (
        RULE % ("experts: []", PLACE),
        "rules.yaml:3:23: experts: expected at least one, found none",
    ),
    "name number": (
        RULE % ("name: 3", PLACE),
        "rules.yaml:3:20: name: expected text, found the number 3; quote it",
    ),
    "name empty": (
        RULE % ("name: ''", PLACE),
        "rules.yaml:3:20: name: expected 1 to 1000 characters, found 0",
    ),
    "name null": (
        RULE % ("name: ", PLACE),
        "rules.yaml:3:19: name: expected text, found nothing",
    ),
    "regex": (
        RULE % ("regex: 'blk.(3'", PLACE),
        "rules.yaml:3:21: regex: 'blk.(3' is not a regular expression: missing ) at position 6",
    ),
    "regex that explodes": (
        RULE % ("regex: '(((a{99}){99}){99})'", PLACE),
        "rules.yaml:3:21: regex: '(((a{99}){99}){99})' repeats too much; names of tensors are short, "
        "so + will do",
    ),
    "device": (
        RULE % (SELECT, "device: npu"),
        "rules.yaml:4:21: device: expected cpu, cuda:N or fake:N, found 'npu'",
    ),
    "device gpu": (
        RULE % (SELECT, "device: gpu"),
        "rules.yaml:4:21: device: expected cpu, cuda:N or fake:N, found 'gpu'; did you mean 'cuda:0'?",
    ),
    "device CUDA1": (
        RULE % (SELECT, "device: CUDA1"),
        "rules.yaml:4:21: device: expected cpu, cuda:N or fake:N, found 'CUDA1'; did you mean 'cuda:1'?",
    ),
    "device CPU": (
        RULE % (SELECT, "device: CPU"),
        "rules.yaml:4:21: device: expected cpu, cuda:N or fake:N, found 'CPU'; did you mean 'cpu'?",
    ),
    "device list": (
        RULE % (SELECT, "device: [cpu]"),
        "rules.yaml:4:21: device: expected text, found a list",
    ),
    "unknown place key": (
        RULE % (SELECT, "device: cpu, numma: none"),
        "rules.yaml:4:26: unknown key 'numma' in place: expected device, backend, format "
        "or numa; did you mean 'numa'?",
    ),
    "no device": (
        RULE % (SELECT, "numa: none"),
        "rules.yaml:4:12: place lacks 'device'",
    ),
    "numa off": (
        RULE % (SELECT, "device: cpu, numa: off"),
        "rules.yaml:4:32: numa: expected auto, none, replicate, shard, interleave or node:N, found 'off'",
    ),
    "numa node": (
        RULE % (SELECT, "device: cpu, numa: node:x"),
        "rules.yaml:4:32: numa: expected auto, none, replicate, shard, interleave or "
        "node:N, found 'node:x'; did you mean 'node:N'?",
    ),
    "numa on a gpu": (
        RULE % (SELECT, "device: 'cuda:0', numa: shard"),
        "rules.yaml:4:37: numa: shard divides the CPU's memory, but the device is cuda:0; leave numa out",
    ),
    "format unknown": (
        RULE % (SELECT, "device: cpu, format: q4_k"),
        f"rules.yaml:4:34: format: expected {FORMATS}, found 'q4_k'; did you mean 'Q4_K'?",
    ),
    "format no quantiser": (
        RULE % (SELECT, "device: cpu, format: IQ2_XXS"),
        f"rules.yaml:4:34: format: expected {FORMATS}, found 'IQ2_XXS'; did you mean 'IQ4_XS'?",
    ),
    "backend": (
        RULE % (SELECT, "device: 'cuda:0', backend: cpu"),
        "rules.yaml:4:40: backend: cuda:0 is run by the backend 'cuda' alone, found 'cpu'; leave backend out",
    ),
    "kv_cache empty": (
        "version: 1\nkv_cache: {}\n",
        "rules.yaml:2:11: kv_cache: expected one or more of device, format, max_tokens, found none",
    ),
    "kv_cache format": (
        "version: 1\nkv_cache: {format: q4_0}\n",
        "rules.yaml:2:20: format: expected f32, f16, bf16 or q8_0, found 'q4_0'; did you mean 'q8_0'?",
    ),
    "kv_cache tokens": (
        "version: 1\nkv_cache: {max_tokens: 32k}\n",
        "rules.yaml:2:24: max_tokens: expected a whole number from 2 to 1073741824, found '32k'",
    ),
    "kv_cache key": (
        "version: 1\nkv_cache: {formt: f16}\n",
        "rules.yaml:2:12: unknown key 'formt' in kv_cache: expected device, format or "
        "max_tokens; did you mean 'format'?",
    ),
    "experts key": (
        "version: 1\nexperts: {per-token: 4}\n",
        "rules.yaml:2:11: unknown key 'per-token' in experts: expected per_token, "
        "threshold or cache; did you mean 'per_token'?",
    ),
    "per_token zero": (
        "version: 1\nexperts: {per_token: 0}\n",
        "rules.yaml:2:22: per_token: expected a whole number from 1 to 9999, found the number 0",
    ),
    "threshold": (
        "version: 1\nexperts: {threshold: 1.5}\n",
        "rules.yaml:2:22: threshold: expected a number from 0 to 1, found the number 1.5",
    ),
    "cache on cpu": (
        "version: 1\nexperts: {cache: {device: cpu, bytes: fill}}\n",
        "rules.yaml:2:27: device: an expert cache lies on a GPU, found 'cpu'",
    ),
    "cache bytes": (
        "version: 1\nexperts: {cache: {device: 'cuda:0', bytes: full}}\n",
        "rules.yaml:2:44: bytes: expected a size, as in 8GiB, or fill, found 'full'",
    ),
    "cache no bytes": (
        "version: 1\nexperts: {cache: {device: 'cuda:0'}}\n",
        "rules.yaml:2:18: experts.cache lacks 'bytes'",
    ),
    "cache policy": (
        "version: 1\nexperts: {cache: {device: 'cuda:0', bytes: 1GiB, policy: lru}}\n",
        "rules.yaml:2:58: policy: expected static or dynamic, found 'lru'",
    ),
    "budget list": (
        "version: 1\nbudget: [24GiB]\n",
        "rules.yaml:2:9: budget: expected a mapping of devices to sizes, found a list",
    ),
    "budget empty": (
        "version: 1\nbudget: {}\n",
        "rules.yaml:2:9: budget: expected a mapping of devices to sizes, found an empty mapping",
    ),
    "budget unit": (
        "version: 1\nbudget: {'cuda:0': 24}\n",
        "rules.yaml:2:20: budget of cuda:0: expected a size, as in 24GiB, found the number 24",
    ),
    "budget device": (
        "version: 1\nbudget: {vram: 24GiB}\n",
        "rules.yaml:2:10: budget: expected cpu, cuda:N or fake:N, found 'vram'",
    ),
    "budget device twice": (
        "version: 1\nbudget: {cpu: 24GiB, 'cpu': 1GiB}\n",
        "rules.yaml:2:22: duplicate key 'cpu', which stands at rules.yaml:2:10 already",
    ),
    "include missing": (
        "version: 1\ninclude: deepseek-v9\n",
        "rules.yaml:2:10: include: 'deepseek-v9': no such file, and of the shipped ones there are "
        f"{', '.join(shipped_names())}; did you mean 'deepseek-v3'?",
    ),
    "include itself": (
        "version: 1\ninclude: rules.yaml\n",
        "rules.yaml:2:10: include: 'rules.yaml' includes itself: rules.yaml -> rules.yaml",
    ),
    "include no file": (
        "version: 1\ninclude: ./other.yaml\n",
        "rules.yaml:2:10: include: other.yaml: no such rule file; `hybrid rules list` names the shipped ones",
    ),
    "architecture empty": (
        "version: 1\narchitecture: []\n",
        "rules.yaml:2:15: architecture: expected at least one, found an empty list",
    ),
    "complete": (
        "version: 1\ncomplete: 1\n",
        "rules.yaml:2:11: complete: expected true or false, found the number 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    text, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlacementError) as caught:
        load_rules(path)
    assert str(caught.value).replace(f"{tmp_path}/", "") == message


@pytest.mark.parametrize(
    "data, message",
    [
        (b"version: 1\nname: \xff\n", "not text: byte 0xff at offset 17 is not UTF-8"),
        (b"GGUF\x03\x00\x00\x00", "not text: the character U+0003 is not allowed in YAML"),
        (b"#" * (MAX_BYTES + 1), "larger than 256 KiB, which no rule file is; is this another file?"),
        ("version: 1\n".encode("utf-16"), "not text: byte 0xff at offset 0 is not UTF-8"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_bytes(data)
    with pytest.raises(PlacementError, match=re.escape(message)):
        load_rules(path)


@pytest.mark.parametrize(
    "rules, message",
    [
        ("", "rules: expected a name, a path or a dict, found ''"),
        (7, "rules: expected a name, a path or a dict, found 7"),
        (None, "rules: expected a name, a path or a dict, found None"),
        ("no/such.yaml", "no/such.yaml: no such rule file; `hybrid rules list` names the shipped ones"),
        (".", ".: cannot read the rules: Is a directory"),
        ("all-cpus", "rules 'all-cpus': no such file, and of the shipped ones there are auto, "),
        ({"version": 2}, "<rules>.version: version: expected 1, found the number 2"),
        ({}, "<rules>: a rule file lacks 'version'"),
        ({"version": 1, "rules": [{"select": 7}]}, "<rules>.rules[0]: a rule lacks 'place'"),
        (
            {"version": 1, "rules": [{"select": {"role": ["x"]}, "place": {"device": "cpu"}}]},
            f"<rules>.rules[0].select.role[0]: role: expected {ROLES}, found 'x'",
        ),
        (
            {"version": 1, "rules": object()},
            "<rules>.rules: expected text, numbers, lists and dicts, found",
        ),
        (
            {"version": 1, "rules": {1, 2}},
            "<rules>.rules: expected text, numbers, lists and dicts",
        ),
        ({"version": 1, 3: 4}, "<rules>: a key must be text, found 3"),
        ({"version": float("nan")}, "<rules>.version: version: expected 1, found the number nan"),
    ],
)
def test_what_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlacementError) as caught:
        load_rules(rules)
    assert str(caught.value).startswith(message)


def test_a_dict_that_holds_itself() -> None:
    rules: dict[str, object] = {"version": 1}
    rules["rules"] = [rules]
    with pytest.raises(PlacementError, match="nested deeper than 16 levels"):
        load_rules(rules)


SCHEMA = json.loads((resources.files("hybrid.rules") / "schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
# What a schema cannot say: text that is no YAML, order within a range, files, expressions.
BEYOND_A_SCHEMA = {"layers descend", "regex", "regex that explodes", "include missing", "include itself",
                   "include no file"}  # fmt: skip


def plain(node: Node) -> Any:
    """What an editor checks with the schema."""
    if isinstance(node.value, dict):
        return {key: plain(entry.node) for key, entry in node.value.items()}
    return [plain(item) for item in node.value] if isinstance(node.value, tuple) else node.value


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("case", WRONG)
def test_the_schema_refuses_the_same_files(case: str) -> None:
    try:
        node = read_yaml(WRONG[case][0].encode(), "rules.yaml")
    except PlacementError:
        return  # no value for a schema to check
    assert VALIDATOR.is_valid(plain(node)) == (case in BEYOND_A_SCHEMA)


TEXT = st.sampled_from(
    ["", "x", "blk.*", "cpu", "cuda:0", "Q4_K", "attention", "fill", "8GiB", "f16", "none"]
)
DEVICE = st.sampled_from(["cpu", "cuda:0", "fake:1", "cuda:100", "CPU", "cuda", 0, None])
RANGE = st.sampled_from([0, 7, 9999, 10000, -1, 2.0, 2.5, True, None, "3", "3-60", "3 - 60, 9", "1 2", "0,8-",
                         "-1", "a", "3-", "12345", ""])  # fmt: skip
SIZE = st.sampled_from(
    ["8GiB", "22.5 GB", "1B", "1KB", "1kB", "8", 8, "8gb", "fill", "-1GiB", "1M", "1.GiB", "1e3M"]
)
NUMBER = st.sampled_from([0, 1, 2, 0.5, 1.0, 1.5, 10**10, True, "1", None, float("inf")])


def some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={**keys, "odd": st.none()}).map(
        lambda found: {key: value for key, value in found.items() if key != "odd" or len(found) == 1}
    )


def one_or_several(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return items | st.lists(items, max_size=2)


ROLE = st.sampled_from(["attention", "routed_experts", "experts", "", 3])
SELECT = some(
    role=one_or_several(ROLE), layers=one_or_several(RANGE), experts=one_or_several(RANGE), name=TEXT
)
PLACING = st.fixed_dictionaries(
    {"device": DEVICE},
    optional={
        "numa": st.sampled_from(["auto", "none", "shard", "node:1", "node:", "off", 1]),
        "format": st.sampled_from(["Q4_K", "q4_k", "F32", "IQ2_XXS", None]),
        "backend": st.sampled_from(["cpu", "cuda", "fake", "triton"]),
    },
)
RULES = st.fixed_dictionaries(
    {"select": SELECT, "place": PLACING}, optional={"optional": st.sampled_from([True, False, "yes", 1])}
)
CACHE = st.fixed_dictionaries(
    {"device": DEVICE, "bytes": SIZE},
    optional={"policy": st.sampled_from(["static", "dynamic", "lru"]), "profile": TEXT},
)
FILES = st.fixed_dictionaries(
    {"version": st.sampled_from([1, 1, 1, 1.0, 2, "1", True])},
    optional={
        "architecture": one_or_several(TEXT),
        "complete": st.sampled_from([True, False, "true", 0]),
        "rules": st.lists(RULES, max_size=2),
        "experts": some(per_token=NUMBER, threshold=NUMBER, cache=CACHE),
        "kv_cache": some(device=DEVICE, format=TEXT, max_tokens=NUMBER),
        "budget": st.dictionaries(st.sampled_from(["cpu", "cuda:0", "gpu"]), SIZE, max_size=2),
    },
)


@settings(max_examples=400, deadline=None)
@given(FILES)
def test_schema_and_parser_agree(data: dict[str, Any]) -> None:
    try:
        parse(from_python(data), "<rules>")
        accepted = True
    except PlacementError:
        accepted = False
    assert VALIDATOR.is_valid(data) == accepted
