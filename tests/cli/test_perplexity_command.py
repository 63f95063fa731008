"""`hybrid perplexity` on a small file of random weights."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.cli.main import main
from hybrid.llm import LLM
from hybrid.sampling_params import SamplingParams
from hybrid.synth import resolve_shape, synthesise


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perplexity") / "tiny.gguf"
    synthesise(path, resolve_shape("tiny"))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perplexity") / "text.txt"
    words = np.random.default_rng(0).choice(["some", "words", "of", "a", "language", "nobody", "speaks"], 400)
    path.write_text(" ".join(words.tolist()) + "\n")
    return path


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert main(["perplexity", *map(str, argv), "-c", "64", "-o", "json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    result: dict[str, Any] = json.loads(captured.out)
    return result


def test_command_agrees_with_the_engine(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = command(capsys, tiny, text, "--chunks", 2)
    assert found["chunks"] == 2 and found["n_ctx"] == 64 and found["tokens_scored"] == 2 * 31
    nll = []
    with LLM(tiny, max_model_len=128) as llm:
        ids = llm.tokenizer.encode(text.read_text().removesuffix("\n"))
        assert ids[0] == llm.tokenizer.bos_id
        for start in (0, 64):
            window = [ids[0], *ids[start + 1 : start + 64]]
            params = SamplingParams(max_tokens=1, prompt_logprobs=1)
            [output] = llm.generate({"prompt_token_ids": window}, params, use_tqdm=False)
            assert output.prompt_logprobs is not None
            nll += [-output.prompt_logprobs[i][window[i]].logprob for i in range(33, 64)]
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)


def test_command_compares_with_a_base(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.logprobs"
    first = command(capsys, "-m", tiny, text, "--save-logprobs", base)
    assert first["kl_mean"] is None
    same = command(capsys, tiny, text, "--kl-base", base, "-t", 1)
    assert same["kl_max"] == 0 and same["top1_agreement"] == 1
    assert same["perplexity"] == same["base_perplexity"] == first["perplexity"]
    other = command(capsys, tiny, text, "--kl-base", base, "-ctk", "bf16")
    assert 0 < other["kl_mean"] < other["kl_max"] < 1
    assert main(["perplexity", str(tiny), str(text), "-c", "64", "--kl-base", str(base)]) == 0
    out = capsys.readouterr().out
    assert "PPL = " in out and "mean KL = 0.000000" in out and "same top token = 100.000" in out


def test_text_comes_from_stdin_too(
    tiny: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from_file = command(capsys, tiny, text)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.read_bytes())))
    assert command(capsys, tiny, "-") == from_file


@pytest.mark.parametrize(
    ("content", "options", "code", "message"),
    [
        (None, (), 2, "cannot read the text: No such file"),
        (b"", (), 2, "the text is empty"),
        (b"abc\xff", (), 2, "not UTF-8 at byte 3"),
        (b"short", (), 2, "fewer than one window of 512"),
        (b"short", ("-c", "3"), 2, "at least 4 tokens"),
        (b"short", ("-o", "csv"), 2, "expected md or json"),
        (b"short", ("third",), 2, "takes a model and a text, found 3"),
        (b"word " * 99, ("-c", "16", "--kl-base", "/nowhere"), 2, "/nowhere: cannot open"),
        (b"word " * 99, ("-c", "9999"), 2, "4096"),
    ],
)
def test_failures_are_one_line(
    content: bytes | None,
    options: tuple[str, ...],
    code: int,
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["perplexity", str(tiny), str(path), *options]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_windows_are_of_the_context_that_is_there(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's own with ``-c 0``, and what fits with ``--fit``."""
    long = text.parent / "long.txt"
    long.write_text(text.read_text() * 20)
    for options, expected in ((["-c", "0"], 2048), (["-c", "2048", "--ram", "20MiB", "--fit"], None)):
        assert main(["perplexity", str(long), "--chunks", "1", "-o", "json", *options]) == 0
        found = json.loads(capsys.readouterr().out)["n_ctx"]
        assert found == expected if expected else 64 <= found < 2048
