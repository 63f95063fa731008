"""`hybrid profile`."""

from __future__ import annotations

import json

import pytest

from hybrid.cli.main import main
from hybrid.placement.usage import read_profile
from hybrid.synth import resolve_shape, synthesise


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "tiny.gguf"
    synthesise(path, resolve_shape("tiny"))
    return path


def test_the_demo_has_a_text(tmp_path, capsys):
    out = tmp_path / "usage.json"
    assert main(["profile", "-o", str(out), "-n", "8", "-c", "64", "--ignore-eos"]) == 0
    profile = read_profile(out)
    assert profile.usage.tokens["decode"] == 7 and profile.usage.tokens["prompt"] > 10
    assert len(profile.usage.layers) == 3 and profile.model.file == "demo.gguf"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: 3 layers of 16 experts\n") and "| decode |      7 |" in printed


def test_a_text_is_cut_into_prompts(tiny, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "usage.json"
    text.write_text("some words of a language nobody speaks " * 40)
    argv = ["profile", str(tiny), "--text", str(text), "-o", str(out), "-c", "40", "-n", "8", "--chunks", "3"]
    assert main([*argv, "--ignore-eos", "-s", "1"]) == 0
    tokens = json.loads(out.read_text())["tokens"]
    assert tokens == {"prompt": 3 * 32, "decode": 3 * 7}
    first = out.read_bytes()
    assert main([*argv, "--ignore-eos", "-s", "1"]) == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    "argv, message",
    [
        (["profile"], "profile needs the file to write: -o FILE"),
        (["profile", "TINY", "-o", "OUT"], "profile needs a text like those"),
        (["profile", "-o", "OUT", "-c", "32", "-n", "32"], "-n: expected fewer than the 32 tokens"),
        (["profile", "-o", "OUT", "--text", "absent"], "absent: cannot read the text"),
        (["profile", "-o", "absent/OUT", "-n", "1"], "No such file or directory"),
    ],
)
def test_what_is_wrong(tiny, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny) if word == "TINY" else word for word in argv]) in (1, 2)
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
