// Products of aarch64's small matrices: two rows of eight codes by two outputs of eight weights at once, summed in 32 bits.
#include <array>
#include <utility>

#include "../panels.h"

namespace diffpress::DIFFPRESS_TIER {
namespace {

constexpr int kMatrices = kPanel / 2;  // of two outputs

int8x16_t two_rows(const uint8_t* first, const uint8_t* second, const int32_t* offsets) {
  const Integers codes = {load<int32_t>(first + offsets[0]), load<int32_t>(first + offsets[1]),
                          load<int32_t>(second + offsets[0]), load<int32_t>(second + offsets[1])};
  return (int8x16_t)codes;
}

// Two rows' sums of all outputs from their matrices, and products of the last quad if it has no other.
void store_rows(const int32x4_t* matrices, const uint8_t* const* rows, const int32_t* last, const int8_t* weights,
                int64_t count, int32_t* sums) {
  for (int i = 0; i < kRegisters; ++i) {
    const int64x2_t left = vreinterpretq_s64_s32(matrices[2 * i]), right = vreinterpretq_s64_s32(matrices[2 * i + 1]);
    const int64x2_t found[2] = {vzip1q_s64(left, right), vzip2q_s64(left, right)};
    for (int64_t r = 0; r < count; ++r) {
      Integers sum = (Integers)found[r];
      if (last) sum = dot(sum, all(load<int32_t>(rows[r] + *last)), load<Integers>(weights + i * 4 * kLanes));
      store(sums + r * kPanel + i * kLanes, sum);
    }
  }
}

template <int ROWS>
void multiply_rows(const uint8_t* const* rows, const int32_t* offsets, const Panel& panel, int32_t* sums) {
  constexpr int kPairs = (ROWS + 1) / 2;
  int32x4_t matrices[kPairs][kMatrices];
#pragma GCC unroll 6
  for (int p = 0; p < kPairs; ++p) {
#pragma GCC unroll 4
    for (int i = 0; i < kMatrices; ++i) matrices[p][i] = vdupq_n_s32(0);
  }
  const int8_t* from = panel.weights.data();
  const int32_t* end = offsets + panel.quads();
  for (; offsets + 2 <= end; offsets += 2, from += 8 * kPanel) {
    int8x16_t weights[kMatrices];
#pragma GCC unroll 4
    for (int i = 0; i < kMatrices; ++i) weights[i] = vld1q_s8(from + 16 * i);
#pragma GCC unroll 6
    for (int p = 0; p < kPairs; ++p) {
      const int8x16_t codes = two_rows(rows[2 * p], rows[std::min(2 * p + 1, ROWS - 1)], offsets);
#pragma GCC unroll 4
      for (int i = 0; i < kMatrices; ++i) matrices[p][i] = vmmlaq_s32(matrices[p][i], codes, weights[i]);
    }
  }
#pragma GCC unroll 6
  for (int p = 0; p < kPairs; ++p) {
    const int64_t count = std::min(2, ROWS - 2 * p);
    store_rows(matrices[p], rows + 2 * p, offsets < end ? offsets : nullptr, from, count, sums + 2 * p * kPanel);
  }
}

template <int... ROWS>
void multiply_one_of(std::integer_sequence<int, ROWS...>, const uint8_t* const* rows, int64_t count,
                     const int32_t* offsets, const Panel& panel, int32_t* sums) {
  constexpr void (*kMultiply[])(const uint8_t* const*, const int32_t*, const Panel&, int32_t*) = {multiply_rows<ROWS + 1>...};
  kMultiply[count - 1](rows, offsets, panel, sums);
}

}  // namespace

// Eight weights of an output beside each other, of two quads.
void prepare(Panel& panel, int64_t) {
  for (int64_t q = 0; q + 2 <= panel.quads(); q += 2) {
    int8_t* first = panel.weights.data() + q * 4 * kPanel;
    std::array<int32_t, 2 * kPanel> pairs;
    for (size_t i = 0; i < kPanel; ++i) {
      pairs[2 * i] = load<int32_t>(first + 4 * i);
      pairs[2 * i + 1] = load<int32_t>(first + 4 * (kPanel + i));
    }
    store(first, pairs);
  }
}

void multiply(const uint8_t* const* rows, int64_t count, const int32_t* offsets, const Panel& panel, int32_t* sums) {
  multiply_one_of(std::make_integer_sequence<int, kTile>(), rows, count, offsets, panel, sums);
}

}  // namespace diffpress::DIFFPRESS_TIER
