// The weights of a few outputs, in the order in which they are multiplied.
#include <immintrin.h>

#include <algorithm>

#include "products.h"

namespace diffpress {
namespace {

constexpr int64_t kLanes = 16;  // numbers of four bytes in a register
constexpr int64_t kAhead = 512;  // bytes that are asked for before they are needed

uint64_t first_bytes(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// How a register of weights [channels, taps] becomes lanes of four channels of one tap each: the taps of the first four
// channels, then those of the next.
struct Order {
  int64_t taps, quads;
  __m512i place;

  explicit Order(int64_t count) : taps(std::min(count, kLanes)), quads(kLanes / taps) {
    alignas(64) uint8_t places[64] = {};
    for (int64_t lane = 0; lane < quads * taps; ++lane) {
      for (int64_t i = 0; i < 4; ++i) {
        places[4 * lane + i] = static_cast<uint8_t>((4 * (lane / taps) + i) * taps + lane % taps);
      }
    }
    place = _mm512_load_si512(places);
  }

  __m512i operator()(const int8_t* weights, int64_t channels) const {
    _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead), _MM_HINT_T0);
    return _mm512_permutexvar_epi8(place, _mm512_maskz_loadu_epi8(first_bytes(channels * taps), weights));
  }
};

// The same for four channels of a kernel that has more taps than a register has lanes.
__m512i collect(const int8_t* weights, int64_t channels, int64_t taps, int64_t lanes) {
  alignas(64) int8_t found[64] = {};
  for (int64_t i = 0; i < std::min<int64_t>(channels, 4); ++i) {
    for (int64_t lane = 0; lane < lanes; ++lane) found[4 * lane + i] = weights[i * taps + lane];
  }
  return _mm512_load_si512(found);
}

// 16 rows of 16 numbers, turned over.
void transpose(__m512i (&row)[kLanes]) {
  __m512i pair[kLanes], four[kLanes];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm512_unpacklo_epi64(pair[i + j], pair[i + j + 2]);
      four[i + 2 * j + 1] = _mm512_unpackhi_epi64(pair[i + j], pair[i + j + 2]);
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(four[j], four[4 + j], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(four[j], four[4 + j], 0xDD);
    const __m512i lower_even = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0x88);
    const __m512i lower_odd = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0xDD);
    row[j] = _mm512_shuffle_i32x4(even, lower_even, 0x88);
    row[8 + j] = _mm512_shuffle_i32x4(even, lower_even, 0xDD);
    row[4 + j] = _mm512_shuffle_i32x4(odd, lower_odd, 0x88);
    row[12 + j] = _mm512_shuffle_i32x4(odd, lower_odd, 0xDD);
  }
}

// The half of a panel that fills one register, 16 outputs; `sums` gets the sum of each output's weights.
void pack_half(const Weights& weights, const Order& order, int64_t first, int8_t* panel, int32_t* sums) {
  const int64_t taps = weights.taps, count = quads(weights.channels), outputs = weights.outputs - first;
  const int8_t* codes = weights.codes + first * weights.channels * taps;
  __m512i total = _mm512_setzero_si512();
  for (int64_t quad = 0; quad < count; quad += order.quads) {
    for (int64_t tap = 0; tap < taps; tap += order.taps) {
      const int64_t channels = weights.channels - 4 * quad, lanes = std::min(order.taps, taps - tap);
      __m512i row[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int8_t* from = codes + (i * weights.channels + 4 * quad) * taps + tap;
        if (i >= outputs) row[i] = _mm512_setzero_si512();
        else row[i] = taps > kLanes ? collect(from, channels, taps, lanes) : order(from, channels);
      }
      transpose(row);
      for (int64_t lane = 0; lane < order.quads * lanes && quad + lane / lanes < count; ++lane) {
        total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), row[lane]);
        const int64_t at = (tap + lane % lanes) * count + quad + lane / lanes;
        _mm512_storeu_si512(panel + at * kPanel * 4, row[lane]);
      }
    }
  }
  _mm512_storeu_si512(sums, total);
}

}  // namespace

void pack_panel(const Weights& weights, int64_t first, int8_t* panel, int32_t* sums) {
  const Order order(weights.taps);
  pack_half(weights, order, first, panel, sums);
  pack_half(weights, order, first + kLanes, panel + 4 * kLanes, sums + kLanes);
}

}  // namespace diffpress
