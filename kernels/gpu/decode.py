"""Device functions that decode GGUF blocks held in planes, one for each format.

A *unit* is what 32 bytes of a format's codes plane hold: 32 columns of Q8_0, 64 of the formats with 4 bits
there, 128 of those with 2. It is two halves ``h`` of four words ``i``; a word holds in each of its ``parts``
the codes of four columns, one a byte, and the four words of a half are 16 columns in a row, which share
their scale:

    code word (unit, part, h, i)  <->  columns 16 * half(unit, part, h) + 4 * i + (0, 1, 2, 3) of the row

``half_*`` below are those orders. Counting units through the whole matrix (``g = row * units + unit``)
addresses blocks too, because rows are whole blocks and whole units.

``decode_*(codes, high, scales, head, table, g, h, P)`` takes the planes of `formats`, a code book or none,
``g`` as ``[rows, units, 1]`` and ``h`` as ``[1, 1, 2]``; there is such a unit: who has none repeats the last
one of a row and gives it no weight. It returns the code words of part ``P`` (int32 ``[rows, units, 2, 4]``),
and scale and minimum (float32, ``[..., 1]`` or ``[..., 2]``): a weight is ``scale * (code - OFFSET) -
minimum``. Where rows * units * 2 is at most the number of threads, a thread loads exactly the scales it uses,
and nothing passes through shared memory.

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
def byte_permute(a, b, selector):
    """Bytes of ``a`` (0-3) and ``b`` (4-7) by the low four nibbles of ``selector``, each below 8."""
    if PLAIN:
        out = selector * 0 + a * 0
        for i in tl.static_range(4):
            place = (selector >> (4 * i)) & 7
            word = tl.where(place < 4, a, b)
            out |= ((word >> ((place & 3) * 8)) & 255) << (8 * i)
        return out
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def lookup_16(q, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """The bytes of a table of 16, the words A to D, at the low (P 0) or high (P 1) nibbles of the bytes of
    ``q``.

    Both parts share all but the last step.
    """
    a, b, c, d = q * 0 + A, q * 0 + B, q * 0 + C, q * 0 + D
    index = q & 0x77777777
    upper = ((q >> 1) & 0x44444444) | 0x32103210
    first = byte_permute(byte_permute(a, b, index), byte_permute(c, d, index), upper)
    index, upper = index >> 16, upper >> 16
    second = byte_permute(byte_permute(a, b, index), byte_permute(c, d, index), upper)
    return byte_permute(first, second, q * 0 + (0x7531 if P else 0x6420))


@triton.jit
def lookup_iq4(q, P: tl.constexpr):
    return lookup_16(q, -0x4052677F, -0x09152231, 0x26190D01, 0x71594535, P)


@triton.jit
def lookup_mxfp4(q, P: tl.constexpr):
    """Twice the numbers of e2m1."""
    return lookup_16(q, 0x03020100, 0x0C080604, -0x02010100, -0x0B070504, P)


@triton.jit
def one_and_more(word, FIELD: tl.constexpr):
    """1 plus a fraction whose highest bits are those of ``word`` at FIELD; converting takes longer."""
    return ((word & FIELD) | 0x3F800000).to(tl.float32, bitcast=True)


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
    return 8 * (unit >> 1) + 4 * P + 2 * (unit & 1) + h


@triton.jit
def half_128(unit, P: tl.constexpr, h):
    return 8 * unit + 2 * P + h


@triton.jit
def four_words(plane, at):
    """Words ``at`` to ``at + 3``: ``[rows, units, 2] -> [rows, units, 2, 4]``."""
    i = tl.arange(0, 4)[None, None, None, :]
    return tl.load(plane + at[:, :, :, None] + i)


# --- blocks of 32 ---


@triton.jit
def decode_q8_0(codes, high, scales, head, table, g, h, P: tl.constexpr):
    scale = tl.load(head + g).to(tl.float32)
    return four_words(codes, 8 * g + 4 * h), scale, tl.zeros_like(scale)


@triton.jit
def decode_q4_0(codes, high, scales, head, table, g, h, P: tl.constexpr):
    scale = tl.load(head + 2 * g + h).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h)
    return (q >> (4 * P)) & 0x0F0F0F0F, scale, tl.zeros_like(scale)


@triton.jit
def codes_q5(codes, high, g, h, P: tl.constexpr):
    q = four_words(codes, 8 * g + 4 * h)
    fifth = (tl.load(high + 2 * g + h) >> (16 * P))[:, :, :, None]
    bits = spread_bits(fifth >> (4 * tl.arange(0, 4)[None, None, None, :]))
    return ((q >> (4 * P)) & 0x0F0F0F0F) | bits


@triton.jit
def decode_q5_0(codes, high, scales, head, table, g, h, P: tl.constexpr):
    scale = tl.load(head + 2 * g + h).to(tl.float32)
    return codes_q5(codes, high, g, h, P), scale, tl.zeros_like(scale)


@triton.jit
def pair_of_halves(head, block):
    """Scale, and the negative of what is added: a minimum is subtracted."""
    scale = tl.load(head + 2 * block).to(tl.float32)
    return scale, -tl.load(head + 2 * block + 1).to(tl.float32)


@triton.jit
def decode_q4_1(codes, high, scales, head, table, g, h, P: tl.constexpr):
    scale, minimum = pair_of_halves(head, 2 * g + h)
    q = four_words(codes, 8 * g + 4 * h)
    return (q >> (4 * P)) & 0x0F0F0F0F, scale, minimum


@triton.jit
def decode_q5_1(codes, high, scales, head, table, g, h, P: tl.constexpr):
    scale, minimum = pair_of_halves(head, 2 * g + h)
    return codes_q5(codes, high, g, h, P), scale, minimum


@triton.jit
def decode_mxfp4(codes, high, scales, head, table, g, h, P: tl.constexpr):
    e = tl.load(head + 2 * g + h).to(tl.int32)
    # 2^(e - 128), because codes are twice the numbers; the two smallest are denormal.
    scale = tl.where(e < 2, 0x00200000 << (e & 1), (e - 1) << 23).to(tl.float32, bitcast=True)
    q = four_words(codes, 8 * g + 4 * h)
    return lookup_mxfp4(q, P), scale, tl.zeros_like(scale)


@triton.jit
def decode_iq4_nl(codes, high, scales, head, table, g, h, P: tl.constexpr):
    scale = tl.load(head + 2 * g + h).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h)
    return lookup_iq4(q, P), scale, tl.zeros_like(scale)


# --- blocks of 256 ---


@triton.jit
def decode_iq4_xs(codes, high, scales, head, table, g, h, P: tl.constexpr):
    block, pair = (g >> 2), (g & 3)
    d = tl.load(head + block).to(tl.float32)
    low = tl.load(scales + g).to(tl.int32) >> (4 * h)
    top = tl.load(high + block).to(tl.int32) >> (4 * pair + 2 * h)
    scale = d * (((low & 15) | ((top & 3) << 4)) - 32).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h)
    return lookup_iq4(q, P), scale, tl.zeros_like(scale)


@triton.jit
def scales_of_6_bits(scales, head, block, j):
    """Scale and minimum ``j`` of a Q4_K or Q5_K block: 8 of each in 12 bytes."""
    at = scales + 12 * block + (j & 3)
    a = tl.load(at).to(tl.int32)
    b = tl.load(at + 4).to(tl.int32)
    c = tl.load(at + 8).to(tl.int32)
    scale = tl.where(j < 4, a & 63, (c & 15) | ((a >> 6) << 4))
    minimum = tl.where(j < 4, b & 63, (c >> 4) | ((b >> 6) << 4))
    d = tl.load(head + 2 * block).to(tl.float32)
    dmin = tl.load(head + 2 * block + 1).to(tl.float32)
    return d * scale.to(tl.float32), dmin * minimum.to(tl.float32)


@triton.jit
def decode_q4_k(codes, high, scales, head, table, g, h, P: tl.constexpr):
    scale, minimum = scales_of_6_bits(scales, head, (g >> 2), 2 * (g & 3) + P)
    q = four_words(codes, 8 * g + 4 * h)
    return (q >> (4 * P)) & 0x0F0F0F0F, scale, minimum


@triton.jit
def decode_q5_k(codes, high, scales, head, table, g, h, P: tl.constexpr):
    j = 2 * (g & 3) + P
    scale, minimum = scales_of_6_bits(scales, head, (g >> 2), j)
    q = four_words(codes, 8 * g + 4 * h)
    fifth = four_words(high, 8 * (g >> 2) + 4 * h) >> j[:, :, :, None]
    return ((q >> (4 * P)) & 0x0F0F0F0F) | ((fifth & 0x01010101) << 4), scale, minimum


@triton.jit
def decode_q6_k(codes, high, scales, head, table, g, h, P: tl.constexpr):
    # 64 bytes of ql are two units, the sides of 128 columns; they share 32 bytes of qh.
    pair, side = (g >> 1), (g & 1)
    raw = tl.load(scales + 8 * pair + 4 * P + 2 * side + h).to(tl.int8, bitcast=True)
    scale = tl.load(head + (g >> 2)).to(tl.float32) * raw.to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h)
    top = four_words(high, 8 * pair + 4 * h) >> (4 * P + 2 * side)[:, :, :, None]
    return ((q >> (4 * P)) & 0x0F0F0F0F) | ((top & 0x03030303) << 4), scale, tl.zeros_like(scale)


@triton.jit
def decode_q2_k(codes, high, scales, head, table, g, h, P: tl.constexpr):
    both = tl.load(scales + 8 * g + 2 * P + h).to(tl.int32)
    d = tl.load(head + 2 * (g >> 1)).to(tl.float32)
    dmin = tl.load(head + 2 * (g >> 1) + 1).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h)
    return (q >> (2 * P)) & 0x03030303, d * (both & 15).to(tl.float32), dmin * (both >> 4).to(tl.float32)


@triton.jit
def decode_q3_k(codes, high, scales, head, table, g, h, P: tl.constexpr):
    # Scale j of 16: 4 low bits in bytes 0-7, two scales to a byte; 2 high ones in bytes 8-11, four to a byte.
    block, side = (g >> 1), (g & 1)
    low = tl.load(scales + 12 * block + 2 * P + h).to(tl.int32) >> (4 * side)
    top = tl.load(scales + 12 * block + 8 + 2 * (P % 2) + h).to(tl.int32)
    raw = ((low & 15) | (((top >> (4 * side + 2 * (P // 2))) & 3) << 4)) - 32
    scale = tl.load(head + block).to(tl.float32) * raw.to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h)
    third = four_words(high, 8 * block + 4 * h) >> (4 * side + P)[:, :, :, None]
    return ((q >> (2 * P)) & 0x03030303) | ((third & 0x01010101) << 2), scale, tl.zeros_like(scale)


@triton.jit
def decode_tq2_0(codes, high, scales, head, table, g, h, P: tl.constexpr):
    scale = tl.load(head + (g >> 1)).to(tl.float32)
    q = four_words(codes, 8 * g + 4 * h)
    return (q >> (2 * P)) & 0x03030303, scale, tl.zeros_like(scale)
