// x86 with AVX2, FMA and F16C: most desktops and laptops. What differs from tier to tier, beside its products.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace diffpress::DIFFPRESS_TIER {

using Register = __m256i;
constexpr int64_t kLanes = 8;
// Rows that are computed together: with two registers each, 12 of 16.
constexpr int64_t kTile = 6;
// Products are of unsigned with signed bytes: codes on the left are kept so much higher than they are.
constexpr int64_t kOffset = 128;

// The lowest bytes of all lanes, for which compilers find no short way.
inline void store_low_bytes(__m256i value, void* to) {
  const __m256i first = _mm256_set1_epi32(0x0C080400);
  const __m256i quads = _mm256_shuffle_epi8(value, first);
  const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
  _mm_storel_epi64(static_cast<__m128i*>(to), bytes);
}

inline void store_low_halves(__m256i value, void* to) {
  const __m256i masked = _mm256_and_si256(value, _mm256_set1_epi32(0xFFFF));
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(masked, masked), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(halves));
}

inline auto widened(const uint16_t* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline auto fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

inline auto from_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline void to_half(__m256 value, uint16_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace diffpress::DIFFPRESS_TIER
