#include "panels.h"

namespace diffpress::DIFFPRESS_TIER {
namespace {

Panel pack_panel(const Weights& weights, int64_t first) {
  const int64_t taps = weights.taps, count = quads(weights.channels);
  Panel panel;
  panel.weights.assign(static_cast<size_t>(taps * count * kPanel * 4), 0);
  int8_t* to = panel.weights.data();
  for (int64_t i = 0; i < std::min(kPanel, weights.outputs - first); ++i) {
    const int8_t* from = weights.codes + (first + i) * weights.channels * taps;
    int32_t sum = 0;
    for (int64_t c = 0; c < weights.channels; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) sum += to[((tap * count + c / 4) * kPanel + i) * 4 + c % 4] = *from++;
    }
    panel.sums[static_cast<size_t>(i)] = sum;
  }
  return panel;
}

}  // namespace

std::vector<Panel> pack(const Weights& weights, int64_t largest) {
  std::vector<Panel> packed;
  packed.reserve(static_cast<size_t>(panels(weights.outputs)));
  for (int64_t first = 0; first < weights.outputs; first += kPanel) {
    packed.push_back(pack_panel(weights, first));
    prepare(packed.back(), largest);
  }
  return packed;
}

}  // namespace diffpress::DIFFPRESS_TIER
