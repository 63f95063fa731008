// Code books of the IQ and MXFP4 formats, in the form the kernels look them up.
//
// Values: the gguf package's `quants` module (grid_hex, grid_map, kvalues). A grid entry of eight
// weights is two little-endian words of four int8; one of four weights is one word.
#pragma once
#include <cstdint>

namespace hybrid {

extern const uint32_t kGridIQ2XXS[256 * 2];   // magnitudes 8, 25, 43
extern const uint32_t kGridIQ2XS[512 * 2];
extern const uint32_t kGridIQ2S[1024 * 2];
extern const uint32_t kGridIQ3XXS[256];       // magnitudes 4 ... 62
extern const uint32_t kGridIQ3S[512];         // magnitudes 1 ... 15
extern const uint32_t kGridIQ1S[2048 * 2];    // eight times -1, 0, 1

// The same magnitudes as codes 0, 1 ... in two planes of bytes, for lookups by byte permutes: 2 bits for each of
// four columns (IQ2), or a nibble for each of two (IQ3).
template <int kEntries>
struct alignas(64) Planes {
  uint8_t bytes[2][kEntries];
};
extern const Planes<256> kPlanesIQ2XXS;
extern const Planes<512> kPlanesIQ2XS;
extern const Planes<1024> kPlanesIQ2S;
extern const Planes<256> kPlanesIQ3XXS;
extern const Planes<512> kPlanesIQ3S;

// Trits of a byte (formats_plain.inc): 0-3 as fields of 2 bits, and 4.
struct alignas(64) TritTables {
  uint8_t four[256], fifth[256];
};
extern const TritTables kTrits;

extern const int8_t kValuesIQ4NL[16];
extern const int8_t kBiasedIQ4NL[16];  // these as bytes 128 larger
extern const int8_t kValuesMXFP4[16];  // twice the e2m1 values, plus 12

}  // namespace hybrid
