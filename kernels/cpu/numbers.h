// 16 numbers of any format in a register of float32, and back.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "layer.h"

namespace diffpress {

constexpr __mmask16 kAllLanes = 0xFFFF;

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? kAllLanes : static_cast<__mmask16>((1 << count) - 1);
}

inline __m512 load(const void* from, int64_t type, int64_t at, __mmask16 mask) {
  if (type == kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + at);
  if (type == kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Rounded half to even; the processor's own instruction would turn the smallest numbers to 0.
inline __m256i to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 no_number = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), no_number, 0x7FC0));
}

// Some processors take long to write some of a register's lanes.
inline void store(void* to, int64_t type, int64_t at, __mmask16 mask, __m512 value) {
  if (type == kFloat32) {
    float* target = static_cast<float*>(to) + at;
    return mask == kAllLanes ? _mm512_storeu_ps(target, value) : _mm512_mask_storeu_ps(target, mask, value);
  }
  uint16_t* target = static_cast<uint16_t*>(to) + at;
  const __m256i half = type == kFloat16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bfloat16(value);
  return mask == kAllLanes ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), half)
                           : _mm256_mask_storeu_epi16(target, mask, half);
}

inline void store_bytes(void* to, __mmask16 mask, __m512i value) {
  const __m128i bytes = _mm512_cvtepi32_epi8(value);
  return mask == kAllLanes ? _mm_storeu_si128(static_cast<__m128i*>(to), bytes) : _mm_mask_storeu_epi8(to, mask, bytes);
}

}  // namespace diffpress
