// x86 with AVX512-VNNI. What differs from tier to tier.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace diffpress::DIFFPRESS_TIER {

using Register = __m512i;
constexpr int64_t kLanes = 16;
// Rows that are computed together: with two registers each, 24 of 32.
constexpr int64_t kTile = 12;
// The instruction multiplies unsigned with signed bytes: codes on the left are kept so much higher than they are.
constexpr int64_t kOffset = 128;

inline __m512i dot(__m512i sum, __m512i codes, __m512i weights) { return _mm512_dpbusd_epi32(sum, codes, weights); }

// The lowest bytes of all lanes, for which compilers find no short way.
inline void store_low_bytes(__m512i value, void* to) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value));
}

inline void store_low_halves(__m512i value, void* to) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(value));
}

inline auto widened(const uint16_t* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline auto fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

inline auto from_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline void to_half(__m512 value, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace diffpress::DIFFPRESS_TIER
