"""Text to token ids and back, from the metadata of a GGUF file."""

from __future__ import annotations

from hybrid.tokenizer.detokenizer import Detokenizer
from hybrid.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
