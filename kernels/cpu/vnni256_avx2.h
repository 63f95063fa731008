// The instructions of vnni256.h in AVX2, so that the kernels of avxvnni can be tested on any such host.
#pragma once
#include <immintrin.h>

namespace {

inline __m256i vnni_dpwssd(__m256i acc, __m256i a, __m256i b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
// vpmaddubsw would saturate: even and odd bytes are widened first.
inline __m256i vnni_dpbusd(__m256i acc, __m256i u, __m256i s) {
  const __m256i even_u = _mm256_and_si256(u, _mm256_set1_epi16(255)), odd_u = _mm256_srli_epi16(u, 8);
  const __m256i even_s = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8), odd_s = _mm256_srai_epi16(s, 8);
  return vnni_dpwssd(vnni_dpwssd(acc, even_u, even_s), odd_u, odd_s);
}

}  // namespace
