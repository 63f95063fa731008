"""The command line on a real, tiny model file with random weights."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import pytest

from hybrid.cli.main import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    assert main(["synth", "tiny", "-o", str(path)]) == 0
    return path


@pytest.fixture
def run(tiny, capfd):
    """`hybrid run` in this process: exit code, stdout, stderr. A later ``-m`` replaces the first."""

    def call(*argv):
        code = main(["run", "-m", str(tiny), *map(str, argv)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_prompt_is_continued_and_the_placement_told(run):
    code, out, err = run("Once upon a time", "-n", 8, "--seed", 1, "-t", 1)
    assert code == 0
    assert out.strip()
    placement, rates = err.splitlines()
    assert placement.startswith("tiny.gguf: all ")
    assert "ISA " in placement and "1 thread," in placement and placement.endswith("seed 1")
    assert "generated 8 tokens" in rates and rates.count("tokens/s") == 2


@pytest.mark.parametrize("argv", [["-t", 1], ["-t", 2], ["-c", 64], ["-ctk", "f16"]])
def test_threads_and_context_do_not_change_the_text(run, argv):
    common = ["One two three", "-n", 16, "--seed", 7, "--ignore-eos"]
    assert run(*common, *argv)[1] == run(*common)[1]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["x", "-m", "missing.gguf"], 1, "missing.gguf"),
        (["x", "-m", "."], 1, "."),
        (["x", "-m", __file__], 1, "test_end_to_end.py"),
        (["x", "--isa", "avx1024"], 2, "avx1024"),
        (["x", "-c", 10**9], 2, "max_model_len"),
        (["x", "--rules", "missing.yaml"], 1, "missing.yaml"),
        (["one two three four five six seven", "-c", 8], 1, "context of 8"),
        (["\udcff"], 2, "surrogate"),
    ],
)
def test_failures_are_one_line(run, argv, code, message):
    found, out, err = run(*argv)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1 and err.startswith("hybrid: ")
    assert message in err


def test_a_bad_isa_variable_is_named(run, monkeypatch):
    monkeypatch.setenv("HYBRID_ISA", "avx1024")
    code, _, err = run("x")
    assert code == 2
    assert "avx1024" in err


def test_chat_answers_lines_of_a_pipe(tiny, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/exit\nthree\n"))
    assert main(["chat", "-m", str(tiny), "-n", "4", "--ignore-eos", "--system", "Be brief."]) == 0
    captured = capfd.readouterr()
    first, second = (line for line in captured.err.splitlines() if line.startswith("prompt "))
    assert "generated 4 tokens" in first and "generated 4 tokens" in second
    assert int(second.split()[1]) > int(first.split()[1]) + 4, "the first answer is not in the second prompt"


@pytest.mark.timeout(120)
def test_ctrl_c_stops_the_text(tiny):
    code = "import sys; from hybrid.cli.main import main; sys.exit(main(sys.argv[1:]))"
    argv = ["run", "-m", str(tiny), "x", "-n", "-1", "--ignore-eos"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"tokens/s" in err
    assert out.endswith(b"\n")
