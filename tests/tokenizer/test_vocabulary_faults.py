"""Each fault of a vocabulary is its own error, naming the key and what was found."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hybrid.errors import TokenizerError
from hybrid.tokenizer import Tokenizer

P = "tokenizer.ggml."
MERGES = ["a b", "ab c"]
FAULTS = [
    ({"model": None}, "model: missing"),
    ({"model": 3}, "model: expected a string, found int"),
    ({"model": "bert"}, "unknown tokenizer model 'bert'.*gpt2, llama"),
    ({"pre": "nope"}, "unknown pre-tokenizer 'nope'"),
    ({"pre": ["qwen2"]}, "pre: expected a string, found list"),
    ({"tokens": None}, "tokens: missing or empty"),
    ({"tokens": []}, "tokens: missing or empty"),
    ({"tokens": "abc"}, "tokens: expected an array of strings"),
    ({"tokens": ["a", b"b"]}, "tokens: expected strings, found bytes.* at index 1"),
    ({"tokens": ["a", "b\udc80"]}, "index 1 .*lone surrogate"),
    ({"tokens": ["a", "b", "a"]}, "'a' appears twice, as id 0 and id 2"),
    ({"token_type": [1, 1]}, r"token_type: expected 258 entries, .* found 2"),
    ({"token_type": [9] * 258}, "token_type: expected 0 to 6, found 9 at index 0"),
    ({"token_type": [-1] * 258}, "token_type: expected 0 to 6, found -1"),
    ({"token_type": [1.5] * 258}, "token_type: expected an array of int64, found float64"),
    ({"token_type": [6] * 258}, r"token 0 is of type BYTE: expected a text from <0x00>"),
    ({"token_type": "1" * 258}, "token_type: expected an array of numbers"),
    ({"scores": np.zeros(4, np.float32)}, "scores: expected 258 entries, .* found 4"),
    ({"merges": None}, "merges: missing"),
    ({"merges": [1]}, "merges: expected strings, found int"),
    ({"merges": ["a b", "a zz"]}, r"merge 1 \('a zz'\) names 'zz'"),
    ({"merges": ["a b", "b c"]}, r"merge 1 \('b c'\) names 'bc'"),
    ({"merges": ["ab"]}, "merge 0 .* is malformed"),
    ({"merges": ["a b c"]}, "merge 0 .* is malformed"),
    ({"merges": [" a"]}, "merge 0 .* is malformed"),
    ({"bos_token_id": 258}, "bos_token_id: token id 258 is out of range: the vocabulary has 258"),
    ({"eos_token_id": -1}, "eos_token_id: token id -1 is out of range"),
    ({"eot_token_id": 1 << 31}, "eot_token_id: token id 2147483648 is out of range"),
    ({"eos_token_id": "2"}, "eos_token_id: expected a token id, found str"),
    ({"eos_token_id": True}, "eos_token_id: expected a token id, found bool"),
    ({"add_bos_token": 1}, "add_bos_token: expected a boolean, found int"),
    ({"add_bos_token": True}, "add_bos_token: true, but tokenizer.ggml.bos_token_id is missing"),
    ({"add_eos_token": True}, "add_eos_token: true, but tokenizer.ggml.eos_token_id is missing"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_fault(byte_level_metadata, change, message):
    metadata = byte_level_metadata("qwen2", MERGES)
    Tokenizer.from_gguf(metadata)
    for key, value in change.items():
        metadata[P + key] = value
        if value is None:
            del metadata[P + key]
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_gguf(metadata)


def test_rows_of_the_embedding_must_match(byte_level_metadata):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("qwen2"))
    tokenizer.check_embedding(256)
    with pytest.raises(TokenizerError, match=r"256 tokens, but .* has 320 rows"):
        tokenizer.check_embedding(320)


def test_a_missing_pre_is_the_default_and_says_so(byte_level_metadata, caplog):
    metadata = byte_level_metadata("default", MERGES)
    named = Tokenizer.from_gguf(metadata)
    del metadata[P + "pre"]
    unnamed = Tokenizer.from_gguf(metadata)
    assert "tokenizer.ggml.pre is missing" in caplog.text
    assert unnamed.encode("abc $5 1234") == named.encode("abc $5 1234")


def test_an_open_file_serves_as_well_as_its_metadata(byte_level_metadata):
    class File:
        metadata = byte_level_metadata("qwen2", MERGES)

    assert Tokenizer.from_gguf(File()).encode("abc") == [257]


def test_empty_tokens_are_allowed(byte_level_metadata):
    metadata = byte_level_metadata("qwen2")
    metadata[P + "tokens"] += ["", ""]
    metadata[P + "token_type"] += [5, 3]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.token_bytes(256) == tokenizer.token_bytes(257) == b""
    assert tokenizer.decode(tokenizer.encode("x", parse_special=True)) == "x"


def test_a_vocabulary_of_130k_loads_in_under_a_second_of_cpu(byte_level_metadata):
    first = [chr(code) for code in range(0x21, 0x7F)] + [chr(code) for code in range(0xA1, 0xAD)]
    pairs = [f"{a} {b}" for a in first for b in first]
    merges = pairs + [f"{pair.replace(' ', '')} {c}" for pair in pairs for c in first[:12]]
    merges = merges[:130_000]
    metadata = byte_level_metadata("deepseek-v3", merges)
    start = time.process_time()
    tokenizer = Tokenizer.from_gguf(metadata)
    assert time.process_time() - start < 1.5  # 0.3 s on an idle core
    assert tokenizer.vocab_size > 130_000
    assert [tokenizer.token_text(index) for index in tokenizer.encode("xyz")] == ["xy", "z"]
