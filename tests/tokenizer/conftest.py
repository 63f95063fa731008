"""Small vocabularies as GGUF metadata. Byte-level ones are trained by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from hybrid.tokenizer.byte_alphabet import BYTE_CHARS
from hybrid.tokenizer.pretokenizers import PRE_TOKENIZERS

CORPUS = [
    "The quick brown fox can't jump over 12345 lazy dogs; it's they'll we've I'm.",
    "def main():\n    return {'a': 1, 'b': [2, 3]}\n\n\tprint(x)\r\n",
    "汉字和かな混じり文とカタカナ。Ünïcödé naïve CamelCaseWord HTTPServer 한국어 텍스트",
    "Здравствуй, мир! 1,234.56 + 7890 = ??? ... !!! — emoji 😀🎉 e\u0301",
] * 4


def byte_level(pre: str, merges: list[str] | None = None, extra: dict[str, int] | None = None, **keys: Any):
    """Metadata of a byte-level vocabulary: 256 bytes, then what merges make, then ``extra`` with types."""
    merges = merges or []
    tokens = list(BYTE_CHARS)
    tokens += [text for text in dict.fromkeys(line.replace(" ", "") for line in merges) if text not in tokens]
    types = [1] * len(tokens) + list((extra or {}).values())
    tokens += list(extra or {})
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def train(pre: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A tokenizer trained with the expressions of ``pre``, and its vocabulary as GGUF metadata."""
    kind = PRE_TOKENIZERS[pre]
    trained = tokenizers.Tokenizer(models.BPE(ignore_merges=kind.ignore_merges))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in kind.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    vocab = trained.get_vocab()
    merges = [" ".join(pair) for pair in _merges_of(trained)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.merges": merges,
    }
    return trained, metadata


def _merges_of(trained: tokenizers.Tokenizer) -> list[list[str]]:
    import json

    return json.loads(trained.to_str())["model"]["merges"]


@pytest.fixture(scope="session")
def byte_level_metadata() -> Callable[..., dict[str, Any]]:
    return byte_level


@pytest.fixture(scope="session")
def trained_vocabulary() -> Callable[[str], tuple[tokenizers.Tokenizer, dict[str, Any]]]:
    return train
