// Products of bytes, summed in integers.
#pragma once

#include <cstdint>
#include <vector>

namespace diffpress {

// Outputs that are computed together: two registers of 16.
constexpr int64_t kPanel = 32;
// Rows that are computed together: with two registers each, 24 of 32.
constexpr int64_t kTile = 12;
// The instruction multiplies unsigned with signed bytes: codes on the left are kept so much higher than they are.
constexpr int64_t kOffset = 128;

// The instruction multiplies four neighbours at once.
inline int64_t quads(int64_t bytes) { return (bytes + 3) / 4; }
inline int64_t panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// Signed bytes [outputs, channels, taps] on the right.
struct Weights {
  const int8_t* codes;
  int64_t outputs, channels, taps;

  int64_t panel_bytes() const { return taps * quads(channels) * kPanel * 4; }
};

// Stretches of what is on the left of a row whose bytes lie beside each other: all as long, at the same places of each row.
struct Stretches {
  std::vector<int64_t> start;
  int64_t quads;
};

// The weights of kPanel outputs from `first` on as [taps][channels / 4][kPanel][4], and the sum of each output's weights.
void pack_panel(const Weights& weights, int64_t first, int8_t* panel, int32_t* sums);

// Sums [count][kPanel] of the products of up to kTile rows of unsigned bytes with a panel.
void multiply(const uint8_t* const* rows, int64_t count, const Stretches& stretches, const int8_t* panel, int32_t* sums);

}  // namespace diffpress
