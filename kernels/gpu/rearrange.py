"""Blocks of the IQ formats as GPUs hold them: bits of the file's blocks in another order, or coded anew.

IQ2 and IQ3: 32 columns have four sign fields ``e`` of seven bits, or of eight. Here the signs of a *column*
stand together, so that a shift and a mask put them where a product wants them. Sign ``c`` of field ``e`` is

    IQ2: bit 4 * c + e        IQ3: bit 8 * (c % 4) + 4 * (c // 4) + e

of the word of its 32 columns. The eighth sign of a field of seven bits is the parity of the others; in its
place, bits 28 to 31, stand the four bits that the file has above the fields: the scale, and of IQ2_XS the
ninth bits of indices. Not a byte is added.

IQ1: weights are trits, five to a byte, as the CPU kernels have them (kernels/cpu/recode.h), 15 % more bytes:
an index of eleven bits would be looked up in 16 KiB, more slowly than memory delivers it. A word with the
scales in bits 0 to 23 and the signs of deltas in bits 24 to 31 follows those of IQ1_S; the fifth trits of the
last word repeat the last four signs, as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hybrid.kernels.gpu.codebooks import iq1_entries, iq1_trits

Recode = Callable[[torch.Tensor], torch.Tensor]
TRIT_RUNS = ((0, 32, 0), (32, 16, 160), (48, 4, 240))
"""First byte, number of bytes, first column: digit ``n`` of byte ``i`` is column ``first + n * number + i``.
"""


@dataclass(frozen=True)
class Rearrangement:
    """From blocks of the file, uint8 ``[n, block_bytes]``, to those whose fields are planes; and back."""

    forward: Recode
    backward: Recode


def _words(b: torch.Tensor) -> torch.Tensor:
    """Uint8 ``[n, 4 * k] -> [n, k]``."""
    return b.flatten().clone().view(torch.int32).long().reshape(len(b), -1) & 0xFFFFFFFF


def _halves(b: torch.Tensor) -> torch.Tensor:
    """Uint8 ``[n, 2 * k] -> [n, k]``."""
    return b.flatten().clone().view(torch.int16).long().reshape(len(b), -1) & 0xFFFF


def _bytes(words: torch.Tensor) -> torch.Tensor:
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).view(torch.uint8)


def sign_place(c: int, e: int, iq3: bool) -> int:
    """Bit of sign ``c`` of field ``e`` in a word."""
    return 8 * (c % 4) + 4 * (c // 4) + e if iq3 else 4 * c + e


def _move_signs(words: torch.Tensor, width: int, iq3: bool, back: bool = False) -> torch.Tensor:
    out = words & 0xF0000000 if width == 7 else torch.zeros_like(words)
    for e in range(4):
        for c in range(width):
            from_bit, to_bit = width * e + c, sign_place(c, e, iq3)
            if back:
                from_bit, to_bit = to_bit, from_bit
            out = out | ((words >> from_bit & 1) << to_bit)
    return out


def _signs(iq3: bool, at: int, width: int, order: tuple[tuple[int, int], ...]) -> Rearrangement:
    """Words of signs at ``at``; then ``order``: first byte and number of bytes of each field here."""
    places = torch.tensor([i for first, count in order for i in range(first, first + count)])

    def moved(b: torch.Tensor, back: bool) -> torch.Tensor:
        out = b.clone()
        out[:, at : at + 32] = _bytes(_move_signs(_words(b[:, at : at + 32]), width, iq3, back))
        return out

    def forward(b: torch.Tensor) -> torch.Tensor:
        return moved(b, False)[:, places.to(b.device)]

    def backward(b: torch.Tensor) -> torch.Tensor:
        return moved(b[:, places.argsort().to(b.device)], True)

    return Rearrangement(forward, backward)


def _iq2_xxs_forward(b: torch.Tensor) -> torch.Tensor:
    pairs = b[:, 2:].reshape(len(b), 8, 2, 4)
    signs = _bytes(_move_signs(_words(pairs[:, :, 1].reshape(len(b), 32)), 7, False))
    return torch.cat((pairs[:, :, 0].flatten(1), signs, b[:, :2]), 1)


def _iq2_xxs_backward(b: torch.Tensor) -> torch.Tensor:
    signs = _bytes(_move_signs(_words(b[:, 32:64]), 7, False, back=True))
    pairs = torch.stack((b[:, :32].reshape(-1, 8, 4), signs.reshape(-1, 8, 4)), 2)
    return torch.cat((b[:, 64:], pairs.flatten(1)), 1)


def _iq2_xs_forward(b: torch.Tensor) -> torch.Tensor:
    q = _halves(b[:, 2:66]).reshape(len(b), 8, 4)
    e = torch.arange(4, device=b.device)
    words = ((q >> 9) << (7 * e)).sum(-1) | ((q >> 8 & 1) << (28 + e)).sum(-1)
    signs = _bytes(_move_signs(words, 7, False)).reshape(len(b), 32)
    return torch.cat(((q & 255).to(torch.uint8).flatten(1), signs, b[:, 66:], b[:, :2]), 1)


def _iq2_xs_backward(b: torch.Tensor) -> torch.Tensor:
    words = _move_signs(_words(b[:, 32:64]), 7, False, back=True)[..., None]
    e = torch.arange(4, device=b.device)
    q = b[:, :32].long().reshape(-1, 8, 4) | (words >> (28 + e) & 1) << 8 | (words >> (7 * e) & 127) << 9
    low, high = (q & 255).to(torch.uint8), (q >> 8).to(torch.uint8)
    return torch.cat((b[:, 72:], torch.stack((low, high), -1).flatten(1), b[:, 64:72]), 1)


def trit_bytes(trits: torch.Tensor) -> torch.Tensor:
    """Uint8 ``[n, 260]`` to ``[n, 52]``."""
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=trits.device)[:, None]
    runs = [
        (trits[:, first : first + 5 * width].reshape(-1, 5, width).int() * powers).sum(1)
        for _, width, first in TRIT_RUNS
    ]
    return ((torch.cat(runs, 1) * 256 + 242) // 243).to(torch.uint8)


def trits_of(b: torch.Tensor) -> torch.Tensor:
    """The inverse of `trit_bytes`."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=b.device)[:, None]
    runs = [
        ((b[:, None, at : at + width].int() * powers & 255) * 3 >> 8).flatten(1) for at, width, _ in TRIT_RUNS
    ]
    return torch.cat(runs, 1).to(torch.uint8)


def _trits_of_entries(index: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    return trit_bytes(torch.cat((iq1_trits(index.device)[index].flatten(1), more.to(torch.uint8)), 1))


def _entries_of_trits(trits: torch.Tensor) -> torch.Tensor:
    powers = 3 ** torch.arange(7, -1, -1, dtype=torch.int32, device=trits.device)
    numbers = (trits[:, :256].reshape(-1, 32, 8).int() * powers).sum(-1)
    return iq1_entries(trits.device)[numbers].long()


def _iq1_s_forward(b: torch.Tensor) -> torch.Tensor:
    qh = _halves(b[:, 34:])[..., None]  # [n, 8, 1]
    e, s = torch.arange(4, device=b.device), torch.arange(8, device=b.device)
    index = b[:, 2:34].long() | ((qh >> (3 * e) & 7) << 8).flatten(1)
    signs, scales = qh[..., 0] >> 15, qh[..., 0] >> 12 & 7
    word = (scales << (3 * s)).sum(1, keepdim=True) | (signs << (24 + s)).sum(1, keepdim=True)
    return torch.cat((_trits_of_entries(index, signs[:, 4:]), _bytes(word), b[:, :2]), 1)


def _iq1_s_backward(b: torch.Tensor) -> torch.Tensor:
    index = _entries_of_trits(trits_of(b[:, :52]))
    word, s = _words(b[:, 52:56]), torch.arange(8, device=b.device)
    qh = (word >> (3 * s) & 7) << 12 | (word >> (24 + s) & 1) << 15
    qh |= ((index.reshape(-1, 8, 4) >> 8) << (3 * torch.arange(4, device=b.device))).sum(-1)
    halves = torch.stack((qh & 255, qh >> 8), -1).flatten(1).to(torch.uint8)
    return torch.cat((b[:, 56:], (index & 255).to(torch.uint8), halves), 1)


def _iq1_m_forward(b: torch.Tensor) -> torch.Tensor:
    nibbles = torch.stack((b[:, 32:48] & 15, b[:, 32:48] >> 4), -1).flatten(1).long()
    index = b[:, :32].long() | (nibbles & 7) << 8
    signs = ((nibbles >> 3) << torch.arange(32, device=b.device)).sum(1, keepdim=True)
    more = torch.zeros(len(b), 4, dtype=torch.uint8, device=b.device)
    return torch.cat((_trits_of_entries(index, more), _bytes(signs), b[:, 48:]), 1)


def _iq1_m_backward(b: torch.Tensor) -> torch.Tensor:
    index = _entries_of_trits(trits_of(b[:, :52]))
    signs = _words(b[:, 52:56]) >> torch.arange(32, device=b.device) & 1
    nibbles = (index >> 8 | signs << 3).to(torch.uint8).reshape(-1, 16, 2)
    qh = nibbles[..., 0] | nibbles[..., 1] << 4
    return torch.cat(((index & 255).to(torch.uint8), qh, b[:, 56:]), 1)


REARRANGED = {
    "IQ2_XXS": Rearrangement(_iq2_xxs_forward, _iq2_xxs_backward),
    "IQ2_XS": Rearrangement(_iq2_xs_forward, _iq2_xs_backward),
    "IQ2_S": _signs(False, 34, 8, ((2, 32), (34, 32), (66, 16), (0, 2))),
    "IQ3_XXS": _signs(True, 66, 7, ((2, 64), (66, 32), (0, 2))),
    "IQ3_S": _signs(True, 74, 8, ((2, 64), (74, 32), (66, 8), (106, 4), (0, 2))),
    "IQ1_S": Rearrangement(_iq1_s_forward, _iq1_s_backward),
    "IQ1_M": Rearrangement(_iq1_m_forward, _iq1_m_backward),
}
