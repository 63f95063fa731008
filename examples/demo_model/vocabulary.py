"""The demo model's vocabulary: byte-level BPE, trained on its corpus, and how documents become ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .corpus import Document

BOS, EOS, USER, ASSISTANT, SYSTEM, PAD = (
    "<|bos|>",
    "<|eos|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|pad|>",
)
SPECIAL = [BOS, EOS, USER, ASSISTANT, SYSTEM, PAD]
PRE_NAME = "qwen2"  # tokenizer.ggml.pre: the splitting rule below
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] + eos_token -}}"
    "{%- elif message['role'] == 'system' -%}{{- '<|system|>' + message['content'] -}}"
    "{%- else -%}{{- '<|user|>' + message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_vocabulary(texts: Iterable[str], size: int) -> Tokenizer:
    """A vocabulary of exactly ``size`` entries, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, {size} were asked for")
    return tokenizer


def encode(tokenizer: Tokenizer, document: Document) -> list[int]:
    """A document with its frame: plain text or one turn of a chat."""
    bos, eos, user, assistant = (tokenizer.token_to_id(name) for name in (BOS, EOS, USER, ASSISTANT))
    text: list[int] = tokenizer.encode(document.text).ids
    if document.request is None:
        return [bos, *text, eos]
    return [bos, user, *tokenizer.encode(document.request).ids, assistant, *text, eos]


def token_stream(tokenizer: Tokenizer, documents: Iterable[Document], total: int) -> Iterator[int]:
    """Ids of documents one after another until ``total`` of them."""
    count = 0
    for document in documents:
        ids = encode(tokenizer, document)
        yield from ids
        count += len(ids)
        if count >= total:
            return
