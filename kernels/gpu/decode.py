"""Device functions that decode GGUF blocks held in planes, one for each format.

A *unit* is what 32 bytes of a format's codes plane hold: 32 columns of Q8_0, 64 of the formats with 4 bits
there, 128 of those with 2. It is two halves ``h`` of four words ``i``; a word holds in each of its ``parts``
the codes of four columns, one a byte, and the four words of a half are 16 columns in a row, which share
their scale:

    code word (unit, part, h, i)  <->  columns 16 * half(unit, part, h) + 4 * i + (0, 1, 2, 3) of the row

``half_*`` below are those orders. Counting units through the whole matrix (``g = row * units + unit``)
addresses blocks too, because rows are whole blocks and whole units.

``decode_*(codes, high, scales, head, g, h, ok, P)`` takes the planes of `formats`, ``g`` and the condition
``ok`` as ``[rows, units, 1]`` and ``h`` as ``[1, 1, 2]``. It returns the code words of part ``P`` (int32
``[rows, units, 2, 4]``), and scale and minimum (float32, ``[..., 1]`` or ``[..., 2]``): a weight is ``scale
* (code - OFFSET) - minimum``. Where rows * units * 2 is at most the number of threads, a thread loads
exactly the scales it uses, and nothing passes through shared memory.

Block layouts: the gguf package's `quants` module.
"""

from __future__ import annotations

import triton
import triton.language as tl
from hybrid.kernels.gpu.target import INTERPRETED

PLAIN = tl.constexpr(INTERPRETED)


@triton.jit
def dot4(a, b, c):
    """``c`` plus the four products of signed bytes of words ``a`` and ``b``."""
    if PLAIN:
        for shift in tl.static_range(24, -1, -8):
            c += ((a << shift) >> 24) * ((b << shift) >> 24)
        return c
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def byte_of(word, B: tl.constexpr):
    """Signed byte ``B`` of a word, as float32."""
    return ((word << (24 - 8 * B)) >> 24).to(tl.float32)


@triton.jit
def lookup_iq4(q):
    """The int8 values of four indices of IQ4's table, one index in the low half of each byte."""
    if PLAIN:
        out = q * 0
        for b in tl.static_range(4):
            index = (q >> (8 * b)) & 15
            # The table as bytes of two words of 64 bits.
            low, high = -0x091522304052677F, 0x7159453526190D01
            value = (tl.where(index < 8, low, high) >> ((index & 7) * 8).to(tl.int64)) & 255
            out |= value.to(tl.int32) << (8 * b)
        return out
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 n, i, m, lo, hi;
            shr.u32 n, $1, 4;
            or.b32 n, n, $1;
            prmt.b32 n, n, n, 0x0020;
            and.b32 i, n, 0x7777;
            prmt.b32 lo, 0xBFAD9881, 0xF6EADDCF, i;
            prmt.b32 hi, 0x26190D01, 0x71594535, i;
            shr.u32 m, n, 1;
            and.b32 m, m, 0x4444;
            or.b32 m, m, 0x3210;
            prmt.b32 $0, lo, hi, m;
            }""",
            "=r,r",
            [q],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def spread_bits(nibble):
    """Four bits to bit 4 of four bytes."""
    return ((nibble & 1) << 4) | ((nibble & 2) << 11) | ((nibble & 4) << 18) | ((nibble & 8) << 25)


# --- orders of columns ---


@triton.jit
def half_straight(unit, P: tl.constexpr, h):
    return 2 * unit + h


@triton.jit
def half_32(unit, P: tl.constexpr, h):
    return 4 * unit + 2 * h + P


@triton.jit
def half_64(unit, P: tl.constexpr, h):
    return 4 * unit + 2 * P + h


@triton.jit
def half_q6_k(unit, P: tl.constexpr, h):
    return 8 * (unit // 2) + 4 * P + 2 * (unit % 2) + h


@triton.jit
def half_128(unit, P: tl.constexpr, h):
    return 8 * unit + 2 * P + h


@triton.jit
def four_words(plane, at, ok):
    """Words ``at`` to ``at + 3``: ``[rows, units, 2] -> [rows, units, 2, 4]``."""
    i = tl.arange(0, 4)[None, None, None, :]
    return tl.load(plane + at[:, :, :, None] + i, mask=ok[:, :, :, None], other=0)


# --- blocks of 32 ---


@triton.jit
def decode_q8_0(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    scale = tl.load(head + g, mask=ok, other=0.0).to(tl.float32)
    return four_words(codes, 8 * g + 4 * h, ok), scale, tl.zeros_like(scale)


@triton.jit
def decode_q4_0(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    scale = tl.load(head + 2 * g + h, mask=ok, other=0.0).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h, ok)
    return (q >> (4 * P)) & 0x0F0F0F0F, scale, tl.zeros_like(scale)


@triton.jit
def decode_q5_0(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    scale = tl.load(head + 2 * g + h, mask=ok, other=0.0).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h, ok)
    fifth = (tl.load(high + 2 * g + h, mask=ok, other=0) >> (16 * P))[:, :, :, None]
    bits = spread_bits(fifth >> (4 * tl.arange(0, 4)[None, None, None, :]))
    return ((q >> (4 * P)) & 0x0F0F0F0F) | bits, scale, tl.zeros_like(scale)


@triton.jit
def decode_iq4_nl(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    scale = tl.load(head + 2 * g + h, mask=ok, other=0.0).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h, ok)
    return lookup_iq4((q >> (4 * P)) & 0x0F0F0F0F), scale, tl.zeros_like(scale)


# --- blocks of 256 ---


@triton.jit
def decode_iq4_xs(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    block, pair = g // 4, g % 4
    d = tl.load(head + block, mask=ok, other=0.0).to(tl.float32)
    low = tl.load(scales + g, mask=ok, other=0).to(tl.int32) >> (4 * h)
    top = tl.load(high + block, mask=ok, other=0).to(tl.int32) >> (4 * pair + 2 * h)
    scale = d * (((low & 15) | ((top & 3) << 4)) - 32).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h, ok)
    return lookup_iq4((q >> (4 * P)) & 0x0F0F0F0F), scale, tl.zeros_like(scale)


@triton.jit
def scales_of_6_bits(scales, head, block, j, ok):
    """Scale and minimum ``j`` of a Q4_K or Q5_K block: 8 of each in 12 bytes."""
    at = scales + 12 * block + (j & 3)
    a = tl.load(at, mask=ok, other=0).to(tl.int32)
    b = tl.load(at + 4, mask=ok, other=0).to(tl.int32)
    c = tl.load(at + 8, mask=ok, other=0).to(tl.int32)
    scale = tl.where(j < 4, a & 63, (c & 15) | ((a >> 6) << 4))
    minimum = tl.where(j < 4, b & 63, (c >> 4) | ((b >> 6) << 4))
    d = tl.load(head + 2 * block, mask=ok, other=0.0).to(tl.float32)
    dmin = tl.load(head + 2 * block + 1, mask=ok, other=0.0).to(tl.float32)
    return d * scale.to(tl.float32), dmin * minimum.to(tl.float32)


@triton.jit
def decode_q4_k(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    scale, minimum = scales_of_6_bits(scales, head, g // 4, 2 * (g % 4) + P, ok)
    q = four_words(codes, 8 * g + 4 * h, ok)
    return (q >> (4 * P)) & 0x0F0F0F0F, scale, minimum


@triton.jit
def decode_q5_k(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    j = 2 * (g % 4) + P
    scale, minimum = scales_of_6_bits(scales, head, g // 4, j, ok)
    q = four_words(codes, 8 * g + 4 * h, ok)
    fifth = four_words(high, 8 * (g // 4) + 4 * h, ok) >> j[:, :, :, None]
    return ((q >> (4 * P)) & 0x0F0F0F0F) | ((fifth & 0x01010101) << 4), scale, minimum


@triton.jit
def decode_q6_k(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    # 64 bytes of ql are two units, the sides of 128 columns; they share 32 bytes of qh.
    pair, side = g // 2, g % 2
    raw = tl.load(scales + 8 * pair + 4 * P + 2 * side + h, mask=ok, other=0).to(tl.int8, bitcast=True)
    scale = tl.load(head + g // 4, mask=ok, other=0.0).to(tl.float32) * raw.to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h, ok)
    top = four_words(high, 8 * pair + 4 * h, ok) >> (4 * P + 2 * side)[:, :, :, None]
    return ((q >> (4 * P)) & 0x0F0F0F0F) | ((top & 0x03030303) << 4), scale, tl.zeros_like(scale)


@triton.jit
def decode_q2_k(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    both = tl.load(scales + 8 * g + 2 * P + h, mask=ok, other=0).to(tl.int32)
    d = tl.load(head + 2 * (g // 2), mask=ok, other=0.0).to(tl.float32)
    dmin = tl.load(head + 2 * (g // 2) + 1, mask=ok, other=0.0).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h, ok)
    return (q >> (2 * P)) & 0x03030303, d * (both & 15).to(tl.float32), dmin * (both >> 4).to(tl.float32)


@triton.jit
def decode_q3_k(codes, high, scales, head, g, h, ok, P: tl.constexpr):
    # Scale j of 16: 4 low bits in bytes 0-7, two scales to a byte; 2 high ones in bytes 8-11, four to a byte.
    block, side = g // 2, g % 2
    low = tl.load(scales + 12 * block + 2 * P + h, mask=ok, other=0).to(tl.int32) >> (4 * side)
    top = tl.load(scales + 12 * block + 8 + 2 * (P % 2) + h, mask=ok, other=0).to(tl.int32)
    raw = ((low & 15) | (((top >> (4 * side + 2 * (P // 2))) & 3) << 4)) - 32
    scale = tl.load(head + block, mask=ok, other=0.0).to(tl.float32) * raw.to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h, ok)
    third = four_words(high, 8 * block + 4 * h, ok) >> (4 * side + P)[:, :, :, None]
    return ((q >> (2 * P)) & 0x03030303) | ((third & 0x01010101) << 2), scale, tl.zeros_like(scale)
