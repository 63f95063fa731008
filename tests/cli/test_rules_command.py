"""`hybrid rules` and the flags that mean rules."""

from __future__ import annotations

import json
import re

import pytest

from hybrid.cli.main import main
from hybrid.placement.rules import shipped_names, shipped_text
from hybrid.synth import resolve_shape, synthesise


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "v3.gguf"
    synthesise(path, resolve_shape("deepseek-v3"), header_only=True)
    return path


def out(capsys, *argv):
    assert main([*map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def failure(capsys, *argv, code=1):
    assert main([*map(str, argv)]) == code
    return capsys.readouterr().err


def test_list_and_show(capsys):
    listed = out(capsys, "rules", "list")
    names = re.findall(r"^\| (\S+) +\|", listed, re.MULTILINE)[2:]
    assert names == ["auto", *shipped_names()]
    assert out(capsys, "rules", "show", "hot-experts") == shipped_text("hot-experts")
    assert "did you mean 'hot-experts'?" in failure(capsys, "rules", "show", "hot-expert")


def test_check_a_file_alone(capsys, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\nrules:\n  - {select: {role: output}, place: {device: cpu}}\n")
    assert out(capsys, "rules", "check", path) == f"{path}: 1 rule, well-formed\n"
    path.write_text("version: 1\nrule: []\n")
    error = failure(capsys, "rules", "check", path)
    assert error.startswith(f"hybrid: {path}:2:1: unknown key 'rule'") and error.count("\n") == 1
    assert "name a rule file" in failure(capsys, "rules", "check", "auto", code=2)


def test_check_tells_all_problems_with_a_model(capsys, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "version: 1\nrules:\n"
        "  - {select: {role: routed_experts, layers: 1-9}, place: {device: cpu}}\n"
        "  - {select: {role: output}, place: {device: cuda:0}}\n"
        "  - {select: {name: 'outptu*'}, place: {device: cpu}}\n"
    )
    lines = failure(capsys, "rules", "check", path, "--model", "demo").splitlines()
    assert [line.removeprefix(str(path)).split(": ")[0] for line in lines[:3]] == [":4:46", ":3:45", ":5:5"]
    assert lines[3] == f"hybrid: {path}: 3 problems with demo.gguf"


def test_check_says_what_is_left_to_auto(capsys, v3):
    text = out(capsys, "rules", "check", "deepseek-v3-24gb", "-m", v3)
    assert text.splitlines()[0] == "deepseek-v3-24gb.yaml: 2 rules, well-formed"
    assert "v3.gguf: rules place 912 of 1086 tensors, auto places the other 174; " in text
    assert "rules place 70 of 70 tensors; " in out(capsys, "rules", "check", "all-cpu", "-m", "demo")


def test_init_writes_what_auto_does(capsys, tmp_path, v3):
    size = ("--vram", "16GiB", "--ram", "512GiB", "-c", 4096)
    path = tmp_path / "mine.yaml"
    said = out(capsys, "rules", "init", v3, "-o", path, *size)
    assert said == f"{path}: 2 rules; change it and run with --rules {path}\n"
    assert out(capsys, "rules", "init", v3, *size) == path.read_text()
    assert "--force" in failure(capsys, "rules", "init", v3, "-o", path, code=2)
    plans = [json.loads(out(capsys, "plan", v3, *size, "--rules", rules, "-o", "json"))
             for rules in ("auto", path)]  # fmt: skip
    assert plans[0]["placement_hash"] == plans[1]["placement_hash"]
    out(capsys, "rules", "check", path, "-m", v3)


def test_flags_are_shown_as_rules(capsys, v3):
    flags = ("-ngl", 99, "-cmoe", "-ot", r"blk\.60\.ffn_.*_exps=CUDA0", "--vram", "24GiB", "--ram", "512GiB")
    text = out(capsys, "plan", v3, "-c", 4096, *flags)
    for rule, tensors in (("-ngl 99", 912), ("-cmoe", 171), (r"-ot blk\.60\.ffn_.*_exps=CUDA0", 3)):
        assert re.search(rf"^\| {re.escape(rule)} +\| .* \| +{tensors} \|", text, re.MULTILINE)
    lines = out(capsys, "plan", v3, *flags, "--explain", "blk.60.ffn_up_exps.weight").splitlines()
    assert lines[1] == r"  -ot blk\.60\.ffn_.*_exps=CUDA0: matches: cuda:0"
    assert lines[2] == "  -cmoe: matches, but the rule above has it"


def test_flags_reach_a_run(capsys, monkeypatch):
    monkeypatch.setenv("HYBRID_OVERRIDE_TENSOR", "^output=fake:0")
    run = ("run", "-n", 2, "--temp", 0, "-ncmoe", 3, "Once")
    assert main([*map(str, run)]) == 0
    assert "fake:0: norm, output" in capsys.readouterr().err
    assert "-ot zzz=CPU: this rule matches no tensor" in failure(capsys, *run, "-ot", "zzz=CPU")
    assert "-ngl 9: device: there is no cuda:0 on this machine" in failure(capsys, "run", "-ngl", 9, "x")


@pytest.mark.parametrize(
    "argv, message",
    [
        (("rules",), "hybrid rules: the following arguments are required: COMMAND"),
        (("rules", "chek"), "invalid choice: 'chek'"),
        (("rules", "check"), "hybrid rules check: the following arguments are required: FILE"),
        (("plan", "-ncmoe", "-1"), "expected an integer >= 0"),
        (("plan", "-ngl", "all"), "expected an integer >= 0, found 'all'"),
    ],
)
def test_usage(capsys, argv, message):
    assert message in failure(capsys, *argv, code=2)
