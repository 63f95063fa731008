"""The tokeniser of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import models

from hybrid.errors import RequestError, TokenizerError
from hybrid.tokenizer.byte_alphabet import CHAR_BYTES
from hybrid.tokenizer.detokenizer import Detokenizer
from hybrid.tokenizer.engines import SPACE_MARK, ByteLevelEngine, ScoreEngine
from hybrid.tokenizer.metadata import Metadata
from hybrid.tokenizer.vocabulary import TokenType, Vocabulary, read_vocabulary

_CONTROL = (TokenType.CONTROL, TokenType.UNKNOWN)
_SPECIAL = (*_CONTROL, TokenType.USER_DEFINED)


class Tokenizer:
    """Text to ids and back, as the metadata of a GGUF file describes it.

    *Control* tokens (``token_type`` CONTROL or UNKNOWN) come out of text only with ``parse_special``.
    *Special* tokens are those and the user-defined ones, which any text may hold; both are found before
    anything else, the leftmost first and of these the longest.

    Attributes:
        vocab_size: number of ids; `check_embedding` compares it with the model.
        bos_id, eos_id: ids, or ``None`` where the file names none.
        stop_ids: ids that end a generation.
        add_bos, add_eos: whether `encode` adds them when asked for special tokens.
        add_space_prefix: whether text begins with a space that decoding drops (SentencePiece).
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokens = vocabulary.tokens
        self._control = frozenset(vocabulary.of_types(*_CONTROL))
        self._special = frozenset(vocabulary.of_types(*_SPECIAL))
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id, self.eos_id, self.stop_ids = vocabulary.bos_id, vocabulary.eos_id, vocabulary.stop_ids
        self.add_bos, self.add_eos = vocabulary.add_bos, vocabulary.add_eos
        self.is_sentencepiece = vocabulary.model == "llama"
        self.add_space_prefix = self.is_sentencepiece and vocabulary.add_space_prefix
        self._engine = ScoreEngine(vocabulary) if self.is_sentencepiece else ByteLevelEngine(vocabulary)
        self._all_special = _finder(vocabulary, _SPECIAL)
        self._user_defined = _finder(vocabulary, (TokenType.USER_DEFINED,))
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_gguf(cls, source: Any) -> Tokenizer:
        """The tokeniser in ``source``: an open GGUF file, or its metadata as a mapping.

        Raises:
            TokenizerError: the vocabulary is missing, of an unknown kind, or contradicts itself.
        """
        metadata: Metadata = getattr(source, "metadata", source)
        return cls(read_vocabulary(metadata))

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of ``text``.

        Args:
            add_special: put bos before and eos after, where the file asks for them.
            parse_special: control tokens written out in the text become their ids.

        Raises:
            RequestError: the text is not a string, holds a lone surrogate, or a byte without a token.
        """
        ids = self.encode_pieces(self.split_special(text, parse_special=parse_special))
        if add_special and self.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def split_special(self, text: str, *, parse_special: bool) -> list[str | int]:
        """``text`` cut into plain pieces and the ids of special tokens found in it, in order."""
        pieces: list[str | int] = []
        position = 0
        for token_id, start, end in self.find_special(text, parse_special=parse_special):
            if start > position:
                pieces.append(text[position:start])
            pieces.append(token_id)
            position = end
        if position < len(text):
            pieces.append(text[position:])
        return pieces

    def find_special(self, text: str, *, parse_special: bool) -> list[tuple[int, int, int]]:
        """Special tokens in ``text`` as (id, start, end), in order, none overlapping."""
        _check_text(text)
        finder = self._all_special if parse_special else self._user_defined
        if finder is None:
            return []
        found = finder.encode(text, add_special_tokens=False)
        return [(token_id, *span) for token_id, span in zip(found.ids, found.offsets, strict=True)]

    def encode_pieces(self, pieces: Iterable[str | int]) -> list[int]:
        """Ids of pieces as `split_special` gives them. No special token is looked for in strings."""
        ids: list[int] = []
        after_special = True
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._engine.encode(piece, after_special)
            after_special = isinstance(piece, int)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ``ids``; bytes that are no character become U+FFFD.

        ``skip_special`` leaves out control tokens; user-defined tokens are text either way.

        Raises:
            RequestError: an id is not in the vocabulary.
        """
        pieces = self.detokenizer(skip_special=skip_special)
        return b"".join([pieces.push_bytes(token_id) for token_id in ids]).decode("utf-8", "replace")

    def detokenizer(self, *, skip_special: bool = False, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """An incremental decoder.

        ``prompt_ids`` are the ids before the first one pushed: SentencePiece drops a leading space at the
        start of a text and keeps it where a text goes on.
        """
        after_special = not prompt_ids or self.is_special(prompt_ids[-1])
        return Detokenizer(self, skip_special=skip_special, after_special=after_special)

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        return self._tokens[self._checked(token_id)]

    def token_id(self, text: str) -> int | None:
        """The id of a token spelled ``text``, or ``None``."""
        return self._vocabulary.ids.get(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for in text; empty for unused tokens."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(self._checked(token_id))
        return known

    def is_control(self, token_id: int) -> bool:
        """Whether only ``parse_special`` yields this token."""
        return self._checked(token_id) in self._control

    def is_special(self, token_id: int) -> bool:
        """Whether the token is matched as a whole in text: control or user-defined."""
        return self._checked(token_id) in self._special

    @property
    def control_texts(self) -> list[str]:
        """Texts that untrusted input must not turn into a token."""
        return [self._tokens[index] for index in sorted(self._control) if self._tokens[index]]

    def check_embedding(self, rows: int) -> None:
        """Compare the vocabulary with the rows of the embedding matrix.

        Raises:
            TokenizerError: they differ.
        """
        if rows != self.vocab_size:
            raise TokenizerError(
                f"tokenizer.ggml.tokens has {self.vocab_size} tokens, but token_embd.weight has {rows} rows: "
                "the vocabulary and the weights are not of one model"
            )

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id {token_id} is out of range: expected 0 to {self.vocab_size - 1}")
        return token_id

    def _spell(self, token_id: int) -> bytes:
        text, kind = self._tokens[token_id], self._vocabulary.types[token_id]
        if token_id in self._special:
            return text.encode()
        if kind == TokenType.UNUSED:
            return b""
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if self.is_sentencepiece:
            return text.replace(SPACE_MARK, " ").encode()
        if all(char in CHAR_BYTES for char in text):
            return bytes(CHAR_BYTES[char] for char in text)
        return text.encode()


def _finder(vocabulary: Vocabulary, kinds: tuple[TokenType, ...]) -> tokenizers.Tokenizer | None:
    """A tokeniser of an empty model: it yields the added tokens it meets and nothing else."""
    ids = {vocabulary.tokens[index]: index for index in vocabulary.of_types(*kinds)}
    ids.pop("", None)
    if not ids:
        return None
    finder = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[]))
    finder.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ids])
    return finder


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"text must be a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds a lone surrogate at character {error.start}: not valid Unicode"
        ) from None
