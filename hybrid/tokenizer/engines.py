"""Plain text to ids: the two BPE engines, built on the `tokenizers` library.

Neither engine knows control tokens: they are left out of its vocabulary, so no text becomes one.
"""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import models, pre_tokenizers

from hybrid.errors import RequestError, TokenizerError
from hybrid.tokenizer.byte_alphabet import BYTE_CHARS
from hybrid.tokenizer.vocabulary import UNREACHABLE, TokenType, Vocabulary

SPACE_MARK = "▁"


class ByteLevelEngine:
    """GPT-2 style BPE over bytes, words cut by the vocabulary's pre-tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        reachable = _reachable(vocabulary)
        pre = vocabulary.pre
        self._engine = tokenizers.Tokenizer(
            models.BPE(vocab=reachable, merges=vocabulary.merges, ignore_merges=pre.ignore_merges)
        )
        self._engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._missing = bytes(byte for byte in range(256) if BYTE_CHARS[byte] not in reachable)

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Ids of plain ``text``.

        Raises:
            RequestError: the vocabulary has no token for a byte of the text.
        """
        if self._missing:
            for byte in sorted(set(text.encode()).intersection(self._missing)):
                raise RequestError(
                    f"the text needs byte 0x{byte:02X}, and this vocabulary has no token for it"
                )
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        return ids


class ScoreEngine:
    """SentencePiece BPE: of all neighbours whose concatenation is a token, the best score merges first."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens = vocabulary.tokens
        unknown = None if vocabulary.unknown_id is None else tokens[vocabulary.unknown_id]
        pieces = _reachable(vocabulary)
        byte_tokens = {tokens[index]: index for index in vocabulary.of_types(TokenType.BYTE)}
        absent = [byte for byte in range(256) if byte_token(byte) not in byte_tokens]
        if absent and not unknown:
            raise TokenizerError(
                f"tokenizer.ggml.tokens: no {byte_token(absent[0])} of type BYTE and no unknown token: "
                "text outside the vocabulary could not be written down"
            )
        vocab = pieces | byte_tokens
        if unknown:
            vocab[unknown] = vocabulary.ids[unknown]
        self._engine = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=_merges_by_score(pieces, vocabulary),
                unk_token=unknown or None,
                fuse_unk=True,
                byte_fallback=not absent,
            )
        )
        self._add_space_prefix = vocabulary.add_space_prefix

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Ids of plain ``text``; a space goes before it at the start and after a special token."""
        if self._add_space_prefix and after_special:
            text = " " + text
        ids: list[int] = self._engine.encode(text.replace(" ", SPACE_MARK), add_special_tokens=False).ids
        return ids


def byte_token(byte: int) -> str:
    """Text of the token for a byte in a SentencePiece vocabulary."""
    return f"<0x{byte:02X}>"


def _reachable(vocabulary: Vocabulary) -> dict[str, int]:
    ids = dict(vocabulary.ids)
    for index in vocabulary.of_types(*UNREACHABLE):
        ids.pop(vocabulary.tokens[index], None)
    return ids


def _merges_by_score(pieces: dict[str, int], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, in the order SentencePiece would merge them.

    The library ranks pairs, SentencePiece ranks results and takes the leftmost of equals. Pairs with
    the same result compete for a symbol only where the result overlaps itself ("aaa" = "aa" + "a" =
    "a" + "aa"); runs build up from the left, so there the pair with the longer left part comes first.
    """
    scores = vocabulary.scores.tolist()
    order = sorted(pieces, key=lambda text: (-scores[pieces[text]], pieces[text]))
    return [
        (text[:cut], text[cut:])
        for text in order
        for cut in _cuts(text)
        if text[:cut] in pieces and text[cut:] in pieces
    ]


def _cuts(text: str) -> Iterable[int]:
    return range(len(text) - 1, 0, -1)
