"""`hybrid inspect`: figures against a sum by hand over what the gguf package reads."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hybrid import describe
from hybrid.cli import arguments
from hybrid.cli import inspect as command
from hybrid.cli.table import format_bytes, format_count, markdown_table
from hybrid.errors import ConfigError, GGUFError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter
from hybrid.placement.roles import ROLES
from hybrid.synth import Formats, resolve_shape, synthesise


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(arguments.resolve(parser.parse_args(argv)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "tiny.gguf"
    synthesise(path, resolve_shape("tiny"), Formats(experts=GGMLType.IQ4_XS, down=GGMLType.Q6_K))
    return path


def active_bytes_by_hand(path: Path, used: int, total: int) -> float:
    """4 of 16 experts, one embedding row, everything else."""
    active = 0.0
    for tensor in gguf.GGUFReader(path).tensors:
        if "_exps." in tensor.name:
            active += tensor.n_bytes * used / total
        elif tensor.name == "token_embd.weight":
            active += tensor.n_bytes / int(tensor.shape[1])
        else:
            active += tensor.n_bytes
    return active


def report_of(path: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run(str(path), "-o", "json", *argv) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_report(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report_of(tiny, capsys)
    tensors = gguf.GGUFReader(tiny).tensors
    assert found["architecture"] == "deepseek2" and found["name"] == "tiny (random weights)"
    assert found["parameters"] == sum(int(t.n_elements) for t in tensors)
    assert found["bytes"] == sum(int(t.n_bytes) for t in tensors)
    assert found["active_bytes_per_token"] == round(active_bytes_by_hand(tiny, 4, 16))
    assert found["kv_bytes_per_token"] == 3 * 576 * 2
    assert found["header_only"] is False and found["tensors_without_kernel"] == []
    assert found["metadata"]["tokenizer.ggml.tokens"]["length"] == 1024
    assert {t["name"]: t["format"] for t in found["tensors"]} == {t.name: t.tensor_type.name for t in tensors}
    for column in ("bytes", "parameters", "tensors"):
        whole = len(tensors) if column == "tensors" else found[column]
        assert sum(role[column] for role in found["roles"]) == whole
    experts = next(role for role in found["roles"] if role["role"] == "routed_experts")
    assert list(experts["formats"]) == ["IQ4_XS", "Q6_K"]
    assert experts["active_bytes_per_token"] * 4 == experts["bytes"]


def test_roles_of_every_tensor(tiny: Path) -> None:
    with GGUFFile.open(tiny) as file:
        roles = {t.info.name: t.role for t in describe.summarise(file).tensors}
    expected = {
        "token_embd.weight": "embedding",
        "output.weight": "output",
        "output_norm.weight": "norm",
        "blk.0.attn_kv_a_mqa.weight": "attention",
        "blk.0.ffn_down.weight": "dense_ffn",
        "blk.1.ffn_gate_inp.weight": "router",
        "blk.1.exp_probs_b.bias": "router",
        "blk.1.ffn_up_exps.weight": "routed_experts",
        "blk.1.ffn_up_shexp.weight": "shared_experts",
        "blk.1.ffn_norm.weight": "norm",
    }
    assert {name: roles[name] for name in expected} == expected
    assert set(roles.values()) <= set(ROLES)


def test_cache_format_changes_only_the_cache(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half, full = report_of(tiny, capsys), report_of(tiny, capsys, "-ctk", "f32")
    assert full["kv_bytes_per_token"] == 2 * half["kv_bytes_per_token"]
    assert full["active_bytes_per_token"] == half["active_bytes_per_token"]


def test_header_alone_gives_the_same_figures(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "header.gguf"
    formats = Formats(experts=GGMLType.IQ4_XS, down=GGMLType.Q6_K)
    synthesise(path, resolve_shape("tiny"), formats, header_only=True)
    found, whole = report_of(path, capsys), report_of(tiny, capsys)
    assert found["header_only"] is True
    for key in ("bytes", "parameters", "active_bytes_per_token", "kv_bytes_per_token", "roles"):
        assert found[key] == whole[key]


def test_file_cut_within_its_data_is_an_error(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:-1000])
    with pytest.raises(GGUFError, match="missing"):
        run(str(path))


def test_published_v3_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "v3.gguf"
    synthesise(path, resolve_shape("deepseek-v3"), header_only=True)
    found = report_of(path, capsys)
    # DeepSeek-V3: 671 B parameters, 37 B of them active (which counts the whole embedding, 0.9 B, as active).
    assert found["parameters"] / 1e9 == pytest.approx(671, rel=0.002)
    assert found["active_parameters_per_token"] / 1e9 == pytest.approx(37 - 0.9, rel=0.02)
    assert found["kv_bytes_per_token"] == 61 * 576 * 2
    assert found["active_bytes_per_token"] == round(sum_by_header(path))


def sum_by_header(path: Path) -> float:
    """The same sum from tensor types, sizes by the gguf package."""
    active = 0.0
    with GGUFFile.open(path, header_only=True) as file:
        for info in file.tensors.values():
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(info.type))]
            n_bytes = info.n_elements // block * size
            share = 8 / 256 if "_exps." in info.name else 1 / info.shape[0] if "embd" in info.name else 1
            active += n_bytes * share
    return active


def write_model(path: Path, tensors: dict[str, tuple[tuple[int, ...], GGMLType]], **metadata: Any) -> Path:
    with GGUFWriter(path, header_only=True) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        for key, value in metadata.items():
            writer.add_metadata("deepseek2." + key.replace("__", "."), value)
        for name, (shape, type_) in tensors.items():
            writer.add_tensor(name, shape, type_)
    return path


def test_special_cases_of_active_bytes(tmp_path: Path) -> None:
    q8, f32 = GGMLType.Q8_0, GGMLType.F32
    path = write_model(
        tmp_path / "m.gguf",
        {
            "token_embd.weight": ((100, 32), f32),  # tied: read whole as the output matrix, and one row
            "blk.0.attn_kv_b.weight": ((64, 32), q8),  # beside its halves: not read
            "blk.0.attn_k_b.weight": ((2, 32, 32), q8),
            "blk.0.attn_v_b.weight": ((2, 32, 32), q8),
            "blk.0.ffn_up_exps.weight": ((8, 32, 32), q8),
            "blk.1.ffn_up_exps.weight": ((8, 32, 32), q8),
            "blk.2.ffn_up_exps.weight": ((8, 32, 32), q8),  # a next-token-prediction layer
            "blk.2.nextn.eh_proj.weight": ((32, 64), q8),
        },
        block_count=3,
        nextn_predict_layers=1,
        expert_count=8,
        expert_used_count=np.array([2, 4, 4], np.uint32),
    )
    with GGUFFile.open(path, header_only=True) as file:
        summary = describe.summarise(file)
    names = {t.info.name: t.active_bytes for t in summary.tensors}
    expert = 32 * 34
    assert names["blk.0.ffn_up_exps.weight"] == 2 * expert
    assert names["blk.1.ffn_up_exps.weight"] == 4 * expert
    assert names["blk.2.ffn_up_exps.weight"] == names["blk.2.nextn.eh_proj.weight"] == 0
    assert summary.active_bytes == 101 * 128 + 2 * (2 * 32 * 34) + 6 * expert


@pytest.mark.parametrize("used", [0, 9])
def test_impossible_expert_counts(tmp_path: Path, used: int) -> None:
    tensors = {"blk.0.ffn_up_exps.weight": ((8, 32, 32), GGMLType.Q8_0)}
    path = write_model(tmp_path / "m.gguf", tensors, expert_count=8, expert_used_count=used)
    with GGUFFile.open(path, header_only=True) as file, pytest.raises(GGUFError, match="expert_used_count"):
        describe.summarise(file)


def test_formats_without_a_kernel_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(
        tmp_path / "m.gguf",
        {
            "blk.0.ffn_up.weight": ((64, 256), GGMLType.IQ4_KS),
            "blk.0.ffn_down.weight": ((64, 256), GGMLType.Q4_K),
            "blk.0.ffn_gate.weight": ((64, 256), GGMLType.IQ4_KS),
        },
    )
    assert run(str(path)) == 0
    out = capsys.readouterr().out
    assert "no kernel for 2 × IQ4_KS" in out
    assert out.endswith("- blk.0.ffn_up.weight\n- blk.0.ffn_gate.weight\n")
    # 64 rows of 4 bytes of row scale and one block of 136.
    assert report_of(path, capsys)["roles"][0]["formats"] == {"IQ4_KS": 2 * 64 * 140, "Q4_K": 64 * 144}


def test_cache_of_models_with_keys_and_values(tmp_path: Path) -> None:
    keys = {"block_count": 2, "attention__head_count_kv": 4, "attention__key_length": 64}
    path = write_model(tmp_path / "a.gguf", {"x": ((4,), GGMLType.F32)}, **keys, attention__value_length=32)
    other = write_model(tmp_path / "b.gguf", {"x": ((4,), GGMLType.F32)}, **keys)
    with GGUFFile.open(path, header_only=True) as file:
        assert describe.kv_bytes_per_token(file, "f32") == 2 * 4 * (64 + 32) * 4
    with GGUFFile.open(other, header_only=True) as file:
        assert describe.kv_bytes_per_token(file) is None


def test_markdown_report(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tiny)) == 0
    out = capsys.readouterr().out
    assert "4 of 16 per token" in out and "IQ4_XS, Q6_K" in out
    assert "1024 values:" in out and "blk.0.attn_norm.weight" not in out
    assert run(str(tiny), "--tensors") == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["blk.1.ffn_gate_exps.weight", "routed_experts", "16 × 256 × 256", "IQ4_XS", "544.00 KiB"] in rows


def test_no_torch_is_loaded(tiny: Path) -> None:
    code = (
        "import sys; from hybrid.cli.main import main; code = main(['inspect', sys.argv[1]]);"
        " sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tiny)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_other_output_formats_are_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(str(tiny), "-o", "csv")
    assert "expected md or json, found 'csv'" in capsys.readouterr().err


def test_unknown_isa(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="sse9"):
        run(str(tiny), "--isa", "sse9")


def test_numbers_and_tables() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 << 30)] == ["0 B", "1023 B", "1.00 KiB", "3.00 GiB"]
    assert [format_count(n) for n in (999, 15.7e9)] == ["999", "15.70 B"]
    table = markdown_table(("a", "n"), [("x", "1"), ("long", "22")], right=("n",))
    assert table == "| a    |  n |\n| ---- | -: |\n| x    |  1 |\n| long | 22 |"
