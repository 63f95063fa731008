"""The guide of rules: every file in it is written, every command run, every message compared."""

from __future__ import annotations

import re
import shlex
from importlib import resources

import pytest

from hybrid.cli.main import main
from hybrid.placement.roles import ROLES
from hybrid.placement.rules.parser import PLACE_KEYS, SELECT_KEYS, TOP_KEYS

GUIDE = (resources.files("hybrid.rules") / "README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(\w+\.yaml)`:\n\n```yaml\n(.*?)```", GUIDE, re.DOTALL))
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()
]
SESSIONS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", GUIDE, re.DOTALL)


def test_nothing_is_left_out():
    assert GUIDE.count("```yaml") == len(FILES) == 8
    assert len(COMMANDS) > 20 and len(SESSIONS) == GUIDE.count("```console") == 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_works(folder, capsys):
    for command in COMMANDS:
        program, *argv = shlex.split(command)
        assert program == "hybrid"
        assert main(argv) == 0, (command, capsys.readouterr().err)
        capsys.readouterr()
    used = {name for name in FILES if any(name in command for command in COMMANDS)}
    assert used | {"wrong.yaml"} == set(FILES)


def test_messages_are_as_printed(folder, capsys):
    assert main(shlex.split(COMMANDS[0])[1:]) == 0
    capsys.readouterr()
    for command, expected in SESSIONS:
        assert main(shlex.split(command)[1:]) == 1
        found = capsys.readouterr()
        assert found.out + found.err == expected


def test_every_word_of_the_language_is_explained():
    for word in (*TOP_KEYS, *SELECT_KEYS, *PLACE_KEYS, *ROLES):
        assert re.search(rf"`{word}`|\b{word}:", GUIDE), word
