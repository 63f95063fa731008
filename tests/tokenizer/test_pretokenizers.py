"""Where each kind cuts, written out from what its expressions mean."""

from __future__ import annotations

import pytest

from hybrid.errors import TokenizerError
from hybrid.tokenizer import Tokenizer
from hybrid.tokenizer.pretokenizers import PRE_TOKENIZERS

CASES = [
    ("kimi-k2", "汉字かなHelloWorld's 1234", ["汉字", "かなHello", "World's", " ", "123", "4"]),
    ("kimi-k2", "HTTPServer你好world 中", ["HTTPServer", "你好", "world", " ", "中"]),
    ("kimi-k2", "x!!/\n y", ["x", "!!/\n", " y"]),
    ("gpt-4o", "HelloWorld's HTTPServer", ["Hello", "World's", " HTTPServer"]),
    ("gpt-4o", "x!!/\n y", ["x", "!!/\n", " y"]),
    ("gpt-4o", "ΩμÀÉx", ["Ωμ", "ÀÉx"]),
    ("tekken", "HelloWorld's 123", ["Hello", "World", "'s", " ", "1", "2", "3"]),
    ("llama-bpe", "I'LL pay 1234567€", ["I", "'LL", " pay", " ", "123", "456", "7", "€"]),
    ("llama-bpe", "a\n\n  b!!\nc   ", ["a", "\n\n", " ", " b", "!!\n", "c", "   "]),
    ("llama-bpe", "_stop\tcode 汉字かな", ["_stop", "\tcode", " 汉字かな"]),
    ("qwen2", "n 123 it'S", ["n", " ", "1", "2", "3", " it", "'S"]),
    ("qwen2", "e\u0301a", ["e", "\u0301a"]),
    ("qwen35", "e\u0301a", ["e\u0301a"]),
    ("gpt-2", "DON'T don't 12345\n\nx", ["DON", "'", "T", " don", "'t", " 12345", "\n", "\n", "x"]),
    ("gpt-2", "  a ??", [" ", " a", " ??"]),
    ("starcoder", "v12 can't", ["v", "1", "2", " can", "'t"]),
    ("falcon", "a`b 12345,x", ["a", "`", "b", " ", "123", "45", ",", "x"]),
    ("default", "a$1234567 x", ["a", "$", "123", "456", "7", " x"]),
    (
        "deepseek-llm",
        "Hello world\n\n12345 汉字a",
        ["Hello", " world", "\n", "\n", "12345", " ", "汉字", "a"],
    ),
    ("deepseek-llm", "naïve\u03a9 !x", ["na", "ï", "ve", "\u03a9", " !", "x"]),
    ("deepseek-coder", "x = 123 汉字", ["x", " = ", "1", "2", "3", " ", "汉字"]),
    ("deepseek-v3", "abc 1234567汉字かなカabc", ["abc", " ", "123", "456", "7", "汉字かなカ", "abc"]),
    ("deepseek-v3", "(bar) foo's !\n\nx", ["(bar", ")", " foo", "'s", " !\n\n", "x"]),
    ("deepseek-v3", "  b", [" ", " b"]),
    ("glm4", "it's 1234", ["it", "'s", " ", "123", "4"]),
    ("bailingmoe", "it'S 12\n\nx", ["it", "'S", " ", "1", "2", "\n\n", "x"]),
    ("seed-coder", "a!!\nb", ["a", "!!", "\n", "b"]),
    ("tiny_aya", "n 1234567x", ["n", " ", "123", "456", "7", "x"]),
    ("viking", "Hello world. 12", ["Hello", " world", ".", " ", "1", "2"]),
    ("exaone-moe", "a b!\nc", ["a b", "!\n", "c"]),
    ("minicpm5", "ab 1234's", ["ab", " ", "123", "4", "'s"]),
]


@pytest.mark.parametrize(("pre", "text", "pieces"), CASES)
def test_text_is_cut_where_the_expressions_say(pre, text, pieces, byte_level_metadata):
    assert _cut(byte_level_metadata(pre), text) == pieces


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_kind_compiles_and_loses_nothing(pre, byte_level_metadata):
    text = "It's 12345 naïve\u0301 汉字 かな\r\n\n\tx = (a+b)...  HTTPServer `q` 😀 ١٢٣\u00a0end  "
    assert "".join(_cut(byte_level_metadata(pre), text)) == text


def test_unknown_name_is_refused_with_the_known_ones(byte_level_metadata):
    with pytest.raises(TokenizerError, match=r"'quux'.*deepseek-v3.*qwen2"):
        Tokenizer.from_gguf(byte_level_metadata("quux"))


def _cut(metadata, text):
    cutter = Tokenizer.from_gguf(metadata)._engine._engine.pre_tokenizer
    return [text[start:end] for _, (start, end) in cutter.pre_tokenize_str(text)]
