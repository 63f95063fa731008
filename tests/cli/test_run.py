"""`hybrid run` on a model whose answers are written down."""

from __future__ import annotations

import io
import os
import re
import tempfile
from pathlib import Path

import pytest

from hybrid.cli.main import main
from hybrid.cli.run import DEMO_PROMPT


def test_text_to_stdout_and_the_rest_to_stderr(fake_llm, capsys):
    assert main(["run", "-m", "fake.gguf", "A prompt"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello, wörld\n"
    placement, rates = captured.err.splitlines()
    assert placement.startswith("fake.gguf: all on cpu; ISA scalar, 1 threads, context 64, seed ")
    assert rates == "prompt 4 tokens, 2.00 tokens/s; generated 3 tokens, 4.00 tokens/s; finished: stop"
    assert fake_llm.calls[0][0] == "A prompt"
    assert fake_llm.closed


def test_text_is_shown_as_it_comes(fake_llm, monkeypatch):
    shown = []
    monkeypatch.setattr("hybrid.cli.run.write", shown.append)
    main(["run", "-m", "x", "p"])
    assert shown == ["Hello", ", ", "wörld", "\n"]


def test_the_demo_model_has_a_prompt_and_shows_it(fake_llm, capsys):
    assert main(["run"]) == 0
    assert fake_llm.calls[0][0] == DEMO_PROMPT
    assert capsys.readouterr().out == f"{DEMO_PROMPT}Hello, wörld\n"


def test_echo_shows_the_prompt(fake_llm, capsys):
    main(["run", "-m", "x", "--echo", "p: "])
    assert capsys.readouterr().out == "p: Hello, wörld\n"


def test_other_models_need_a_prompt(fake_llm, capsys):
    assert main(["run", "-m", "x"]) == 2
    assert "no prompt" in capsys.readouterr().err
    assert fake_llm.calls == []


def test_an_empty_prompt_is_refused(fake_llm, capsys):
    assert main(["run", ""]) == 2
    assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize(("data", "code"), [("é\n".encode(), 0), (b"", 2), (b"\xff", 2)])
def test_a_prompt_from_stdin(fake_llm, monkeypatch, data, code):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["run", "-"]) == code
    assert [call[0] for call in fake_llm.calls] == (["é\n"] if code == 0 else [])


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_piped_prompt_needs_no_dash(fake_llm, monkeypatch, capsys, tmp_path, kind):
    if kind == "pipe":
        end, other = os.pipe()
        os.write(other, "é piped\n".encode())
        os.close(other)
        stdin = os.fdopen(end)
    else:
        path = tmp_path / "prompt.txt"
        path.write_text("é piped\n", encoding="utf-8")
        stdin = path.open(encoding="utf-8")
    with stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["run"]) == 0
    captured = capsys.readouterr()
    assert fake_llm.calls[0][0] == "é piped\n"
    assert captured.err.startswith("reading the prompt from stdin\n")
    assert captured.out == "Hello, wörld\n"


def test_a_prompt_given_leaves_a_pipe_alone(fake_llm, monkeypatch):
    with tempfile.TemporaryFile("w+") as stdin:
        stdin.write("piped")
        stdin.seek(0)
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["run", "given"]) == 0
        assert stdin.read() == "piped"
    assert fake_llm.calls[0][0] == "given"


@pytest.mark.parametrize("model, code, prompts", [("demo", 0, [DEMO_PROMPT]), ("x", 2, [])])
def test_an_empty_pipe_is_no_prompt(fake_llm, monkeypatch, capsys, model, code, prompts):
    with tempfile.TemporaryFile("w+") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["run", "-m", model]) == code
    assert [call[0] for call in fake_llm.calls] == prompts


def test_dev_null_is_no_pipe(fake_llm, monkeypatch, capsys):
    with Path(os.devnull).open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["run"]) == 0
    assert "reading" not in capsys.readouterr().err
    assert fake_llm.calls[0][0] == DEMO_PROMPT


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_a_long_prompt_shows_its_progress_on_a_terminal(fake_llm, monkeypatch, terminal, patience):
    fake_llm.prompt_steps = [(512, 2000), (1024, 2000)]
    monkeypatch.setattr("hybrid.cli.progress.PATIENCE_S", patience)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    assert main(["run", "p"]) == 0
    shown = re.search(r"prompt: +26%.* 512/2.00k", stderr.getvalue())
    assert bool(shown) == (terminal and not patience), stderr.getvalue()


def test_flags_become_sampling_parameters(fake_llm):
    argv = ["--temp", "0.5", "--top-k", "7", "--top-p", "0.5", "--min-p", "0.1", "--seed", "9", "-n", "12"]
    argv += ["--stop", "a", "--stop", "b", "--ignore-eos"]
    main(["run", "-m", "x", "p", *argv, "--repeat-penalty", "1.5", "--presence-penalty", "-1"])
    params = fake_llm.calls[0][1]
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.5, 7, 0.5, 0.1)
    assert (params.seed, params.max_tokens, params.stop_strings) == (9, 12, ("a", "b"))
    assert (params.ignore_eos, params.repetition_penalty, params.presence_penalty) == (True, 1.5, -1)
    main(["run", "-m", "x", "p", "-n", "-1"])
    assert fake_llm.calls[1][1].max_tokens is None


def test_runs_without_a_seed_differ_and_say_theirs(fake_llm, capsys):
    for _ in range(2):
        main(["run", "-m", "x", "p"])
    seeds = [params.seed for _, params in fake_llm.calls]
    assert seeds[0] != seeds[1]
    assert f"seed {seeds[0]}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--temp", "nan"], "--temp:"),
        (["--temp", "-1"], "--temp:"),
        (["--top-p", "0"], "--top-p:"),
        (["--top-p", "1.5"], "--top-p:"),
        (["--min-p", "2"], "--min-p:"),
        (["--top-k", "-5"], "--top-k:"),
        (["--repeat-penalty", "0"], "--repeat-penalty:"),
        (["--stop", ""], "stop"),
        (["--seed", str(2**63)], "seed"),
        (["-n", "0"], "-n"),
    ],
)
def test_bad_sampling_values_are_usage_errors(fake_llm, capsys, argv, name):
    assert main(["run", "-m", "x", "p", *argv]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1
    assert fake_llm.options is None, "the model was loaded before the values were checked"


def test_words_without_quotes_are_explained(fake_llm, capsys):
    assert main(["run", "-m", "x", "hi", "there"]) == 2
    error = capsys.readouterr().err
    assert "unrecognized arguments: there" in error and "quotes" in error and error.count("\n") == 1


def test_addresses_are_no_files(capsys):
    assert main(["run", "-m", "https://example.com/x.gguf", "hi"]) == 2
    assert "https://example.com/x.gguf; download it first" in capsys.readouterr().err


def test_closed_stdout_is_one_line(fake_llm, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert main(["run", "-m", "x", "hi"]) == 1
    assert "no standard output" in capsys.readouterr().err


def test_ctrl_c_ends_the_text_cleanly(fake_llm, capsys):
    fake_llm.pieces = ["Hel", KeyboardInterrupt, "lo"]
    assert main(["run", "-m", "x", "p"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "Hel\n"
    assert "generated 1 token;" in captured.err
    assert fake_llm.streams[0].closed
    assert fake_llm.closed


def test_ctrl_c_before_the_first_token(fake_llm, capsys):
    fake_llm.pieces = [KeyboardInterrupt]
    assert main(["run", "-m", "x", "p"]) == 130
    assert "stopped before the first token" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_character(fake_llm, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["run", "-m", "x", "p"]) == 0
    assert raw.getvalue() == b"Hello, w?rld\n"


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\ufffd[2Jb\n\tc\n"), (False, "a\x1b[2Jb\n\tc\n")])
def test_a_terminal_gets_no_control_characters(fake_llm, monkeypatch, terminal, shown):
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding="utf-8")
    monkeypatch.setattr(stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stdout", stdout)
    fake_llm.pieces = ["a\x1b[2J", "b\n\tc"]
    assert main(["run", "-m", "x", "p"]) == 0
    assert raw.getvalue().decode() == shown


def test_one_token_has_no_rate(fake_llm, capsys):
    fake_llm.pieces = ["a"]
    main(["run", "-m", "x", "p"])
    assert "generated 1 token; finished" in capsys.readouterr().err
