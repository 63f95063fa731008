"""Decoding of weights of -1, 0 and 1, five to a byte: TQ1_0, and IQ1 as `rearrange` recodes it.

See `decode` for the interface. A unit is a block of 256 columns. A byte times 3^n is below 2^16, so that two
bytes of a word are multiplied at once, and ends, above bit 8, in the number that its first n digits make:
digit n is what that number is more than three times the number before. The first five parts are the words of
`codes`, one digit each. The other three take the words of `high`, half 0 the digits 0 to 2, half 1 the digits
3 and 4; the last 16 columns are the digits of one word, four columns each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from hybrid.kernels.gpu.decode import byte_permute, four_words, one_and_more


@triton.jit
def half_of_block(P: tl.constexpr, h):
    """Which 16 of a block's columns."""
    return 2 * P + h if P < 5 else 5 + P + 3 * h


@triton.jit
def half_trits(unit, P: tl.constexpr, h):
    return 16 * unit + (2 * P + h if P < 5 else 5 + P + 3 * h)


@triton.jit
def leading(word, power):
    """The number that the first digits of each byte make, as many as ``power`` (of three) has."""
    return byte_permute((word & 0x00FF00FF) * power, ((word >> 8) & 0x00FF00FF) * power, word * 0 + 0x7351)


@triton.jit
def trits(codes, high, last, g, h, P: tl.constexpr):
    """Weights plus one of part ``P``: ``[rows, units, 2, 4]``; ``last`` is the last word of a block."""
    if P < 5:
        word = four_words(codes, 8 * g + 4 * h)
        return leading(word, 3 ** (P + 1)) - 3 * leading(word, 3**P)
    word = four_words(high, 4 * g + 0 * h)
    before = tl.where(h == 0, 3 ** (P - 5), 3 ** (P - 2))[:, :, :, None]
    after = tl.where(h == 0, 3 ** (P - 4), 3 ** (P - 1))[:, :, :, None]
    if P == 7:
        i = tl.arange(0, 4)[None, None, None, :]
        digit = tl.where(i < 2, tl.where(i == 0, 1, 3), tl.where(i == 2, 9, 27))
        second = (h == 1)[:, :, :, None]
        before, after = tl.where(second, digit, 9), tl.where(second, 3 * digit, 27)
        word = tl.where(second, last[:, :, :, None], word)
    return leading(word, after) - 3 * leading(word, before)


@triton.jit
def decode_tq1_0(codes, high, scales, head, table, g, h, P: tl.constexpr):
    scale = tl.load(head + g).to(tl.float32)
    last = tl.load(scales + g + 0 * h)
    return trits(codes, high, last, g, h, P), scale, tl.zeros_like(scale)


@triton.jit
def decode_iq1_s(codes, high, scales, head, table, g, h, P: tl.constexpr):
    """Scale ``d * (2 * s + 1)``; a weight is ``trit - 1 ± 1 / 8``: the rest is the minimum."""
    last = tl.load(scales + 2 * g + 0 * h)
    word = tl.load(scales + 2 * g + 1)
    d = tl.load(head + g).to(tl.float32)
    # Sub-block s: three bits of scale from bit 3 * s, a sign of delta at bit 24 + s.
    s = half_of_block(P, h) >> 1
    scale = one_and_more((word >> (3 * s)) << 20, 0x00700000) * (16 * d) - 15 * d
    delta = (((word << (7 - s)) & -0x80000000) | 0x3E000000).to(tl.float32, bitcast=True)
    minimum = scale - scale * delta
    return trits(codes, high, last, g, h, P), scale, minimum


@triton.jit
def decode_iq1_m(codes, high, scales, head, table, g, h, P: tl.constexpr):
    """Eighths of a weight plus 9, because two deltas share a scale: ``8 * trit``, and 2 where delta is
    positive.
    """
    last = tl.load(scales + 2 * g + 0 * h)
    deltas = tl.load(scales + 2 * g + 1 + 0 * h)
    low = tl.load(head + 2 * g)
    high_half = tl.load(head + 2 * g + 1)
    bits = (
        ((low >> 12) & 15) | ((low >> 24) & 0xF0) | ((high_half >> 4) & 0xF00) | ((high_half >> 16) & 0xF000)
    )
    d = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    half = half_of_block(P, h)
    field = (high_half if P >= 4 else low) >> (16 * ((half >> 2) & 1) + 3 * (half & 3))
    scale = one_and_more(field << 20, 0x00700000) * (2 * d) - 1.875 * d
    i = tl.arange(0, 4)[None, None, None, :]
    negative = ((deltas >> (2 * half))[:, :, :, None] >> (i // 2)) & 1
    code = 8 * trits(codes, high, last, g, h, P) + (0x02020202 - negative * 0x02020202)
    return code, scale, tl.zeros_like(scale)
