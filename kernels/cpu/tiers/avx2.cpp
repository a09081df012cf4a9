// Products where vpmaddubsw is what there is: it adds two of them in 16 bits, and would cut off what does not fit.
//
// Hence weights are parted when they are packed, so that no pair of them can exceed 16 bits whatever the codes are: what is
// too much is multiplied apart. Few pairs are: both weights have one sign and lie far from 0. Where weights are so small that
// products of several quads fit together, as those of 4 bits are, they are summed in 16 bits first.
#include <utility>

#include "../panels.h"

namespace diffpress::DIFFPRESS_TIER {
namespace {

constexpr int64_t kLargestSum = 32767;
constexpr int64_t kRuns[] = {16, 8, 4};  // shorter ones gain nothing
constexpr int kRowsInRun = 3;  // as their sums in 16 and in 32 bits fill the registers

// What the products of a stretch of weights [quads][lanes][4] can add up to in 16 bits: a lane takes two weights of a quad.
class Sums {
 public:
  explicit Sums(size_t lanes) : above_(2 * lanes), below_(2 * lanes) {}

  // The largest, for codes of 1, with one quad more.
  int64_t add(const int8_t* quad) {
    int64_t most = 0;
    for (size_t pair = 0; pair < above_.size(); ++pair) {
      for (size_t i = 2 * pair; i < 2 * pair + 2; ++i) (quad[i] > 0 ? above_ : below_)[pair] += quad[i];
      most = std::max({most, above_[pair], -below_[pair]});
    }
    return most;
  }

 private:
  std::vector<int64_t> above_, below_;
};

bool fits_in_runs(const Panel& panel, int64_t run, int64_t limit) {
  for (int64_t start = 0; start < panel.quads(); start += run) {
    Sums sums(kPanel);
    for (int64_t q = start; q < std::min(start + run, panel.quads()); ++q) {
      if (sums.add(panel.weights.data() + q * 4 * kPanel) > limit) return false;
    }
  }
  return true;
}

// Takes from each pair of a register's weights what its sum exceeds `limit` by; whether any did. Weights of two signs never do.
bool take_excess(int8_t* weights, int64_t limit, int8_t* excess) {
  const int most = static_cast<int>(limit);
  int any = 0;
  for (int64_t i = 0; i < 4 * kLanes; i += 2) {
    const int first = weights[i], second = weights[i + 1], sum = first + second;
    const int over = sum - std::clamp(sum, -most, most);
    const int of_first = std::clamp(over, -std::abs(first), std::abs(first));
    excess[i] = static_cast<int8_t>(of_first);
    excess[i + 1] = static_cast<int8_t>(over - of_first);
    weights[i] = static_cast<int8_t>(first - of_first);
    weights[i + 1] = static_cast<int8_t>(second - (over - of_first));
    any |= over;
  }
  return any != 0;
}

void set_runs(Excess& excess, int64_t limit) {
  Sums sums(kLanes);
  for (size_t i = 0; i < excess.quads.size(); ++i) {
    const int8_t* weights = excess.weights.data() + i * 4 * kLanes;
    if (sums.add(weights) <= limit) continue;
    excess.runs.push_back(static_cast<int64_t>(i));
    sums = Sums(kLanes);
    sums.add(weights);
  }
  if (!excess.quads.empty()) excess.runs.push_back(static_cast<int64_t>(excess.quads.size()));
}

void part(Panel& panel, int64_t limit) {
  for (int64_t half = 0; half < kRegisters; ++half) {
    Excess& excess = panel.excess[static_cast<size_t>(half)];
    for (int64_t q = 0; q < panel.quads(); ++q) {
      int8_t* weights = panel.weights.data() + (q * kRegisters + half) * 4 * kLanes;
      std::array<int8_t, 4 * kLanes> found;
      if (!take_excess(weights, limit, found.data())) continue;
      excess.quads.push_back(static_cast<int32_t>(q));
      excess.weights.insert(excess.weights.end(), found.begin(), found.end());
    }
    set_runs(excess, limit);
  }
}

__m256i codes_at(const uint8_t* row, int32_t offset) { return (__m256i)all(load<int32_t>(row + offset)); }

Integers in_32_bits(__m256i pairs) { return (Integers)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

template <int ROWS>
void add_excess(const uint8_t* const* rows, const int32_t* offsets, const Excess& excess, int32_t* sums) {
  int64_t i = 0;
  for (const int64_t end : excess.runs) {
    __m256i pairs[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) pairs[r] = _mm256_setzero_si256();
    for (; i < end; ++i) {
      const __m256i weights = load<__m256i>(excess.weights.data() + i * 4 * kLanes);
      const int32_t offset = offsets[excess.quads[static_cast<size_t>(i)]];
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(codes_at(rows[r], offset), weights));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) store(sums + r * kPanel, load<Integers>(sums + r * kPanel) + in_32_bits(pairs[r]));
  }
}

template <int ROWS>
void multiply_rows(const uint8_t* const* rows, const int32_t* offsets, const Panel& panel, int32_t* sums) {
  Integers left[ROWS], right[ROWS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) left[r] = right[r] = Integers{};
  const int8_t* weights = panel.weights.data();
  for (int64_t q = 0, count = panel.quads(); q < count; ++q, weights += 4 * kPanel) {
    const __m256i first = load<__m256i>(weights), second = load<__m256i>(weights + 4 * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m256i codes = codes_at(rows[r], offsets[q]);
      left[r] += in_32_bits(_mm256_maddubs_epi16(codes, first));
      right[r] += in_32_bits(_mm256_maddubs_epi16(codes, second));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    store(sums + r * kPanel, left[r]);
    store(sums + r * kPanel + kLanes, right[r]);
  }
  for (size_t half = 0; half < kRegisters; ++half) add_excess<ROWS>(rows, offsets, panel.excess[half], sums + half * kLanes);
}

template <int ROWS>
void multiply_in_runs(const uint8_t* const* rows, const int32_t* offsets, const Panel& panel, int32_t* sums) {
  Integers left[ROWS], right[ROWS];
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; ++r) left[r] = right[r] = Integers{};
  const int8_t* weights = panel.weights.data();
  for (int64_t start = 0, count = panel.quads(); start < count; start += panel.run) {
    __m256i first_pairs[ROWS], second_pairs[ROWS];
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r) first_pairs[r] = second_pairs[r] = _mm256_setzero_si256();
    for (int64_t q = start; q < std::min(start + panel.run, count); ++q, weights += 4 * kPanel) {
      const __m256i first = load<__m256i>(weights), second = load<__m256i>(weights + 4 * kLanes);
#pragma GCC unroll 3
      for (int r = 0; r < ROWS; ++r) {
        const __m256i codes = codes_at(rows[r], offsets[q]);
        first_pairs[r] = _mm256_add_epi16(first_pairs[r], _mm256_maddubs_epi16(codes, first));
        second_pairs[r] = _mm256_add_epi16(second_pairs[r], _mm256_maddubs_epi16(codes, second));
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r) {
      left[r] += in_32_bits(first_pairs[r]);
      right[r] += in_32_bits(second_pairs[r]);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; ++r) {
    store(sums + r * kPanel, left[r]);
    store(sums + r * kPanel + kLanes, right[r]);
  }
}

using Multiply = void (*)(const uint8_t* const*, const int32_t*, const Panel&, int32_t*);
constexpr Multiply kMultiply[kTile] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                       multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};
constexpr Multiply kMultiplyInRuns[kRowsInRun] = {multiply_in_runs<1>, multiply_in_runs<2>, multiply_in_runs<3>};

}  // namespace

void prepare(Panel& panel, int64_t largest) {
  const int64_t limit = kLargestSum / largest;
  const auto* run = std::find_if(std::begin(kRuns), std::end(kRuns), [&](int64_t r) { return fits_in_runs(panel, r, limit); });
  if (run != std::end(kRuns)) panel.run = *run;
  else part(panel, limit);
}

void multiply(const uint8_t* const* rows, int64_t count, const int32_t* offsets, const Panel& panel, int32_t* sums) {
  if (panel.run == 1) return kMultiply[count - 1](rows, offsets, panel, sums);
  for (int64_t r = 0; r < count; r += kRowsInRun) {
    kMultiplyInRuns[std::min<int64_t>(kRowsInRun, count - r) - 1](rows + r, offsets, panel, sums + r * kPanel);
  }
}

}  // namespace diffpress::DIFFPRESS_TIER
