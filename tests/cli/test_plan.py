"""`hybrid plan`: reports for this machine and for imagined ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

from hybrid import calibration
from hybrid.cli.main import main
from hybrid.gguf import GGUFFile
from hybrid.placement.machine import GIB
from hybrid.synth import resolve_shape, synthesise

SERVER = ("--vram", "24GiB", "--ram", "512GiB", "--nodes", "2", "--bandwidth", "200", "-t", "64")


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "v3.gguf"
    synthesise(path, resolve_shape("deepseek-v3"), header_only=True)
    return path


@pytest.fixture(autouse=True)
def no_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def out(capsys, *argv):
    assert main(["plan", *map(str, argv)]) == 0
    return capsys.readouterr().out


def failure(capsys, *argv, code=1):
    assert main(["plan", *map(str, argv)]) == code
    return capsys.readouterr().err


def test_json_has_the_keys_that_are_promised(capsys, v3):
    found = json.loads(out(capsys, v3, *SERVER, "-c", 32768, "-o", "json"))
    gpu = found["devices"]["cuda:0"]
    assert gpu["budget_bytes"] == 24 * GIB and gpu["kv_cache_bytes"] == 61 * 32768 * 1152
    parts = gpu["weights_bytes"] + gpu["kv_cache_bytes"] + gpu["scratch_bytes"]
    assert gpu["total_bytes"] == parts and sum(gpu["scratch"].values()) == gpu["scratch_bytes"]
    assert found["predicted"]["decode_tps"] > 1 and found["predicted"]["prefill_tps"] > 1
    with GGUFFile.open(v3, header_only=True) as file:
        assert [t["name"] for t in found["tensors"]] == list(file.tensors)
        assert sum(t["bytes"] for t in found["tensors"]) == sum(t.n_bytes for t in file.tensors.values())
    output = next(t for t in found["tensors"] if t["name"] == "output.weight")
    expected = {"role": "output", "device": "cuda:0", "format": "Q6_K", "rule": "auto", "numa": "none"}
    assert {key: output[key] for key in expected} == expected
    assert any("cuda:0" in warning for warning in found["warnings"])


def test_yaml_says_the_same(capsys, v3):
    argv = (v3, *SERVER, "-c", 4096)
    assert yaml.safe_load(out(capsys, *argv, "-o", "yaml")) == json.loads(out(capsys, *argv, "-o", "json"))


def test_the_report_names_devices_roles_layers_and_rules(capsys, v3):
    text = out(capsys, v3, *SERVER, "-c", 32768)
    assert "| 3-59   |" in text and "| 60     |" in text
    assert "cuda:0 |███" in text and "2 NUMA nodes (shard)" in text
    assert "tokens/s decoding" in text and "estimated" in text
    assert "## Warnings" in text
    assert "| routed_experts | cpu    |     171 |" in text


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]


def test_the_page_stands_alone_and_shows_every_tensor(capsys, tmp_path):
    path = tmp_path / "<script>.gguf"
    synthesise(path, resolve_shape("tiny"), header_only=True)
    text = out(capsys, path, "-o", "html")
    page = Page()
    page.feed(text)
    assert not page.links and "script" not in page.tags and "url(" not in text
    with GGUFFile.open(path, header_only=True) as file:
        assert page.tags.count("rect") == len(file.tensors)


def test_two_gpus_and_their_bandwidths(capsys, v3):
    argv = (v3, "--ram", "512GiB", "--vram", "24GiB", "--vram", "cuda:1=16GiB", "-o", "json")
    found = json.loads(out(capsys, *argv))
    assert found["devices"]["cuda:1"]["budget_bytes"] == 16 * GIB
    slow = json.loads(out(capsys, *argv, "--bandwidth", "ram=10,cuda:0=100,cuda:1=100,pcie=1"))
    assert slow["predicted"]["decode_tps"] < found["predicted"]["decode_tps"] / 2


def test_flags_of_llama_cpp(capsys, v3):
    text = out(capsys, v3, "--ram", "512GiB", "--vram", "24GiB", "-c", 32768, "--emit", "llama.cpp")
    assert text.startswith("-c 32768 -ub 512 -ngl 999 -ot 'blk\\.(3|4|5|")
    assert text.endswith("|58|59)\\.ffn_(gate|up|down)_exps=CPU'\n")
    assert out(capsys, "--emit", "llama.cpp") == "-c 2048 -ub 512 -ngl 0\n"


def test_explain_shows_the_rules_tried(capsys, tmp_path):
    rules = tmp_path / "r.yaml"
    rules.write_text(
        "version: 1\nrules:\n"
        "  - {select: {role: output}, place: {device: cpu}}\n"
        "  - {select: {role: attention, layers: 1}, place: {device: fake:0}}\n"
        '  - {select: {name: "*"}, place: {device: cpu}}\n'
    )
    lines = out(capsys, "--rules", rules, "--explain", "blk.1.attn_output.weight").splitlines()
    assert lines[0].startswith("blk.1.attn_output.weight: role attention, layer 1, ")
    assert lines[1].endswith("r.yaml:3:5: does not match")
    assert lines[2].endswith("r.yaml:4:5: matches: fake:0")
    assert lines[3].endswith("r.yaml:5:5: matches, but the rule above has it")
    assert lines[4].startswith("  fake:0 by ")
    error = failure(capsys, "--explain", "blk.1.atn_output.weight")
    assert "did you mean 'blk.1.attn_output.weight'?" in error


def test_a_plan_that_does_not_fit_is_refused_with_what_would(capsys):
    error = failure(capsys, "--ram", "20MiB")
    first, header, sums, *changes = error.splitlines()
    assert first == "hybrid: the model does not fit on cpu (15.4 MiB too much)"
    assert header.split("  ")[1] == "device" and re.split("  +", sums)[1:4] == ["cpu", "9.3 MiB", "4.5 MiB"]
    assert re.split("  +", sums)[6] == "20.0 MiB"
    assert changes[0] == "Any one of these would make it fit:" and "a context of" in changes[1]
    found = json.loads(out(capsys, "--ram", "20MiB", "--fit", "-o", "json"))
    assert found["devices"]["cpu"]["total_bytes"] <= 20 << 20
    assert f"(-c {found['context']})" in error


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--vram", "24"), "as in 24GiB or cuda:1=16GiB, found '24'"),
        (("--vram", "=1GiB"), "[DEVICE=]SIZE"),
        (("--vram", "cpu=1GiB"), "expected cuda:N, found 'cpu'"),
        (("--vram", "1GiB,cuda:0=2GiB"), "cuda:0 is given twice"),
        (("--ram", "0GiB"), "a size, as in 512GiB"),
        (("--ram", "infGiB"), "a size, as in 512GiB"),
        (("--bandwidth", "cuda:7=900"), "no device 'cuda:7' on this machine; there are ram, pcie"),
        (("--bandwidth", "0"), "GB/s"),
        (("--isa", "neon"), "neon"),
        (("-c", "999999999"), "at most the 2048 tokens the model was made for"),
        (("-o", "csv"), "md, json, yaml or html"),
        (("--emit", "vllm"), "llama.cpp"),
    ],
)
def test_usage(capsys, argv, message):
    assert message in failure(capsys, *argv, code=2)


def test_measured_rates_are_used_for_this_machine_alone(capsys):
    machine = calibration.this_machine()
    rates = calibration.Rates(
        20e9, 1e-5, 1e10, {"Q4_K": {1: 1e-10, 16: 2e-10, 128: 9e-10}}, machine.num_threads
    )
    calibration.write_rates(rates, machine.isa)
    assert calibration.read_rates(machine.num_threads, machine.isa) == rates
    assert json.loads(out(capsys, "-o", "json"))["predicted"]["rates"] == "measured"
    assert json.loads(out(capsys, "-o", "json", "--nodes", "2"))["predicted"]["rates"] == "estimated"
    path = calibration.rates_path(machine.num_threads, machine.isa)
    kept = json.loads(path.read_text())
    for bad in (
        [],
        kept | {"read_bandwidth": 0},
        kept | {"call_s": float("nan")},
        kept | {"weight_s": {"Q4_K": {}}},
    ):
        path.write_text(json.dumps(bad))
        assert calibration.read_rates(machine.num_threads, machine.isa) is None


def test_planning_imports_no_torch(v3):
    code = (
        "import sys; from hybrid.cli.main import main; code = main(sys.argv[1:]);"
        "sys.exit(code or ('torch' if 'torch' in sys.modules else 0))"
    )
    argv = [sys.executable, "-P", "-c", code, "plan", str(v3), *SERVER]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_header_cannot_be_loaded_and_the_error_says_why(capsys, v3):
    assert main(["run", "-m", str(v3), "x"]) == 1
    assert "header without weights, for `hybrid plan` and `hybrid inspect`" in capsys.readouterr().err


def test_a_device_this_build_lacks_is_planned_and_not_loaded(capsys, tmp_path):
    rules = tmp_path / "gpu.yaml"
    rules.write_text("version: 1\nrules:\n  - {select: {role: attention}, place: {device: 'cuda:0'}}\n")
    assert "has not run on a GPU yet" in out(capsys, "--rules", rules, "--vram", "1GiB")
    assert main(["run", "--rules", str(rules), "-n", "1"]) == 1
    assert "gpu.yaml:3:49: device: there is no cuda:0 on this machine" in capsys.readouterr().err
