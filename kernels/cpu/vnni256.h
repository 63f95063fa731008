// VNNI on 256 bits as VEX instructions.
#pragma once
#include <immintrin.h>

namespace {

// acc + in each lane the products of four unsigned bytes of u and signed bytes of s
inline __m256i vnni_dpbusd(__m256i acc, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
// acc + in each lane the products of two int16
inline __m256i vnni_dpwssd(__m256i acc, __m256i a, __m256i b) { return _mm256_dpwssd_avx_epi32(acc, a, b); }

}  // namespace
