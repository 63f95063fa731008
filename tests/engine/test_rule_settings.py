"""What rule files say beside placements reaches the engine, unless an option says otherwise."""

from __future__ import annotations

import json

import pytest

from hybrid import LLM
from hybrid.cli.main import main
from hybrid.config import ExpertUse, model_path
from hybrid.engine.load import LoadOptions, load
from hybrid.errors import ConfigError, PlacementError
from hybrid.gguf import GGUFFile
from hybrid.placement.planner import plan

RULES = """version: 1
experts: {per_token: 2, threshold: 0.25}
kv_cache: {format: bf16, max_tokens: 320}
"""


@pytest.fixture
def rules(tmp_path):
    """``rules(text)`` -> the file."""

    def write(text):
        path = tmp_path / "rules.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def opened(**options):
    loaded = load(None, LoadOptions(num_threads=1, **options))
    loaded.engine.close()
    return loaded


def test_a_file_decides_where_nothing_is_asked_for(rules):
    loaded = opened(rules=rules(RULES))
    assert loaded.experts == ExpertUse(2, 0.25)
    assert loaded.engine.model.config.router.num_experts_per_tok == 2
    assert loaded.engine.model.config.router.expert_threshold == 0.25
    assert loaded.engine.model.kv_format == "bf16"
    assert loaded.engine.config.max_model_len == 320
    assert (loaded.plan.size.kv_format, loaded.plan.size.max_model_len) == ("bf16", 320)
    assert loaded.header.dims.num_experts_per_tok == 2


def test_options_win_over_the_file(rules):
    loaded = opened(
        rules=rules(RULES), experts_per_token=3, expert_threshold=0.0, kv_format="f32", max_model_len=128
    )
    assert loaded.engine.model.config.router.num_experts_per_tok == 3
    assert loaded.engine.model.config.router.expert_threshold == 0
    assert loaded.engine.model.kv_format == "f32"
    assert loaded.engine.config.max_model_len == 128
    whole = opened(rules=rules(RULES), max_model_len=0)
    assert whole.engine.config.max_model_len == 2048


def test_without_either_it_is_the_model(rules):
    loaded = opened()
    assert loaded.experts.per_token is None
    assert loaded.engine.model.config.router.num_experts_per_tok == 4
    assert loaded.engine.model.config.router.expert_threshold == 0
    assert (loaded.engine.model.kv_format, loaded.engine.config.max_model_len) == ("f16", 2048)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("kv_cache: {device: 'fake:0'}", r"rules\.yaml:2:\d+: device: .* on cpu"),
        ("kv_cache: {max_tokens: 4096}", r"rules\.yaml:2:\d+: max_tokens: expected at most 2048"),
        ("experts: {per_token: 5}", r"rules\.yaml:2:\d+: per_token: expected at most 4"),
    ],
)
def test_what_cannot_be_done_is_refused_before_reading(rules, monkeypatch, text, problem):
    monkeypatch.setattr(GGUFFile, "read_into", lambda *args: pytest.fail("read"))
    with pytest.raises(PlacementError, match=problem):
        opened(rules=rules(f"version: 1\n{text}\n"))


def test_the_option_names_bad_formats_itself():
    with pytest.raises(ConfigError, match="kv_format: expected f32, f16, bf16, q8_0, found 'q4_0'"):
        LLM(None, kv_format="q4_0")


def test_run_and_plan_say_the_same(rules, capsys):
    path = rules(RULES)
    assert main(["run", "--rules", str(path), "-n", "1", "--temp", "0", "Once"]) == 0
    said = capsys.readouterr().err
    assert "context 320, experts per token 2, expert threshold 0.25" in said
    assert main(["plan", "demo", "--rules", str(path), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 320


def test_a_missing_file_is_told_without_numbers(capsys):
    assert main(["run", "--rules", "missing.yaml", "x"]) == 1
    error = capsys.readouterr().err
    assert "missing.yaml" in error
    assert "Errno" not in error and "Traceback" not in error
    assert error.count("\n") == 1


SPLIT = """version: 1
rules:
  - select: {role: routed_experts, experts: 0-3}
    place: {device: "fake:0", format: Q4_0}
  - select: {role: routed_experts, experts: [4, 6, 8-9]}
    place: {device: "fake:1"}
  - select: {role: attention, layers: 2}
    place: {device: "fake:1"}
  - select: {role: [shared_experts, dense_ffn]}
    place: {device: cpu, format: Q8_0}
"""


def test_experts_and_formats_of_a_file_lie_where_its_plan_says(rules):
    """Loaded bytes equal the plan's, share by share."""
    path = rules(SPLIT)
    loaded = load(None, LoadOptions(path, 256, num_threads=1))
    try:
        found = dict(loaded.engine.model.loaded_bytes)
        for name, placement in loaded.plan.placements.items():
            by_device = {}
            for part in placement.parts:
                by_device[part.device] = by_device.get(part.device, 0) + part.n_bytes
            for device, n_bytes in by_device.items():
                assert found.pop((name, device)) == n_bytes, (name, device)
        assert not found
        for device, memory in loaded.plan.memory.items():
            assert loaded.engine.model.weight_bytes[device] == memory.weights_bytes
        split = loaded.plan.placements["blk.1.ffn_up_exps.weight"]
        assert [(s.device, s.experts) for s in split.shares if s.device != "cpu"] == [
            ("fake:0", (0, 1, 2, 3)),
            ("fake:1", (4, 6, 8, 9)),
        ]
    finally:
        loaded.engine.close()
    with GGUFFile.open(model_path(None)) as file:
        assert plan(file, path).digest() == loaded.plan.digest()
