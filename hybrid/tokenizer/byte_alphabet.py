"""The printable character that stands for each byte in a byte-level vocabulary.

GPT-2's `bytes_to_unicode` (encoder.py): printable Latin-1 stands for itself, the rest from U+0100 on.
"""

from __future__ import annotations


def _byte_alphabet() -> list[str]:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [alphabet[byte] for byte in range(256)]


BYTE_CHARS = _byte_alphabet()
CHAR_BYTES = {char: byte for byte, char in enumerate(BYTE_CHARS)}
