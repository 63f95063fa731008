"""A byte-level BPE vocabulary of any size, made of nothing but letters.

Tokens are the 256 bytes, then every string of two, of three, … lowercase letters, the first of which
may be a space, shortest first. The set is closed under taking prefixes, so that each token is
one merge of two earlier ones. Text becomes tokens of two to four letters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hybrid.synth.presets import VocabularyShape
from hybrid.tokenizer.byte_alphabet import BYTE_CHARS
from hybrid.tokenizer.vocabulary import TokenType

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SPACE = BYTE_CHARS[ord(" ")]

USER, ASSISTANT = "<|user|>", "<|assistant|>"
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """``tokens[i]`` is the text of id ``i`` (in GPT-2's byte alphabet), ``merges`` are ``"left right"``."""

    tokens: list[str]
    token_types: list[int]
    merges: list[str]


def _words() -> Iterator[tuple[str, str]]:
    """(prefix, last letter) of every word, shortest first; within a length the letters cycle fastest at
    the front, so that a cut through a length leaves words of every initial."""
    shorter = [_SPACE, *_LETTERS]
    while True:
        longer = []
        for letter in _LETTERS:
            for prefix in shorter:
                yield prefix, letter
                longer.append(prefix + letter)
        shorter = longer


def build_vocabulary(shape: VocabularyShape) -> Vocabulary:
    """Tokens, types and merges for a vocabulary of exactly ``shape.size`` tokens."""
    special = {shape.bos_id: "<|startoftext|>", shape.eos_id: "<|endoftext|>"}
    free = (i for i in range(max(special) + 1, shape.size))
    special |= {next(free): USER, next(free): ASSISTANT}
    tokens: list[str] = []
    token_types: list[int] = []
    merges: list[str] = []
    alphabet, words = iter(BYTE_CHARS), _words()
    for token_id in range(shape.size):
        if token_id in special:
            tokens.append(special[token_id])
            token_types.append(int(TokenType.CONTROL))
            continue
        token = next(alphabet, None)
        if token is None:
            prefix, letter = next(words)
            merges.append(f"{prefix} {letter}")
            token = prefix + letter
        tokens.append(token)
        token_types.append(int(TokenType.NORMAL))
    return Vocabulary(tokens, token_types, merges)


def vocabulary_metadata(shape: VocabularyShape) -> dict[str, Any]:
    """The vocabulary and a minimal chat template as GGUF keys."""
    vocabulary = build_vocabulary(shape)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": shape.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.token_types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": shape.bos_id,
        "tokenizer.ggml.eos_token_id": shape.eos_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }
