"""`hybrid chat` on a model whose answers are written down."""

from __future__ import annotations

import io

import pytest

from hybrid.cli.main import main


@pytest.fixture
def talk(fake_llm, monkeypatch, capsys):
    """Run chat with ``text`` on stdin; returns exit code, stdout, stderr."""

    def run(text, *argv):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = main(["chat", "-m", "x", *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def user(text):
    return {"role": "user", "content": text}


ANSWER = {"role": "assistant", "content": "Hello, wörld"}


def test_the_history_is_kept(talk, fake_llm):
    code, out, _ = talk("one\ntwo\n")
    assert (code, out) == (0, "Hello, wörld\nHello, wörld\n")
    assert fake_llm.calls[0][0] == [user("one")]
    assert fake_llm.calls[1][0] == [user("one"), ANSWER, user("two")]
    assert fake_llm.closed


def test_a_system_message_comes_first_and_survives_clear(talk, fake_llm):
    system = {"role": "system", "content": "Be brief."}
    talk("one\n/clear\ntwo\n", "--system", "Be brief.")
    assert [call[0] for call in fake_llm.calls] == [[system, user("one")], [system, user("two")]]


@pytest.mark.parametrize("word", ["/exit", "/quit"])
def test_exit_leaves(talk, fake_llm, word):
    assert talk(f"one\n{word}\ntwo\n")[0] == 0
    assert len(fake_llm.calls) == 1


def test_empty_lines_and_unknown_commands_ask_nothing(talk, fake_llm):
    code, out, err = talk("\n  \n/nonsense now\n")
    assert (code, out) == (0, "")
    assert "unknown command '/nonsense'" in err
    assert fake_llm.calls == []


def test_no_input_is_no_error(talk):
    assert talk("")[:2] == (0, "")


def test_a_message_that_does_not_fit_is_dropped(talk, fake_llm):
    code, _, err = talk("one\n" + "x" * 50 + "\ntwo\n")
    assert code == 1
    assert "41 tokens" in err and "/clear" in err
    assert fake_llm.calls[1][0] == [user("one"), ANSWER, user("two")]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(talk, fake_llm):
    fake_llm.pieces = ["Hel", KeyboardInterrupt, "lo"]
    code, out, _ = talk("one\ntwo\n")
    assert (code, out) == (0, "Hel\nHel\n")
    assert fake_llm.calls[1][0] == [user("one"), {"role": "assistant", "content": "Hel"}, user("two")]
    assert all(stream.closed for stream in fake_llm.streams)


def test_a_model_without_a_template_says_why(talk, fake_llm, monkeypatch):
    monkeypatch.setattr(fake_llm.chat_template, "problem", "the file has none")
    code, out, err = talk("one\n")
    assert (code, out) == (1, "")
    assert err == "hybrid: no chat with this model: the file has none\n"
