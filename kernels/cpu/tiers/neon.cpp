// Products of aarch64 without dot products: as many quads as fit are summed in 16 bits, two where weights have 8 bits and more
// where they have fewer, and then in 32.
#include "../panels.h"

namespace diffpress::DIFFPRESS_TIER {
namespace {

constexpr int64_t kLargestSum = 32767;
constexpr int64_t kLargestCode = 128;  // a lane of 16 bits takes one product of a quad
constexpr int kRowsInRun = 3;  // as their sums in 16 and in 32 bits fill the registers
constexpr int kHalves = 2 * kRegisters;  // a product of eight bytes fills a register

template <int ROWS, bool FIRST>
inline __attribute__((always_inline)) void add_quad(const uint8_t* const* rows, int32_t offset, const int8_t* from,
                                                    int16x8_t (&sums)[ROWS][kHalves]) {
  int8x8_t weights[kHalves];
#pragma GCC unroll 4
  for (int i = 0; i < kHalves; ++i) weights[i] = vld1_s8(from + 8 * i);
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; ++r) {
    const int8x8_t codes = vreinterpret_s8_s32(vdup_n_s32(load<int32_t>(rows[r] + offset)));
#pragma GCC unroll 4
    for (int i = 0; i < kHalves; ++i) {
      if constexpr (FIRST) sums[r][i] = vmull_s8(codes, weights[i]);
      else sums[r][i] = vmlal_s8(sums[r][i], codes, weights[i]);
    }
  }
}

template <int ROWS>
void multiply_rows(const uint8_t* const* rows, const int32_t* offsets, const Panel& panel, int32_t* sums) {
  int32x4_t total[ROWS][kHalves];  // two of each output
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kHalves; ++i) total[r][i] = vdupq_n_s32(0);
  }
  const int8_t* weights = panel.weights.data();
  for (int64_t q = 0, count = panel.quads(); q < count;) {
    const int64_t end = std::min(q + panel.run, count);
    int16x8_t in_16_bits[ROWS][kHalves];
    add_quad<ROWS, true>(rows, offsets[q], weights, in_16_bits);
    for (++q, weights += 4 * kPanel; q < end; ++q, weights += 4 * kPanel) {
      add_quad<ROWS, false>(rows, offsets[q], weights, in_16_bits);
    }
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kHalves; ++i) total[r][i] = vpadalq_s16(total[r][i], in_16_bits[r][i]);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < kRegisters; ++i) {
      vst1q_s32(sums + r * kPanel + i * kLanes, vpaddq_s32(total[r][2 * i], total[r][2 * i + 1]));
    }
  }
}

constexpr void (*kMultiply[kRowsInRun])(const uint8_t* const*, const int32_t*, const Panel&, int32_t*) = {
    multiply_rows<1>, multiply_rows<2>, multiply_rows<3>};

}  // namespace

void prepare(Panel& panel, int64_t) {
  int64_t most = 1;
  for (const int8_t weight : panel.weights) most = std::max<int64_t>(most, std::abs(weight));
  panel.run = kLargestSum / (kLargestCode * most);
}

void multiply(const uint8_t* const* rows, int64_t count, const int32_t* offsets, const Panel& panel, int32_t* sums) {
  for (int64_t r = 0; r < count; r += kRowsInRun) {
    kMultiply[std::min<int64_t>(kRowsInRun, count - r) - 1](rows + r, offsets, panel, sums + r * kPanel);
  }
}

}  // namespace diffpress::DIFFPRESS_TIER
