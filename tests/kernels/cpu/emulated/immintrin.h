// The instructions beyond AVX2 that our tiers name, in C++ as Intel's guide describes them: a processor with AVX2 runs these
// tiers' own sources, slowly. GCC alone hands registers of 64 bytes around where it may not use them.
#pragma once

#include_next <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

using Bytes = uint8_t __attribute__((vector_size(16)));
using Shorts = uint16_t __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(64)));

struct Floats {
  __m256 low, high;
};
struct Halves {
  __m128i low, high;
};

template <class Register>
Register dpbusd(Register sum, Register unsigned_bytes, Register signed_bytes) {
  uint8_t left[sizeof(Register)];
  int8_t right[sizeof(Register)];
  int32_t total[sizeof(Register) / 4];
  std::memcpy(left, &unsigned_bytes, sizeof(left));
  std::memcpy(right, &signed_bytes, sizeof(right));
  std::memcpy(total, &sum, sizeof(total));
  for (size_t i = 0; i < sizeof(Register); ++i) total[i / 4] += left[i] * right[i];
  std::memcpy(&sum, total, sizeof(total));
  return sum;
}

inline __m128i cvtepi32_epi8(__m512i value) {
  return same_bits<__m128i>(__builtin_convertvector(same_bits<Words>(value), Bytes));
}

inline __m256i cvtepi32_epi16(__m512i value) {
  return same_bits<__m256i>(__builtin_convertvector(same_bits<Words>(value), Shorts));
}

inline __m512i cvtepu16_epi32(__m256i value) {
  return same_bits<__m512i>(__builtin_convertvector(same_bits<Shorts>(value), Words));
}

inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  const Floats x = same_bits<Floats>(a), y = same_bits<Floats>(b), z = same_bits<Floats>(c);
  return same_bits<__m512>(Floats{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
}

inline __m512 cvtph_ps(__m256i value) {
  const Halves halves = same_bits<Halves>(value);
  return same_bits<__m512>(Floats{_mm256_cvtph_ps(halves.low), _mm256_cvtph_ps(halves.high)});
}

inline __m256i to_nearest_half(__m512 value) {
  const Floats floats = same_bits<Floats>(value);
  return same_bits<__m256i>(Halves{_mm256_cvtps_ph(floats.low, _MM_FROUND_TO_NEAREST_INT),
                                   _mm256_cvtps_ph(floats.high, _MM_FROUND_TO_NEAREST_INT)});
}

}  // namespace emulated

#define _mm256_dpbusd_avx_epi32 emulated::dpbusd<__m256i>
#define _mm512_dpbusd_epi32 emulated::dpbusd<__m512i>
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(value, to_nearest) emulated::to_nearest_half(value)
