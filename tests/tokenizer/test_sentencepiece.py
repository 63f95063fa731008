from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import TokenizerError
from hybrid.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def vocabulary(pieces, *, seed=0, **keys):
    """``<unk> <s> </s>``, the bytes, then pieces with distinct random scores."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    scores = np.zeros(len(tokens), dtype=np.float32)
    order = list(range(len(pieces)))
    random.Random(seed).shuffle(order)
    scores[259:] = [-1.0 - rank for rank in order]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def reference(metadata, text):
    """SentencePiece's BPE, plainly: while any two neighbours make a piece, merge those of the best score."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    ids = {text: index for index, text in enumerate(tokens) if kinds[index] == 1}
    symbols = list(text.replace(" ", "▁"))
    while True:
        best = None
        for place in range(len(symbols) - 1):
            index = ids.get(symbols[place] + symbols[place + 1])
            if index is not None and (best is None or scores[index] > scores[best[0]]):
                best = (index, place)
        if best is None:
            break
        place = best[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    output = []
    for symbol in symbols:
        output += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return output


def pieces_of(text, longest=5):
    return sorted(
        {text[a:b] for a in range(len(text)) for b in range(a + 1, a + 1 + longest) if b <= len(text)}
    )


SENTENCE = "▁the▁cat▁sat▁on▁that▁hat▁and▁then▁the▁rat▁ran"
WORDS = vocabulary(pieces_of(SENTENCE), seed=3)


@settings(max_examples=300, deadline=None)
@given(text=st.text("thecasonrd é字"))
def test_ids_equal_plain_sentencepiece(text):
    tokenizer = Tokenizer.from_gguf(WORDS | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode(text, add_special=False) == reference(WORDS, text)


@pytest.mark.parametrize("seed", range(40))
def test_ids_equal_plain_sentencepiece_on_random_vocabularies(seed):
    rng = random.Random(seed)
    pieces = list("abc▁")
    while len(pieces) < 24:
        piece = rng.choice(pieces) + rng.choice(pieces)
        if piece not in pieces and len(piece) < 7:
            pieces.append(piece)
    metadata = vocabulary(pieces, seed=seed, add_space_prefix=False)
    # Longer pieces score lower, as training makes them: what is made of parts comes after its parts.
    metadata["tokenizer.ggml.scores"][259:] = -np.arange(len(pieces), dtype=np.float32)
    tokenizer = Tokenizer.from_gguf(metadata)
    for _ in range(60):
        text = "".join(rng.choice("abc ") for _ in range(rng.randrange(40)))
        assert tokenizer.encode(text, add_special=False) == reference(metadata, text), text


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(text):
    text = "".join(char for char in text if char != "▁" and not "\ud800" <= char <= "\udfff")
    tokenizer = Tokenizer.from_gguf(WORDS)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text


def test_a_space_goes_before_text_and_bos_before_that():
    tokenizer = Tokenizer.from_gguf(WORDS)
    ids = tokenizer.encode("the cat")
    assert ids[0] == tokenizer.bos_id == 1
    assert tokenizer.token_text(ids[1]).startswith("▁")
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", add_special=False) == []
    assert tokenizer.decode(ids[1:]) == "the cat"
    without = Tokenizer.from_gguf(WORDS | {"tokenizer.ggml.add_space_prefix": False})
    assert not without.token_text(without.encode("the")[1]).startswith("▁")


def test_text_after_a_special_token_begins_anew():
    tokenizer = Tokenizer.from_gguf(WORDS)
    text = "the</s>cat<s> rat"
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    assert tokenizer.decode(ids) == text
    assert ids.count(2) == 1 and ids.count(1) == 1


def test_control_and_byte_tokens_are_not_built_from_text():
    pieces = ["▁", "<", "/", "s", ">", "</", "s>", "<s", "0", "x", "4", "1", "<0", "x4", "<0x4", "1>", "<0x"]
    tokenizer = Tokenizer.from_gguf(vocabulary(pieces, add_bos_token=False))
    for text in ("</s>", "<s>", "<0x41>", "<unk>"):
        ids = tokenizer.encode(text)
        assert not {0, 1, 2, 3 + 0x41} & set(ids)
        assert tokenizer.decode(ids) == text


def test_the_detokenizer_keeps_a_space_where_a_prompt_goes_on():
    tokenizer = Tokenizer.from_gguf(WORDS)
    whole = tokenizer.encode("the cat sat on")
    for cut in range(1, len(whole)):
        start = tokenizer.detokenizer(prompt_ids=whole[:cut])
        text = "".join(map(start.push, whole[cut:])) + start.flush()
        assert tokenizer.decode(whole[:cut], skip_special=True) + text == "the cat sat on"


def test_bytes_or_an_unknown_token_are_needed():
    metadata = vocabulary(["a"])
    metadata["tokenizer.ggml.token_type"] = [3, 3, 3] + [1] * 257
    metadata["tokenizer.ggml.tokens"][0] = ""
    with pytest.raises(TokenizerError, match="BYTE"):
        Tokenizer.from_gguf(metadata)


def test_scores_are_needed_and_finite():
    metadata = vocabulary(["a"])
    del metadata["tokenizer.ggml.scores"]
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.scores: missing"):
        Tokenizer.from_gguf(metadata)
    metadata = vocabulary(["a"])
    metadata["tokenizer.ggml.scores"][7] = np.nan
    with pytest.raises(TokenizerError, match="index 7 is nan"):
        Tokenizer.from_gguf(metadata)
