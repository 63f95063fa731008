from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import RequestError
from hybrid.tokenizer import Tokenizer

TRAINED = (
    *("default", "gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "deepseek-v3"),
    *("kimi-k2", "gpt-4o", "tekken", "glm4", "minimax-m2"),
)
TEXTS = (
    "The quick brown fox can't jump",
    "they'll've 1234567 def main(): return\n\n\t x  \r\n",
    "汉字和かな混じりCamelCaseWord 한국어 😀e\u0301\u0000\u001b",
    "  \n \n\n   a   ",
)
SPECIAL = {"<|im_start|>": 3, "<|im_end|>": 3, "<|im_end|>x": 3, "<unk>": 2, "<think>": 4, "  ": 4}
anything = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from("aeTh '\n\r\t19字かé😀\u0301\u200d\u00a0")
    )
)


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, trained_vocabulary):
    reference, metadata = trained_vocabulary(request.param)
    return reference, Tokenizer.from_gguf(metadata)


def test_ids_equal_those_of_the_tokenizer_that_was_trained(trained):
    reference, tokenizer = trained
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == reference.encode(text).ids
        assert len(ids) < len(text.encode()) or len(text) < 12


@settings(max_examples=60, deadline=None)
@given(text=anything)
def test_any_text_comes_back_and_equals_the_reference(trained, text):
    reference, tokenizer = trained
    ids = tokenizer.encode(text, add_special=False)
    assert ids == reference.encode(text).ids
    assert tokenizer.decode(ids) == text


def special(byte_level_metadata, **keys):
    return Tokenizer.from_gguf(byte_level_metadata("gpt-2", ["h i", "Ġ hi"], SPECIAL, **keys))


def test_control_tokens_need_parse_special(byte_level_metadata):
    tokenizer = special(byte_level_metadata)
    text = "hi<|im_end|>xhi<|im_end|><unk><think>hi"
    ids = {name: tokenizer.token_id(name) for name in ("hi", *SPECIAL)}
    plain = tokenizer.encode(text)
    assert not {ids["<|im_end|>"], ids["<|im_end|>x"], ids["<unk>"]} & set(plain)
    assert ids["<think>"] in plain
    assert tokenizer.decode(plain) == text
    parsed = tokenizer.encode(text, parse_special=True)
    expected = ["hi", "<|im_end|>x", "hi", "<|im_end|>", "<unk>", "<think>", "hi"]
    assert parsed == [ids[name] for name in expected]
    assert tokenizer.decode(parsed) == text
    assert tokenizer.decode(parsed, skip_special=True) == "hihi<think>hi"


def test_a_control_token_is_never_built_by_merges(byte_level_metadata, caplog):
    merges = ["< s", "<s >"]
    metadata = byte_level_metadata("llama-bpe", merges)
    control = metadata["tokenizer.ggml.tokens"].index("<s>")
    metadata["tokenizer.ggml.token_type"][control] = 3
    tokenizer = Tokenizer.from_gguf(metadata)
    assert control not in tokenizer.encode("<s> <s>")
    assert "'<s>'" in caplog.text
    assert tokenizer.encode("<s>", parse_special=True) == [control]


def test_bos_and_eos_are_added_where_the_file_or_the_kind_says(byte_level_metadata):
    bos, eos = 256, 257
    extra = {"<|bos|>": 3, "<|eos|>": 3}
    ids = {"bos_token_id": bos, "eos_token_id": eos}

    def encode(pre, **keys):
        return Tokenizer.from_gguf(byte_level_metadata(pre, None, extra, **ids, **keys)).encode("a")

    assert encode("deepseek-v3") == [ord("a")]
    assert encode("deepseek-v3", add_bos_token=True)[0] == bos
    assert encode("llama-bpe")[0] == bos and encode("tekken")[0] == bos
    assert bos not in encode("llama-bpe", add_bos_token=False)
    assert encode("deepseek-v3", add_eos_token=True)[-1] == eos
    assert Tokenizer.from_gguf(byte_level_metadata("llama-bpe", None, extra)).encode("a") == encode("qwen2")


def test_ignore_merges_takes_whole_words_first(byte_level_metadata):
    # "abc" is a token, but the merges reach only "a" + "bc".
    merges = ["b c", "a b", "ab c"]
    whole = Tokenizer.from_gguf(byte_level_metadata("llama-bpe", merges))
    merged = Tokenizer.from_gguf(byte_level_metadata("qwen2", merges))
    assert [whole.token_text(i) for i in whole.encode("abc")] == ["abc"]
    assert [merged.token_text(i) for i in merged.encode("abc")] == ["a", "bc"]


@pytest.mark.parametrize(
    ("extra", "keys", "stops"),
    [
        ({"<|eos|>": 3, "<|other|>": 3}, {"eos_token_id": 256}, "<|eos|>"),
        (
            {"<|eos|>": 3, "<|eot_id|>": 3, "<|eom_id|>": 3},
            {"eos_token_id": 256},
            "<|eos|> <|eot_id|> <|eom_id|>",
        ),
        ({"<|im_end|>": 1, "<|endoftext|>": 4}, {}, "<|im_end|> <|endoftext|>"),
        ({"stop": 3, "[EOS]": 3, "eom": 3}, {"eot_token_id": 256, "eom_token_id": 258}, "stop [EOS] eom"),
        ({"<|end|>": 3, "<|return|>": 3, "<|call|>": 3}, {}, "<|return|> <|call|>"),
        ({"<｜end▁of▁sentence｜>": 3}, {}, "<｜end▁of▁sentence｜>"),
    ],
)
def test_stop_ids(byte_level_metadata, extra, keys, stops):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("qwen2", None, extra, **keys))
    assert {tokenizer.token_text(index) for index in tokenizer.stop_ids} == set(stops.split())
    assert all(tokenizer.is_control(index) for index in tokenizer.stop_ids)


def test_a_token_merges_build_is_text_even_when_it_looks_like_an_end(byte_level_metadata):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("qwen2", ["< /", "</ s", "</s >"]))
    assert tokenizer.stop_ids == frozenset()
    assert not tokenizer.is_control(tokenizer.token_id("</s>"))


def test_a_byte_without_a_token_is_an_error_and_not_dropped(byte_level_metadata):
    metadata = byte_level_metadata("gpt-2")
    metadata["tokenizer.ggml.tokens"][0xC3] = "something else"
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.decode(tokenizer.encode("plain")) == "plain"
    with pytest.raises(RequestError, match="0xC3"):
        tokenizer.encode("é")


@pytest.mark.parametrize("text", ["a\ud800b", 7, b"bytes", None])
def test_bad_text_is_refused(byte_level_metadata, text):
    with pytest.raises(RequestError):
        Tokenizer.from_gguf(byte_level_metadata("gpt-2")).encode(text)


@pytest.mark.parametrize("index", [-1, 262, 1 << 40])
def test_an_id_outside_the_vocabulary_is_refused(byte_level_metadata, index):
    tokenizer = special(byte_level_metadata)
    for use in (tokenizer.token_bytes, tokenizer.token_text, tokenizer.detokenizer().push):
        with pytest.raises(RequestError, match="out of range"):
            use(index + 8 if index == 262 else index)


def test_long_runs_take_linear_time(byte_level_metadata):
    tokenizer = special(byte_level_metadata)
    for run in ("a", " ", "\n", "<", "<|im_", "9", "字"):
        text = run * (200_000 // len(run))
        assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text
