"""Finding commands, exit codes, flags and their environment variables."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import pty
import re
import subprocess
import sys
import types

import pytest

from hybrid import env
from hybrid.cli import arguments
from hybrid.cli.main import COMMANDS, main
from hybrid.errors import CapacityError, ConfigError, ContextLengthError, GGUFError, RequestError
from hybrid.gguf import GGUFFile


def parser_of(command):
    module = importlib.import_module(COMMANDS[command])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments.add_general(parser)
    return parser


@pytest.fixture
def command(monkeypatch):
    """A command `try` that calls what the test puts into ``command.run``."""
    module = types.ModuleType("fake_command")
    module.HELP = "try"
    module.add_arguments = lambda parser: arguments.add_runtime(parser)
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(COMMANDS, "try", "fake_command")
    return module


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_the_contract(name):
    module = importlib.import_module(COMMANDS[name])
    assert module.HELP and "\n" not in module.HELP
    assert callable(module.run)
    assert parser_of(name).format_help()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_its_variable_in_the_table_and_in_its_help(name):
    for action in parser_of(name)._actions:
        if not action.option_strings or action.dest == "help":
            continue
        words = action.option_strings[-1][2:].upper().replace("-", "_")
        variable = re.search(r"\[(HYBRID_\w+)\]$", action.help).group(1)
        assert variable in env.VARIABLES
        assert variable in (f"HYBRID_{words}", f"HYBRID_{name.upper()}_{words}")


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_is_instant(argv):
    code = (
        "import sys; from hybrid.cli.main import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'tqdm', 'tokenizers', 'jinja2', 'gguf', 'fastapi', 'pydantic', 'h11'};"
        "heavy &= set(sys.modules);"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, *argv], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: hybrid" in done.stdout


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rnu"], "did you mean 'run'?"),
        (["nonsense"], "unknown command 'nonsense'"),
        ([], "usage"),
        (["--nonsense"], "unrecognized"),
        (["run", "--nonsense", "x"], "unrecognized"),
        (["run", "-n", "many", "x"], "expected an integer >= 1, or -1, found 'many'"),
        (["run", "-t", "0", "x"], "expected an integer >= 1, found '0'"),
    ],
)
def test_usage_errors_are_2(capsys, argv, message):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hybrid 0")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("isa: x"), 2),
        (RequestError("bad", field="top_p"), 2),
        (ContextLengthError(10, 5), 1),
        (CapacityError("no room"), 1),
        (GGUFError("truncated\nfile", file="a.gguf"), 1),
        (FileNotFoundError(2, "No such file or directory", "a.gguf"), 1),
        (MemoryError(), 1),
        (ZeroDivisionError("oops"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, command, error, code):
    def run(args):
        raise error

    command.run = run
    assert main(["try"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback(capsys, command):
    def run(args):
        raise ZeroDivisionError("oops")

    command.run = run
    assert main(["try", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_flag_wins_over_its_variable(monkeypatch, command):
    seen = []
    command.run = lambda args: seen.append((args.threads, args.kv_format, args.ctx_size)) or 0
    assert main(["try"]) == 0
    monkeypatch.setenv("HYBRID_THREADS", "3")
    monkeypatch.setenv("HYBRID_KV_FORMAT", "bf16")
    assert main(["try"]) == 0
    assert main(["try", "-t", "5", "-ctk", "f32", "-c", "0"]) == 0
    assert seen == [(None, None, None), (3, "bf16", None), (5, "f32", 0)]


def test_a_bad_variable_is_named(monkeypatch, capsys, command):
    command.run = lambda args: 0
    monkeypatch.setenv("HYBRID_THREADS", "many")
    assert main(["try"]) == 2
    assert "HYBRID_THREADS='many'" in capsys.readouterr().err
    assert main(["try", "--threads", "2"]) == 0


def test_a_misspelt_variable_is_pointed_out(monkeypatch, capsys, command):
    command.run = lambda args: 0
    monkeypatch.setenv("HYBRID_THREDS", "2")
    assert main(["try"]) == 0
    assert "HYBRID_THREDS means nothing here; did you mean HYBRID_THREADS?" in capsys.readouterr().err


def test_switches_have_variables(monkeypatch, command):
    seen = []
    command.add_arguments = lambda parser: arguments.flag(parser, "--ignore-eos")
    command.run = lambda args: seen.append(args.ignore_eos) or 0
    main(["try"])
    monkeypatch.setenv("HYBRID_IGNORE_EOS", "yes")
    main(["try"])
    monkeypatch.setenv("HYBRID_IGNORE_EOS", "0")
    main(["try"])
    main(["try", "--ignore-eos"])
    assert seen == [False, True, False, True]


def test_a_reader_that_leaves_is_no_traceback():
    code = (
        "import sys, types; from hybrid.cli import main as m;"
        "c = types.ModuleType('c'); c.HELP = ''; c.add_arguments = lambda p: None;"
        "c.run = lambda a: [print('x' * 1000) for _ in range(10000)] and 0;"
        "sys.modules['c'] = c; m.COMMANDS['c'] = 'c'; sys.exit(m.main(['c']))"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b""
        assert run.wait() == 1


def test_output_of_another_encoding_is_replaced_and_not_lost(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["plan", "demo"]) == 0
    text = raw.getvalue().decode("ascii")
    assert "| cpu " in text and "????" in text and "## Rules" in text


def test_a_bar_is_shown_on_a_terminal_without_a_size():
    ours, theirs = pty.openpty()  # it says 0 x 0
    program = (
        "from hybrid.cli.progress import byte_progress\n"
        "import time\n"
        "with byte_progress('loading') as show: time.sleep(0.2); show(1 << 20, 4 << 20)"
    )
    subprocess.run([sys.executable, "-P", "-c", program], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10000).decode()
    os.close(ours)
    assert "loading" in shown and "25%" in shown and "4.00M" in shown


def test_variables_of_a_command_do_not_reach_others(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRID_SYNTH_OUT", str(tmp_path / "x.gguf"))
    monkeypatch.setenv("HYBRID_SYNTH_EXPERTS", "Q8_0")
    assert main(["rules", "schema"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(["synth", "tiny"]) == 0
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert file.tensors["blk.1.ffn_gate_exps.weight"].type.name == "Q8_0"
