"""Decoding of IQ2 and IQ3: magnitudes looked up in a code book, and signs; see `decode` for the interface.

A unit is 128 columns, the four words of 32 that `rearrange` describes. Half ``h`` takes words ``h`` and ``2 +
h``, so that a thread makes out the eighth signs of a word once for its two halves.
"""

from __future__ import annotations

import triton
import triton.language as tl
from hybrid.kernels.gpu.decode import byte_permute, one_and_more


@triton.jit
def half_codebook(unit, P: tl.constexpr, h):
    return 8 * unit + 4 * (P // 2) + 2 * h + P % 2


@triton.jit
def join_words(a, b, c, d):
    """Four words as one dimension more."""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(pairs, [a.shape[0], a.shape[1], a.shape[2], 4])


@triton.jit
def with_parity(word):
    """Seven nibbles of signs to eight: the last makes the number of negative ones in each place even."""
    signs = word & 0x0FFFFFFF
    odd = signs ^ (signs >> 16)
    odd ^= odd >> 8
    odd ^= odd >> 4
    return signs | (odd << 28)


@triton.jit
def block_scale(head, block):
    return tl.load(head + block).to(tl.float32)


@triton.jit
def scale_of_nibble(word, d, UNIT: tl.constexpr):
    """``d * (n + 0.5) * UNIT``, exact, for a nibble at bits 19 to 22."""
    return one_and_more(word, 0x00780000) * (d * (16 * UNIT)) - d * (15.5 * UNIT)


# --- IQ2: eight columns an entry ---


@triton.jit
def iq2_pair(table, index, signs, E: tl.constexpr):
    """Two words of signed weights: magnitudes are chosen by nibbles, whose third bit is the sign."""
    moved = (signs << (2 - E)) if E <= 2 else (signs >> (E - 2))
    selector = tl.load(table + index) | (moved & 0x44444444)
    low = byte_permute(0x002B1908, 0x00D5E7F8, selector)
    return low, byte_permute(0x002B1908, 0x00D5E7F8, selector >> 16)


@triton.jit
def decode_iq2_xxs(codes, high, scales, head, table, g, h, P: tl.constexpr):
    at = 4 * g + 2 * (P // 2) + h
    q = tl.load(codes + at)
    word = tl.load(high + at)
    signs = with_parity(word)
    E: tl.constexpr = 2 * (P % 2)
    a, b = iq2_pair(table, (q >> (8 * E)) & 255, signs, E)
    c, d = iq2_pair(table, (q >> (8 * E + 8)) & 255, signs, E + 1)
    scale = scale_of_nibble(word >> 9, block_scale(head, (g >> 1)), 0.25)
    return join_words(a, b, c, d), scale, tl.zeros_like(scale)


@triton.jit
def iq2_nibble_scale(scales, head, g, at, STRIDE: tl.constexpr, P: tl.constexpr):
    """A scale for 16 columns in a nibble; the eight bytes end a block's STRIDE."""
    block = g >> 1
    byte = tl.load(scales + STRIDE * block + (STRIDE - 8) + (at & 7)).to(tl.int32)
    return scale_of_nibble(byte << (15 if P % 2 else 19), block_scale(head, block), 0.25)


@triton.jit
def decode_iq2_xs(codes, high, scales, head, table, g, h, P: tl.constexpr):
    at = 4 * g + 2 * (P // 2) + h
    q = tl.load(codes + at)
    word = tl.load(high + at)
    signs = with_parity(word)
    E: tl.constexpr = 2 * (P % 2)
    a, b = iq2_pair(table, ((q >> (8 * E)) & 255) | ((word >> (20 + E)) & 256), signs, E)
    c, d = iq2_pair(table, ((q >> (8 * E + 8)) & 255) | ((word >> (21 + E)) & 256), signs, E + 1)
    scale = iq2_nibble_scale(scales, head, g, at, 8, P)
    return join_words(a, b, c, d), scale, tl.zeros_like(scale)


@triton.jit
def decode_iq2_s(codes, high, scales, head, table, g, h, P: tl.constexpr):
    at = 4 * g + 2 * (P // 2) + h
    q = tl.load(codes + at)
    signs = tl.load(high + at)
    top = tl.load(scales + 16 * (g >> 1) + (at & 7)).to(tl.int32)
    E: tl.constexpr = 2 * (P % 2)
    a, b = iq2_pair(table, ((q >> (8 * E)) & 255) | ((top << (8 - 2 * E)) & 768), signs, E)
    c, d = iq2_pair(table, ((q >> (8 * E + 8)) & 255) | ((top << (6 - 2 * E)) & 768), signs, E + 1)
    scale = iq2_nibble_scale(scales, head, g, at, 16, P)
    return join_words(a, b, c, d), scale, tl.zeros_like(scale)


# --- IQ3: four columns an entry ---


@triton.jit
def iq3_word(table, index, signs, J: tl.constexpr):
    """Signed weights of four columns: no magnitude is 0, so negating bytes carries into no other."""
    ones = (signs >> (4 * (J % 2) + J // 2)) & 0x01010101
    return (tl.load(table + index) ^ (ones * 255)) + ones


@triton.jit
def decode_iq3_xxs(codes, high, scales, head, table, g, h, P: tl.constexpr):
    at = 4 * g + 2 * (P // 2) + h
    q = tl.load(codes + 2 * at + P % 2)
    word = tl.load(high + at)
    signs = with_parity(word)
    J: tl.constexpr = 4 * (P % 2)
    a = iq3_word(table, q & 255, signs, J)
    b = iq3_word(table, (q >> 8) & 255, signs, J + 1)
    c = iq3_word(table, (q >> 16) & 255, signs, J + 2)
    d = iq3_word(table, (q >> 24) & 255, signs, J + 3)
    scale = scale_of_nibble(word >> 9, block_scale(head, (g >> 1)), 0.5)
    return join_words(a, b, c, d), scale, tl.zeros_like(scale)


@triton.jit
def decode_iq3_s(codes, high, scales, head, table, g, h, P: tl.constexpr):
    at = 4 * g + 2 * (P // 2) + h
    block = g >> 1
    q = tl.load(codes + 2 * at + P % 2)
    signs = tl.load(high + at)
    top = tl.load(scales + 12 * block + (at & 7)).to(tl.int32) << 8
    J: tl.constexpr = 4 * (P % 2)
    a = iq3_word(table, (q & 255) | ((top >> J) & 256), signs, J)
    b = iq3_word(table, ((q >> 8) & 255) | ((top >> (J + 1)) & 256), signs, J + 1)
    c = iq3_word(table, ((q >> 16) & 255) | ((top >> (J + 2)) & 256), signs, J + 2)
    d = iq3_word(table, ((q >> 24) & 255) | ((top >> (J + 3)) & 256), signs, J + 3)
    # 32 columns have a scale: the low nibbles of four bytes are those of even words.
    nibble = tl.load(scales + 12 * block + 8 + ((at & 7) >> 1)).to(tl.int32) << (19 - 4 * h)
    d_of_block = block_scale(head, block)
    scale = one_and_more(nibble, 0x00780000) * (32 * d_of_block) - 31 * d_of_block
    return join_words(a, b, c, d), scale, tl.zeros_like(scale)
