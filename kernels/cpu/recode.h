// IQ1 blocks with their code book taken out: each weight as a trit, in bytes of five.
//
// IQ1_S and IQ1_M name eight weights of -1, 0, 1 by eleven bits, an index into 2,048 entries that no register file
// holds. Packed, they are trits as TQ1_0 has them, at 15 % and 14 % more bytes; that decodes several times faster on
// every ISA. It loses nothing: the entries are distinct, so that trits give the index back.
//
// The 256 trits of a row are 13 words of 4 bytes, [13][16 rows][4]. Byte b of words 0-7 holds columns 32 * n + 4 * w + b
// for n < 5, of words 8-11 columns 160 + 16 * n + 4 * (w - 8) + b, of word 12 columns 240 + 4 * n + b for n < 4. Trit n of a
// byte is ((byte * 3^n mod 256) * 3) >> 8, where byte = ceil(v * 256 / 243) for the number v of which trit 0 is the
// highest digit.
//
// IQ1_S: the fifth trit of byte b of word 12 is the sign bit of the delta of sub-block 4 + b. Then bytes [3][16 rows], of
// a row a number of 24 bits with the scale of sub-block s at bit 3 * s; 8 bytes with the sign bits of deltas
// 0-3 of row r in the low nibble of byte r and those of row 8 + r in its high nibble; d [16 rows][2].
// IQ1_M: one word with the sign bit of the delta of columns 8 * g ... at bit g; the eight bytes of scales, which
// hold d, as two words.
#pragma once
#include <cstdint>

#include "block_formats.h"

namespace hybrid {

// One row's K-block into the group's, of which `packed` is the start and where it has been zeroed; and back.
void recode_block(const FormatInfo& format, const uint8_t* block, int row, uint8_t* packed);
void restore_block(const FormatInfo& format, const uint8_t* packed, int row, uint8_t* block);

}  // namespace hybrid
