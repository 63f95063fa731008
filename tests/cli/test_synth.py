"""`hybrid synth`: files of real shapes with random weights."""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from hybrid.cli import arguments
from hybrid.cli import synth as command
from hybrid.errors import CapacityError, ConfigError, GGUFError
from hybrid.gguf import GGMLType, GGUFFile, dequantize
from hybrid.synth import PRESETS, Formats, resolve_shape, synthesise
from hybrid.synth.presets import VocabularyShape
from hybrid.synth.routing import choose_experts
from hybrid.synth.tensors import list_tensors
from hybrid.synth.vocabulary import build_vocabulary


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(arguments.resolve(parser.parse_args(argv)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth") / "tiny.gguf"
    synthesise(path, resolve_shape("tiny"))
    return path


def test_file_is_read_alike_by_both_readers(tiny: Path) -> None:
    reader = gguf.GGUFReader(tiny)
    with GGUFFile.open(tiny) as file:
        assert {t.name: tuple(int(d) for d in reversed(t.shape)) for t in reader.tensors} == {
            name: info.shape for name, info in file.tensors.items()
        }
        assert file.architecture == "deepseek2"


# Parameter counts of the published models, in billions, as their authors state them.
@pytest.mark.parametrize(
    ("preset", "billions"), [("deepseek-v2-lite", 15.7), ("deepseek-v3", 671), ("kimi-k2", 1026)]
)
@pytest.mark.parametrize("kv_b", ["split", "joint"])
def test_presets_have_the_published_size(preset: str, billions: float, kv_b: Any) -> None:
    tensors, _ = list_tensors(PRESETS[preset], Formats(), kv_b)
    total = sum(math.prod(t.shape) for t in tensors)
    assert total / 1e9 == pytest.approx(billions, rel=0.002)


def test_lite_in_4_bits_is_about_ten_gigabytes() -> None:
    tensors, fallbacks = list_tensors(PRESETS["deepseek-v2-lite"], Formats(), "split")
    assert 9e9 < sum(t.n_bytes for t in tensors) < 10.5e9
    assert fallbacks == {(GGMLType.Q4_K, 1408): GGMLType.Q5_0, (GGMLType.Q4_K, 10944): GGMLType.Q5_0}


@pytest.mark.parametrize("kv_b", ["split", "joint"])
def test_layouts_state_the_head_sizes_their_way(tmp_path: Path, kv_b: Any) -> None:
    path = tmp_path / "m.gguf"
    synthesise(path, resolve_shape("tiny"), kv_b=kv_b)
    with GGUFFile.open(path) as file:
        split = "blk.0.attn_k_b.weight" in file.tensors
        assert split == (kv_b == "split") == ("blk.0.attn_kv_b.weight" not in file.tensors)
        assert file.metadata["deepseek2.attention.key_length"] == (576 if split else 192)
        assert file.metadata.get("deepseek2.attention.key_length_mla") == (192 if split else None)
        assert file.metadata["deepseek2.attention.head_count_kv"] == (1 if split else 4)


def test_weights_have_the_spread_that_keeps_activations_level(tiny: Path) -> None:
    shape = resolve_shape("tiny")
    tensors, _ = list_tensors(shape, Formats(), "split")
    with GGUFFile.open(tiny) as file:
        for tensor in tensors:
            values = dequantize(file.data(tensor.name), tensor.type, tensor.shape)
            assert np.isfinite(values).all()
            if tensor.std and values.size > 10_000:
                assert values.std() == pytest.approx(tensor.std, rel=0.1), tensor.name
                assert abs(values.mean()) < 0.1 * tensor.std, tensor.name
        x = np.random.default_rng(0).standard_normal((64, shape.hidden_size)).astype(np.float32)
        expert = [_matrix(file, f"blk.1.ffn_{part}_exps.weight")[0] for part in ("gate", "up", "down")]
    gate, up = x @ expert[0].T, x @ expert[1].T
    y = (gate / (1 + np.exp(-gate)) * up) @ expert[2].T
    assert 0.7 < y.std() < 1.4


def _matrix(file: GGUFFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return dequantize(file.data(name), info.type, info.shape)


def test_same_seed_same_file_other_seed_other_file(tiny: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    synthesise(again, resolve_shape("tiny"))
    report = synthesise(other, resolve_shape("tiny"), seed=1)
    assert again.read_bytes() == tiny.read_bytes() != other.read_bytes()
    assert report.n_bytes == other.stat().st_size


def test_formats_are_chosen_separately(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    chosen = ("--experts", "iq4_xs", "--down", "Q6_K", "--dense", "Q8_0", "--attention", "BF16")
    assert run("tiny", "-o", str(path), *chosen, "--embedding", "F16", "--lm-head", "Q4_0") == 0
    expected = {
        "blk.1.ffn_gate_exps.weight": "IQ4_XS",
        "blk.1.ffn_up_exps.weight": "IQ4_XS",
        "blk.1.ffn_down_exps.weight": "Q6_K",
        "blk.1.ffn_down_shexp.weight": "Q8_0",
        "blk.0.ffn_up.weight": "Q8_0",
        "blk.0.attn_q_a.weight": "BF16",
        "token_embd.weight": "F16",
        "output.weight": "Q4_0",
        "blk.1.ffn_gate_inp.weight": "F32",
    }
    with GGUFFile.open(path) as file:
        assert {name: file.tensors[name].type.name for name in expected} == expected


def test_shape_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    sizes = ("--layers", "2", "--num-experts", "8", "--expert-width", "1536")
    assert run("tiny", "-o", str(path), *sizes) == 0
    with GGUFFile.open(path) as file:
        assert file.metadata["deepseek2.block_count"] == 2
        assert file.tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 1536, 256)
        assert file.tensors["blk.1.ffn_down_shexp.weight"].shape == (256, 1536)
    assert "bits" in capsys.readouterr().out


def test_fallback_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tiny", "-o", str(tmp_path / "m.gguf"), "--expert-width", "96") == 0
    assert (
        "rows of 96 weights are no whole blocks of Q4_K: Q5_0 is written instead" in capsys.readouterr().err
    )


def test_header_only_file_plans_but_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "v3.gguf"
    assert run("deepseek-v3", "-o", str(path), "--header-only") == 0
    assert path.stat().st_size < 20 << 20
    with pytest.raises(GGUFError):
        GGUFFile.open(path)
    with GGUFFile.open(path, header_only=True) as file:
        assert sum(info.n_elements for info in file.tensors.values()) / 1e9 == pytest.approx(671, rel=0.002)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("llama", "-o", "x"), "unknown preset 'llama'"),
        (("tiny",), "-o FILE"),
        (("tiny", "-o", "x", "--experts", "Q4"), "--experts: unknown format 'Q4'"),
        (("tiny", "-o", "x", "--experts", "IQ4_KS"), "IQ4_KS cannot be filled"),
        (("tiny", "-o", "x", "--layers", "1"), "--layers 1 leaves tiny without experts"),
        (("tiny", "-o", "x", "--num-experts", "3"), "--num-experts 3 is fewer than the 4"),
        (("deepseek-v3", "-o", "x", "--num-experts", "100"), "no multiple of deepseek-v3's 8 expert groups"),
        (("deepseek-v3", "-o", "x", "--num-experts", "8"), "hold 4 experts, fewer than the 8"),
        (("tiny", "-o", "x", "--expert-width", "100"), "no positive multiple of 32"),
        (("tiny", "-o", "x", "--expert-width", "96", "--experts", "NVFP4"), None),
    ],
)
def test_impossible_requests(
    argv: tuple[str, ...], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if message is None:  # the width concerns `down` alone, whose format fits
        assert run(*argv) == 0
        return
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        run(*argv)
    assert not list(tmp_path.iterdir())


def test_existing_file_is_kept_without_force(tiny: Path) -> None:
    before = tiny.read_bytes()
    with pytest.raises(ConfigError, match="--force"):
        run("tiny", "-o", str(tiny), "--seed", "5")
    assert tiny.read_bytes() == before


def test_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match=r"6\.3 MiB of weights .* has 0\.0 MiB left"):
        run("tiny", "-o", str(tmp_path / "m.gguf"))
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_no_file(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(tmp_path / "m.gguf", resolve_shape("tiny"), progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synthesise(tmp_path / "m.gguf", resolve_shape("tiny"), progress=lambda *state: seen.append(state))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("shape", [preset.vocabulary for preset in PRESETS.values()], ids=list(PRESETS))
def test_vocabulary_is_complete_and_distinct(shape: VocabularyShape) -> None:
    vocabulary = build_vocabulary(shape)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == len(vocabulary.token_types) == shape.size
    known = set(vocabulary.tokens)
    for merge in vocabulary.merges:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= known
    # 256 bytes, 4 special tokens, and one merge for each other token.
    assert len(vocabulary.merges) == shape.size - 260


def test_routing_choice_against_plain_loops() -> None:
    rng = np.random.default_rng(0)
    for scoring in ("softmax", "sigmoid"):
        shape = SimpleNamespace(scoring=scoring, num_groups=4, topk_groups=2, num_experts_per_tok=3)
        logits = rng.standard_normal((50, 16)).astype(np.float32)
        bias = rng.standard_normal(16).astype(np.float32) * 0.1
        chosen = choose_experts(logits, bias, shape)  # type: ignore[arg-type]
        for row, found in zip(logits.astype(float), chosen, strict=True):
            scores = 1 / (1 + np.exp(-row)) if scoring == "sigmoid" else np.exp(row) / np.exp(row).sum()
            scores = scores + bias
            best = [sorted(scores[g * 4 : g * 4 + 4])[-2:] for g in range(4)]
            value = [sum(b) if scoring == "sigmoid" else b[1] for b in best]
            groups = sorted(range(4), key=lambda g: -value[g])[:2]
            allowed = [e for e in range(16) if e // 4 in groups]
            assert list(found) == sorted(allowed, key=lambda e: -scores[e])[:3]


def test_entropy_falls_when_routers_prefer_one_expert(tmp_path: Path) -> None:
    from hybrid.synth.routing import RoutingEntropy

    shape = resolve_shape("tiny")
    entropy = RoutingEntropy(shape, np.random.default_rng(0))
    router = np.random.default_rng(1).standard_normal((16, 256)).astype(np.float32) / 16
    entropy.add_layer(router, None)
    spread = entropy.bits
    assert 3.9 < spread <= entropy.max_bits == 4
    favoured = np.full(16, -1.0, np.float32)
    favoured[:4] = 1.0
    lopsided = RoutingEntropy(shape, np.random.default_rng(0))
    lopsided.add_layer(router, favoured)
    assert lopsided.bits == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("flag", "value", "most"), [("--layers", "1025", "1024"), ("--num-experts", "5000", "4096")]
)
def test_numbers_beyond_any_model_are_refused(tmp_path: Path, flag: str, value: str, most: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag}: expected at most {most}, found {value}"):
        run("tiny", "-o", str(tmp_path / "x.gguf"), flag, value)
