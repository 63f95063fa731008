"""Every example runs, on the demo model as its reader would run it, and stays short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from hybrid.cli.main import main
from hybrid.config import model_path

EXAMPLES = Path(__file__).parents[1] / "examples"
OF_THE_API = ("generate", "stream", "chat", "logprobs", "together", "structured")
demo_model = pytest.mark.skipif(not model_path("demo").exists(), reason="this tree has no demo model file")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    assert main(["synth", "tiny", "-o", str(path)]) == 0
    return path


def run(name, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    captured = capsys.readouterr()
    assert captured.out.strip()
    return captured.out


@demo_model
@pytest.mark.parametrize("name", OF_THE_API)
def test_on_the_demo_model(name, monkeypatch, capsys):
    run(name, monkeypatch, capsys)


@pytest.mark.parametrize("name", ["generate", "stream", "logprobs", "together"])
def test_on_a_file(name, tiny, monkeypatch, capsys):
    run(name, monkeypatch, capsys, tiny)


@pytest.mark.parametrize("name", OF_THE_API)
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40
