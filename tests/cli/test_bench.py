"""`hybrid bench`: what is run, what is timed, and the figures of a row."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from hybrid.kernels import cpu

from hybrid import bench, calibration, doctor
from hybrid.cli.main import main
from hybrid.describe import summarise
from hybrid.errors import CapacityError, ConfigError
from hybrid.forward import SingleSequence
from hybrid.gguf import GGUFFile
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.moe.reduction import ExpertCount
from hybrid.synth import resolve_shape, synthesise

VOCAB, HIDDEN = 40, 8

# The fields every row has, in any output format.
ROW_FIELDS = {
    "n_prompt", "n_gen", "n_depth", "avg_ts", "stddev_ts", "samples_ts", "isa", "n_threads", "numa",
    "placement_hash", "experts_per_token", "expert_threshold", "limit_kind", "limit_value",
    "limit_fraction", "predicted_ts",
}  # fmt: skip


class StubModel:
    """Checks that each step's batch is one sequence in order, and keeps what it was given."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=1000)
        self.steps: list[tuple[int, int]] = []
        self.logit_rows: list[int] = []
        self.cache: dict[int, int] = {}

    def allocate_cache(self, num_blocks: int) -> None:
        raise AssertionError("the engine has done it")

    def forward(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        start, count = int(batch.positions[0]), len(token_ids)
        assert token_ids.dtype == torch.int32 and int(token_ids.max()) < VOCAB
        assert batch.positions.tolist() == list(range(start, start + count))
        assert batch.query_start.tolist() == [0, count]
        assert batch.seq_lens.tolist() == [start + count]
        table = batch.block_tables[0].tolist()
        for position, token in enumerate(token_ids.tolist(), start):
            slot = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            assert slot == batch.slot_mapping[position - start]
            self.cache[slot] = token
        self.steps.append((start, count))
        return torch.nn.functional.one_hot(token_ids.long(), VOCAB).float()[:, :HIDDEN]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.logit_rows.append(len(hidden_states))
        return torch.zeros(len(hidden_states), VOCAB)

    def decode(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        return self.compute_logits(self.forward(token_ids, batch))

    @property
    def expert_count(self) -> ExpertCount:
        return ExpertCount()

    def close(self) -> None:
        pass


def setup(**changes: Any) -> bench.Setup:
    values: dict[str, Any] = {
        "model_filename": "m.gguf",
        "model_type": "deepseek2 1.0M Q4_K_M",
        "model_size": 1000,
        "model_n_params": 2000,
        "backends": "CPU",
        "isa": "avx2",
        "n_threads": 2,
        "numa": "none",
        "numa_local": None,
        "numa_verified": None,
        "type_k": "f16",
        "n_ubatch": 512,
        "placement_hash": "0" * 12,
        "experts_per_token": 4,
        "expert_threshold": None,
        "routed_active_bytes": 400.0,
        "active_bytes": 600,
        "kv_bytes_per_token": 10,
        "read_bandwidth": 1e6,
        "predicted_ts": {"tg128 @ d100": 12.5},
    }
    return bench.Setup(**(values | changes))


def test_tests_of_a_run() -> None:
    tests = bench.list_tests((512, 0), (128,), (0, 4096))
    assert [t.label for t in tests] == ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]
    assert bench.context_needed(tests) == 4096 + 512
    with pytest.raises(ConfigError, match="no test to run"):
        bench.list_tests((0,), (0,), (0,))


def test_prompt_runs_in_chunks_with_logits_of_the_last_token() -> None:
    model = StubModel()
    sequence = SingleSequence(model, 100, chunk=32)
    rows = list(bench.run_tests(sequence, bench.list_tests((80,), (), (0,)), setup(), repetitions=2))
    run = [(0, 32), (32, 32), (64, 16)]
    assert model.steps == run * 3  # a warm-up and two repetitions
    assert model.logit_rows == [1] * 3
    assert len(rows) == 1 and len(rows[0]["samples_ts"]) == 2


def test_generation_steps_one_token_at_a_time_each_with_logits() -> None:
    model = StubModel()
    list(bench.run_tests(SingleSequence(model, 10), bench.list_tests((), (3,), (0,)), setup(), repetitions=2))
    assert model.steps == [(0, 1), *[(0, 1), (1, 1), (2, 1)] * 2]
    assert model.logit_rows == [1] * 7


def test_depth_is_filled_once_and_kept() -> None:
    model = StubModel()
    sequence = SingleSequence(model, 80, chunk=64)
    list(bench.run_tests(sequence, bench.list_tests((), (2,), (70,)), setup(), repetitions=2))
    assert model.steps == [(0, 64), (64, 6), (70, 1), *[(70, 1), (71, 1)] * 2]


def test_too_long_a_sequence_is_refused_before_work() -> None:
    model = StubModel()
    with pytest.raises(CapacityError, match="3 tokens do not fit a sequence of 2"):
        SingleSequence(model, 2).next_logits([1, 2, 3])
    assert not model.steps


def test_nothing_is_followed_by_nothing() -> None:
    with pytest.raises(ValueError, match="at least one token id"):
        SingleSequence(StubModel(), 2).next_logits([])


def test_scored_positions_of_a_text() -> None:
    model = StubModel()
    sequence = SingleSequence(model, 300, chunk=100)
    ids = torch.arange(300, dtype=torch.int32).numpy() % VOCAB
    pieces = list(sequence.logits(ids, 150))
    assert sum(len(piece) for piece in pieces) == 300 - 1 - 150
    # The last token predicts nothing that is scored, so it is not run.
    assert sum(count for _, count in model.steps) == 299


def test_row_of_generation_states_its_limit() -> None:
    row = bench.make_row(bench.Workload(0, 128, 100), setup(), [10.0, 20.0])
    assert row.keys() >= ROW_FIELDS
    assert json.loads(json.dumps(row)) == row
    assert row["avg_ts"] == 15 and row["stddev_ts"] == pytest.approx(50**0.5)
    assert row["limit_kind"] == "ram_read_bandwidth" and row["limit_value"] == 1e6
    # Step i of 128 attends to 100 + i tokens: 164.5 on average.
    assert row["limit_fraction"] == pytest.approx((600 + 10 * 164.5) * 15 / 1e6)
    assert row["predicted_ts"] == 12.5 and row["expert_threshold"] is None


def test_row_of_a_prompt_has_no_limit_yet() -> None:
    row = bench.make_row(bench.Workload(512, 0, 0), setup(), [10.0])
    assert row["limit_kind"] is row["limit_value"] is row["limit_fraction"] is None
    assert row["stddev_ts"] == 0 and row["predicted_ts"] is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    synthesise(path, resolve_shape("tiny"))
    return path


def made_up_rates(num_threads: int, read_bandwidth: float, formats: Any, announce: Any) -> calibration.Rates:
    """A nanosecond for a weight of any format, and nothing for the rest."""
    points = {format_.name: {1: 1e-9, 128: 128e-9} for format_ in formats}
    return calibration.Rates(read_bandwidth, 0.0, 1e15, points, num_threads)


@pytest.fixture(autouse=True)
def quick_bandwidth_and_best_isa(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(doctor, "_MEASURE_SECONDS", 0.02)
    monkeypatch.setattr(bench, "calibrate", made_up_rates)
    yield
    cpu.select_isa(None)


def command(capsys: pytest.CaptureFixture[str], tiny: Path, *argv: str) -> str:
    assert main(["bench", "-m", str(tiny), "-p", "16", "-n", "4", "-r", "2", *argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_json_rows(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(command(capsys, tiny, "-o", "json", "-d", "0,100", "-t", "1", "--isa", "scalar"))
    assert [row["test"] for row in rows] == ["pp16", "tg4", "pp16 @ d100", "tg4 @ d100"]
    for row in rows:
        assert row.keys() >= ROW_FIELDS
        assert row["isa"] == "scalar" and row["n_threads"] == 1 and row["numa"] == "none"
        assert row["experts_per_token"] == 4 and len(row["placement_hash"]) == 8
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2) and row["avg_ts"] > 0
        assert row["model_size"] == sum(int(t.n_bytes) for t in gguf.GGUFReader(tiny).tensors)
    decode = rows[1]
    token_bytes = decode["active_bytes"] + decode["kv_bytes_per_token"] * 2.5
    assert decode["limit_fraction"] == pytest.approx(token_bytes * decode["avg_ts"] / decode["limit_value"])
    with GGUFFile.open(tiny) as file:
        active = [t for t in summarise(file).tensors if t.role != "embedding"]
    expected = 1e9 / sum(t.active_parameters for t in active)
    assert decode["predicted_ts"] == pytest.approx(expected, rel=0.001)
    assert rows[0]["predicted_ts"] == pytest.approx(expected, rel=0.2)  # logits of the last token alone
    assert decode["active_bytes"] < decode["model_size"] and decode["limit_value"] > 1e8


def test_fewer_experts_are_stated_and_counted(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-o", "json", "-n", "16")
    whole, two, dropped = (
        json.loads(command(capsys, tiny, *options, *more))[-1]
        for more in ((), ("--experts-per-token", "2"), ("--expert-threshold", "0.9"))
    )
    assert (whole["experts_per_token"], whole["expert_threshold"]) == (4, None)
    assert (two["experts_per_token"], two["expert_threshold"]) == (2, None)
    assert (dropped["experts_per_token"], dropped["expert_threshold"]) == (4, 0.9)
    with GGUFFile.open(tiny) as file:
        routed = sum(t.active_bytes for t in summarise(file).tensors if t.role == "routed_experts")
    assert two["active_bytes"] == pytest.approx(whole["active_bytes"] - routed / 2, abs=1)
    # At least one of a token's four experts is run, and at 0.9 hardly ever all.
    assert whole["active_bytes"] - 0.75 * routed - 1 <= dropped["active_bytes"] < whole["active_bytes"]
    for row in (whole, two, dropped):
        token_bytes = row["active_bytes"] + row["kv_bytes_per_token"] * 8.5
        assert row["limit_fraction"] == pytest.approx(token_bytes * row["avg_ts"] / row["limit_value"])
    assert two["predicted_ts"] > whole["predicted_ts"]
    out = command(capsys, tiny, "-n", "0", "--experts-per-token", "2", "--expert-threshold", "0.5")
    assert ", experts per token 2, expert threshold 0.5, placement" in out
    assert ", experts per token 4, placement" in command(capsys, tiny, "-n", "0")


def test_formats_made_while_loading_are_what_is_counted(
    tiny: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "version: 1\nrules:\n  - {select: {role: routed_experts}, place: {device: cpu, format: Q8_0}}\n"
    )
    plain, wider = (
        json.loads(command(capsys, tiny, "-o", "json", *more))[-1] for more in ((), ("--rules", str(rules)))
    )
    with GGUFFile.open(tiny) as file:
        routed = [t for t in summarise(file).tensors if t.role == "routed_experts"]
    grown = sum(t.active_parameters * 34 / 32 - t.active_bytes for t in routed)
    assert grown > 0
    assert wider["active_bytes"] == pytest.approx(plain["active_bytes"] + grown, abs=1)


def test_experts_dropped_by_a_threshold_are_not_active_bytes() -> None:
    row = bench.make_row(bench.Workload(0, 128, 100), setup(), [10.0], experts_run=0.75)
    assert row["active_bytes"] == 600 - 400 // 4
    assert row["limit_fraction"] == pytest.approx((500 + 10 * 164.5) * 10 / 1e6)
    assert "routed_active_bytes" not in row


def test_table_is_llama_benchs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = command(capsys, tiny).splitlines()
    header, rule, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:4])
    assert header == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert all(set(cell) <= set("-:") for cell in rule)
    assert [row[5] for row in rows] == ["pp16", "tg4"]
    assert rows[0][:4] == ["deepseek2 10.8M Q4_K_M", "6.28 MiB", "10.81 M", "CPU"]
    assert all(re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[6]) for row in rows)
    assert len({len(line) for line in lines[:4]}) == 1
    assert "placement" in lines[5] and "GB/s read bandwidth" in lines[7]
    assert lines[6].startswith("pp16: predicted ") and lines[8].startswith("tg4: predicted ")
    assert re.search(r"measured \d+\.\d\d \([+-]\d+%\)$", lines[8])


def test_columns_that_differ_from_the_defaults_are_shown(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = command(capsys, tiny, "--isa", "scalar", "-ub", "8", "-ctk", "f32", "-n", "0")
    header = [cell.strip() for cell in out.splitlines()[0].split("|")[1:-1]]
    assert header == ["model", "size", "params", "backend", "threads", "isa", "ub", "ctk", "test", "t/s"]


def test_csv_and_jsonl_hold_the_same_fields(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = list(csv.DictReader(io.StringIO(command(capsys, tiny, "-o", "csv"))))
    lines = [json.loads(line) for line in command(capsys, tiny, "-o", "jsonl").splitlines()]
    assert [row["test"] for row in table] == [row["test"] for row in lines] == ["pp16", "tg4"]
    assert [list(row) for row in table] == [list(row) for row in lines]
    assert len(json.loads(table[0]["samples_ts"])) == 2


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("-p", "5000"), 1, "takes 5000 tokens, and the model was made for 4096"),
        (("-n", "0", "-p", "0"), 2, "no test to run"),
        (("-p", "12x"), 2, "expected integers >= 0"),
        (("-r", "0"), 2, "expected an integer >= 1"),
        (("--isa", "sse9"), 2, "'sse9' is unknown"),
        (("-m", "/nowhere.gguf"), 1, "/nowhere.gguf: cannot open"),
    ],
)
def test_failures(
    argv: tuple[str, ...], code: int, message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "-m", str(tiny), *argv]) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.out == ""
