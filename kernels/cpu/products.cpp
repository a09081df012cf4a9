#include "products.h"

#include <immintrin.h>

#include <cstring>

namespace diffpress {
namespace {

template <int ROWS>
void multiply_rows(const uint8_t* const* rows, const Stretches& stretches, const int8_t* panel, int32_t* sums) {
  __m512i left[ROWS], right[ROWS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) left[r] = right[r] = _mm512_setzero_si512();
  for (const int64_t start : stretches.start) {
    const uint8_t* at[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) at[r] = rows[r] + start;
    for (int64_t q = 0; q < stretches.quads; ++q, panel += 4 * kPanel) {
      const __m512i first = _mm512_loadu_si512(panel), second = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        int32_t quad;
        std::memcpy(&quad, at[r] + 4 * q, 4);
        const __m512i codes = _mm512_set1_epi32(quad);
        left[r] = _mm512_dpbusd_epi32(left[r], codes, first);
        right[r] = _mm512_dpbusd_epi32(right[r], codes, second);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    _mm512_storeu_si512(sums + r * kPanel, left[r]);
    _mm512_storeu_si512(sums + r * kPanel + 16, right[r]);
  }
}

using Multiply = void (*)(const uint8_t* const*, const Stretches&, const int8_t*, int32_t*);
constexpr Multiply kMultiply[kTile] = {
    multiply_rows<1>, multiply_rows<2>, multiply_rows<3>, multiply_rows<4>,  multiply_rows<5>,  multiply_rows<6>,
    multiply_rows<7>, multiply_rows<8>, multiply_rows<9>, multiply_rows<10>, multiply_rows<11>, multiply_rows<12>};

}  // namespace

void multiply(const uint8_t* const* rows, int64_t count, const Stretches& stretches, const int8_t* panel, int32_t* sums) {
  kMultiply[count - 1](rows, stretches, panel, sums);
}

}  // namespace diffpress
