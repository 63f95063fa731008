"""Stop strings: the same text whatever pieces it comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.engine.detokenize import StopMatcher, TextStream


def run(pieces, stops, *, include=False):
    matcher = StopMatcher(stops, include=include)
    released = [matcher.push(piece) for piece in pieces]
    return released, matcher.flush(), matcher.matched


def plain(text, stops):
    """The stop string that is complete first in the whole text; among equals the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, length, stop = min(ends)
    return text[: end + length], stop


def test_text_that_may_begin_a_stop_string_is_held_back():
    assert run(["a", "b", "X", "c"], ["bcd"]) == (["a", "", "bX", "c"], "", None)
    assert run(["ab", "c"], ["bcd"]) == (["a", ""], "bc", None)
    released, rest, matched = run(["one E", "N", "D two"], ["END"])
    assert (released, rest, matched) == (["one ", "", ""], "", "END")


def test_the_stop_string_is_kept_when_asked_for():
    released, _, matched = run(["one E", "ND two"], ["END"], include=True)
    assert "".join(released) == "one END"
    assert matched == "END"


def test_nothing_comes_after_a_match():
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == "a"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abcd", ["cd", "b"], ("a", "b")),
        ("xabc", ["abc", "bc"], ("x", "abc")),
        ("aaab", ["aab"], ("a", "aab")),
        ("ababac", ["abac"], ("ab", "abac")),
        ("none", ["x"], ("none", None)),
        ("none", [], ("none", None)),
    ],
)
def test_which_stop_string_ends_the_text(text, stops, expected):
    for size in (1, 2, 3, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        released, rest, matched = run(pieces, stops)
        assert ("".join(released) + rest, matched) == expected


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
def test_pieces_do_not_matter(pieces, stops):
    released, rest, matched = run(pieces, stops)
    assert ("".join(released) + rest, matched) == plain("".join(pieces), stops)
    held = "".join(pieces)[len("".join(released)) :]
    if matched is None and held:
        assert any(stop.startswith(held) for stop in stops)


class ByteDetokenizer:
    """Token ids are bytes of UTF-8."""

    def __init__(self):
        self.pending = b""

    def push(self, token_id):
        self.pending += bytes([token_id])
        try:
            text = self.pending.decode()
        except UnicodeDecodeError:
            return ""
        self.pending = b""
        return text

    def flush(self):
        text, self.pending = self.pending.decode(errors="replace"), b""
        return text


def test_characters_are_never_split_and_the_rest_is_flushed():
    stream = TextStream(ByteDetokenizer(), ["€!"])
    pieces = [stream.push(token_id) for token_id in "aé€".encode()]
    assert pieces == ["a", "", "é", "", "", ""]
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "€\ufffd"


def test_the_first_min_tokens_are_not_searched():
    stream = TextStream(ByteDetokenizer(), ["a"], min_tokens=2)
    assert [stream.push(token_id) for token_id in b"aaba"] == ["a", "a", "b", ""]
    assert stream.stopped_by == "a"
