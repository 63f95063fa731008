"""Ids to text, one at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Turns ids into text as they arrive; made by `Tokenizer.detokenizer`.

    All that ``push`` and ``flush`` returned, joined, equals ``Tokenizer.decode`` of the same ids. A
    character whose bytes are spread over several tokens appears when its last byte does.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, after_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._after_special = after_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that ``token_id`` completes, perhaps empty.

        Raises:
            RequestError: the id is not in the vocabulary.
        """
        return self._utf8.decode(self.push_bytes(token_id))

    def push_bytes(self, token_id: int) -> bytes:
        """Bytes of ``token_id`` at this place, before they are joined to characters."""
        piece = self._tokenizer.token_bytes(token_id)
        if self._tokenizer.is_special(token_id):
            self._after_special = True
            return b"" if self._skip_special and self._tokenizer.is_control(token_id) else piece
        if self._after_special and self._tokenizer.add_space_prefix and piece.startswith(b" "):
            piece = piece[1:]
        self._after_special = False
        return piece

    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character, else nothing."""
        return self._utf8.decode(b"", final=True)
