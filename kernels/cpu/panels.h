// Products of bytes, summed in integers.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "lanes.h"

namespace diffpress::DIFFPRESS_TIER {

// Four neighbours are multiplied at once.
inline int64_t quads(int64_t bytes) { return (bytes + 3) / 4; }
inline int64_t panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// Signed bytes [outputs, channels, taps] on the right.
struct Weights {
  const int8_t* codes;
  int64_t outputs, channels, taps;
};

// What some quads' weights in one register exceed by, where products of the whole would not fit into the tier's sums.
struct Excess {
  std::vector<int32_t> quads;
  std::vector<int8_t> weights;  // [quads][kLanes][4]
  std::vector<int64_t> runs;  // ends of what may be summed in 16 bits

  size_t bytes() const { return quads.size() * sizeof(int32_t) + weights.size() + runs.size() * sizeof(int64_t); }
};

// The weights of kPanel outputs in the order in which they are multiplied: [taps][channels / 4][kPanel][4].
struct Panel {
  std::vector<int8_t> weights;
  std::array<int32_t, kPanel> sums{};  // of each output's weights
  std::array<Excess, kRegisters> excess;
  int64_t run = 1;  // quads of which products may be summed in 16 bits

  int64_t bytes() const {
    size_t bytes = sizeof(Panel) + weights.size();
    for (const Excess& half : excess) bytes += half.bytes();
    return static_cast<int64_t>(bytes);
  }
  int64_t quads() const { return static_cast<int64_t>(weights.size()) / (4 * kPanel); }
};

// Panels for products with bytes of at most `largest`: unsigned ones, but signed ones where kOffset is 0.
std::vector<Panel> pack(const Weights& weights, int64_t largest);

// What the tier's products need to know of a panel, whose weights it may part.
void prepare(Panel& panel, int64_t largest);

// Sums [count][kPanel] of the products of up to kTile rows of such bytes with a panel; quad q lies offsets[q] behind a
// row's start.
void multiply(const uint8_t* const* rows, int64_t count, const int32_t* offsets, const Panel& panel, int32_t* sums);

}  // namespace diffpress::DIFFPRESS_TIER
