// Products of tiers with an instruction that adds four of them in 32 bits: exact for all codes.
#include <utility>

#include "../panels.h"

namespace diffpress::DIFFPRESS_TIER {
namespace {

Integers add_products(Integers sum, Integers codes, Integers weights) {
  return (Integers)dot((Register)sum, (Register)codes, (Register)weights);
}

template <int ROWS>
void multiply_rows(const uint8_t* const* rows, const int32_t* offsets, const Panel& panel, int32_t* sums) {
  Integers left[ROWS], right[ROWS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) left[r] = right[r] = Integers{};
  const int8_t* weights = panel.weights.data();
  for (int64_t q = 0, count = panel.quads(); q < count; ++q, weights += 4 * kPanel) {
    const Integers first = load<Integers>(weights), second = load<Integers>(weights + 4 * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const Integers codes = all(load<int32_t>(rows[r] + offsets[q]));
      left[r] = add_products(left[r], codes, first);
      right[r] = add_products(right[r], codes, second);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    store(sums + r * kPanel, left[r]);
    store(sums + r * kPanel + kLanes, right[r]);
  }
}

template <int... ROWS>
void multiply_one_of(std::integer_sequence<int, ROWS...>, const uint8_t* const* rows, int64_t count,
                     const int32_t* offsets, const Panel& panel, int32_t* sums) {
  constexpr void (*kMultiply[])(const uint8_t* const*, const int32_t*, const Panel&, int32_t*) = {multiply_rows<ROWS + 1>...};
  kMultiply[count - 1](rows, offsets, panel, sums);
}

}  // namespace

void prepare(Panel&, int64_t) {}

void multiply(const uint8_t* const* rows, int64_t count, const int32_t* offsets, const Panel& panel, int32_t* sums) {
  multiply_one_of(std::make_integer_sequence<int, kTile>(), rows, count, offsets, panel, sums);
}

}  // namespace diffpress::DIFFPRESS_TIER
