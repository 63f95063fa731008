from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(byte_level_metadata):
    extra = {"<|end|>": 3, "<think>": 4, "unused": 5}
    return Tokenizer.from_gguf(byte_level_metadata("deepseek-v3", ["h i"], extra))


def pushed(tokenizer, ids, **options):
    stream = tokenizer.detokenizer(**options)
    return [stream.push(index) for index in ids], stream.flush()


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_no_character_is_shown_in_parts(tokenizer, text):
    ids = tokenizer.encode(text)
    parts, rest = pushed(tokenizer, ids)
    assert rest == ""
    assert "".join(parts) == text
    assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 259)))
@pytest.mark.parametrize("skip", [False, True])
def test_pieces_join_to_decode_for_any_ids(tokenizer, ids, skip):
    parts, rest = pushed(tokenizer, ids, skip_special=skip)
    assert "".join(parts) + rest == tokenizer.decode(ids, skip_special=skip)


def test_an_emoji_appears_with_its_last_byte(tokenizer):
    parts, rest = pushed(tokenizer, "😀".encode())
    assert (parts, rest) == (["", "", "", "😀"], "")


def test_dangling_bytes_come_out_of_flush(tokenizer):
    parts, rest = pushed(tokenizer, [ord("a"), 0xF0, 0x9F])
    assert (parts, rest) == (["a", "", ""], "\ufffd")


def test_control_tokens_show_unless_skipped(tokenizer):
    ids = [256, tokenizer.token_id("<|end|>"), tokenizer.token_id("<think>"), tokenizer.token_id("unused")]
    assert tokenizer.decode(ids) == "hi<|end|><think>"
    assert tokenizer.decode(ids, skip_special=True) == "hi<think>"
