"""`experts_per_token` and `expert_threshold` from options to logits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from hybrid import LLM, SamplingParams
from hybrid.cli.main import main
from hybrid.config import ExpertUse, model_path
from hybrid.engine.load import LoadOptions
from hybrid.errors import ConfigError
from hybrid.forward import SingleSequence
from hybrid.gguf import GGUFFile
from hybrid.placement.active import ActiveShares
from hybrid.placement.machine import Machine
from hybrid.placement.planner import Planner

IDS = np.arange(5, 70, dtype=np.int32)


def logits(model=None, single_steps=False, **options):
    """What follows every token of `IDS`, and the number of experts chosen and run."""
    with LLM(model, max_model_len=128, num_threads=1, **options) as llm:
        loaded = llm._loaded.engine.model
        sequence = SingleSequence(loaded, 128)
        if single_steps:
            rows = [sequence.next_logits(IDS[i : i + 1]) for i in range(len(IDS))]
        else:
            rows = [loaded.compute_logits(hidden) for hidden in sequence.extend(IDS)]
        return np.concatenate([row.numpy() for row in rows]), loaded.expert_count


def test_fewer_experts_are_those_of_a_file_that_says_so(tmp_path):
    """The demo model with another number in its header: what its family makes of fewer experts."""
    path = tmp_path / "two.gguf"
    shutil.copy(model_path("demo"), path)
    with GGUFFile.open(path) as file:
        assert file.get("deepseek2.expert_used_count", int) == 4
    raw = path.read_bytes()
    key = b"deepseek2.expert_used_count" + (4).to_bytes(4, "little")  # a UINT32
    assert raw.count(key) == 1
    value = raw.index(key) + len(key)
    path.write_bytes(raw[:value] + (2).to_bytes(4, "little") + raw[value + 4 :])
    assert (logits(path)[0] == logits(experts_per_token=2)[0]).all()
    assert not (logits(path)[0] == logits()[0]).all()


def test_all_of_them_change_nothing():
    plain, count = logits()
    assert count == (0, 0)
    assert (logits(experts_per_token=4)[0] == plain).all()
    assert (logits(expert_threshold=0.0)[0] == plain).all()
    assert (logits(expert_threshold=0)[0] == plain).all()


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_a_threshold_counts_what_it_runs(threshold):
    found, (chosen, run) = logits(expert_threshold=threshold)
    layers, per_token = 3, 4
    assert chosen == len(IDS) * layers * per_token
    assert chosen / per_token <= run < chosen
    if threshold == 1:
        assert run == chosen / per_token
    assert (logits(expert_threshold=threshold, single_steps=True)[0] == found).all()


def test_both_at_once():
    _, (chosen, run) = logits(experts_per_token=2, expert_threshold=0.5)
    assert chosen == len(IDS) * 3 * 2
    assert chosen / 2 <= run < chosen


@pytest.mark.parametrize(
    "bad",
    [{"experts_per_token": value} for value in (0, -1, 2.0, True, "3")]
    + [{"expert_threshold": value} for value in (-0.1, 1.1, float("nan"), "0.3", True)],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        LoadOptions(**bad)


def test_more_than_the_model_has_are_refused_before_reading(monkeypatch):
    monkeypatch.setattr(GGUFFile, "read_into", lambda *args: pytest.fail("read"))
    with pytest.raises(ConfigError, match="expected 1 to 4, the number it was made for, found 5"):
        LLM(None, experts_per_token=5)


def test_a_plan_counts_the_experts_that_are_run():
    with GGUFFile.open(model_path("demo")) as file:
        whole, two = (Planner(file, "auto", Machine(), ExpertUse(n)) for n in (None, 2))
        assert whole.model.dims.num_experts_per_tok == 4
        assert two.model.dims.num_experts_per_tok == 2
        for a, b in zip(whole.model.tensors, two.model.tensors, strict=True):
            assert b == (replace(a, share=a.share / 2) if a.role == "routed_experts" else a)
        shares = ActiveShares(file, 1)
        info = file.tensors["blk.1.ffn_up_exps.weight"]
        assert shares.share(info, "routed_experts") == 1 / 16


def test_the_command_line_passes_them_on(capsys):
    argv = ["run", "-n", "4", "--temp", "0", "--experts-per-token", "1", "--expert-threshold", "0.5", "Once"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "experts per token 1, expert threshold 0.5" in captured.err
    with LLM(experts_per_token=1, expert_threshold=0.5) as llm:
        params = SamplingParams(temperature=0, max_tokens=4)
        assert llm.generate("Once", params, use_tqdm=False)[0].outputs[0].text == captured.out.rstrip("\n")


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (["run", "--experts-per-token", "5", "x"], 2, "expected 1 to 4, the number it was made for, found 5"),
        (
            ["plan", "demo", "--experts-per-token", "5"],
            2,
            "expected 1 to 4, the number it was made for, found 5",
        ),
        (["run", "--experts-per-token", "0", "x"], 2, "expected an integer >= 1, found '0'"),
        (["bench", "--expert-threshold", "1.5"], 2, "expected a number from 0 to 1, found '1.5'"),
        (["plan", "demo", "--expert-threshold", "nan"], 2, "expected a number from 0 to 1, found 'nan'"),
    ],
)
def test_bad_flags(argv, code, message, capsys):
    assert main(argv) == code
    assert message in capsys.readouterr().err


def test_plan_predicts_with_fewer_experts(capsys):
    speeds, warnings = [], []
    for more in ([], ["--experts-per-token", "1"], ["--expert-threshold", "0.5"]):
        assert main(["plan", "demo", "-o", "json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        speeds.append(found["predicted"]["decode_tps"])
        warnings.append([text for text in found["warnings"] if "threshold" in text])
    assert speeds[1] > speeds[0] == speeds[2]
    assert [len(texts) for texts in warnings] == [0, 0, 1]
