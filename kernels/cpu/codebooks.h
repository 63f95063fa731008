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

extern const int8_t kValuesIQ4NL[16];
extern const int8_t kValuesMXFP4[16];  // twice the e2m1 values

}  // namespace hybrid
