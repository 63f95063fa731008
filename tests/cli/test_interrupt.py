"""Ctrl-C while a command is starting: no traceback, whichever import it falls into."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# Runs `python -m hybrid` and sends itself Ctrl-C when a module is asked for.
SCRIPT = """
import os, runpy, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, {handler})
sys.meta_path.insert(0, Finder)
sys.argv[1:] = {argv!r}
runpy.run_module("hybrid", run_name="__main__", alter_sys=True)
"""


def start(module: str, *argv: str, handler: str = "signal.default_int_handler") -> tuple[int, str, str]:
    code = SCRIPT.format(module=module, argv=list(argv), handler=handler)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "module", ["hybrid.cli", "hybrid.cli.main", "argparse", "hybrid.env", "hybrid.errors"]
)
def test_before_the_command_line_is_read(module: str) -> None:
    assert start(module, "run", "x") == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("hybrid.cli.run", ["run", "x"]),
        ("hybrid.config", ["run", "x"]),
        ("hybrid.sampling_params", ["run", "x"]),
        ("numpy", ["run", "x"]),
        ("numpy.linalg", ["inspect", "demo"]),
        ("yaml", ["plan", "demo", "-o", "yaml"]),
        ("hybrid.llm", ["run", "x"]),
        ("torch", ["run", "x"]),
        ("torch._C", ["run", "x"]),
        ("torch.nn", ["bench"]),
        ("torch._tensor", ["perplexity", "x"]),
        ("hybrid.kernels.cpu", ["chat"]),
        ("hybrid.doctor", ["doctor"]),
        ("hybrid.cli.synth", ["synth", "--help"]),
    ],
)
def test_while_a_command_is_imported(module: str, argv: list[str]) -> None:
    code, out, err = start(module, *argv)
    assert (code, out, err) == (130, "", "interrupted\n")


def test_where_it_is_ignored_it_stays_so() -> None:
    """As under nohup, or in the background of a script."""
    code, out, _ = start("hybrid.cli.run", "--version", handler="signal.SIG_IGN")
    assert (code, out[:8]) == (0, "hybrid 0")
    code, out, _ = start("hybrid.cli.run", "run", "-n", "1", "Once", handler="signal.SIG_IGN")
    assert code == 0


def test_python_m_hybrid() -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "hybrid", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("hybrid ")
