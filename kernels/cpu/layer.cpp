// A linear layer or a convolution on integers, from floats to floats in one call.
//
// A convolution is not unfolded: each output position keeps a pointer to its window in the padded codes (Dukhan 2019, The
// Indirect Convolution Algorithm, arXiv 1907.02129).
#include "layer.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

namespace diffpress::DIFFPRESS_TIER {
namespace {

constexpr int64_t kBlock = 16;  // tiles of rows whose codes and outputs stay near the processor for all panels
constexpr int64_t kLarge = int64_t{4} << 20;  // bytes

// Where in a window, from its start on, the quads of each tap lie.
std::vector<int32_t> window_offsets(const Layer& layer) {
  const int64_t pixel = layer.stored_channels(), row = layer.stored_width() * pixel;
  std::vector<int32_t> found;
  found.reserve(static_cast<size_t>(layer.taps() * quads(layer.channels)));
  for (int64_t y = 0; y < layer.kernel[0]; ++y) {
    for (int64_t x = 0; x < layer.kernel[1]; ++x) {
      const int64_t start = y * layer.dilation[0] * row + x * layer.dilation[1] * pixel;
      for (int64_t c = 0; c < pixel; c += 4) found.push_back(static_cast<int32_t>(start + c));
    }
  }
  return found;
}

std::vector<const uint8_t*> window_starts(const Layer& layer, const uint8_t* codes) {
  std::vector<const uint8_t*> found;
  found.reserve(static_cast<size_t>(layer.rows()));
  const int64_t pixel = layer.stored_channels(), row = layer.stored_width() * pixel;
  for (int64_t b = 0; b < layer.batch; ++b) {
    for (int64_t y = 0; y < layer.output_height; ++y) {
      const uint8_t* start = codes + (b * layer.stored_height() + y * layer.stride[0]) * row;
      for (int64_t x = 0; x < layer.output_width; ++x) found.push_back(start + x * layer.stride[1] * pixel);
    }
  }
  return found;
}

// What a register of sums becomes: floats in their place in the output. Nothing is fused, so that the bits are torch's.
template <Type TYPE>
void finish_column(const Layer& layer, const int32_t* sums, const int32_t* weight_sums, int64_t row, int64_t count, int64_t column) {
  const int64_t outputs = layer.outputs, columns = outputs - column;
  const Integers surplus = load<Integers>(weight_sums) * static_cast<int32_t>(layer.zero() + kOffset);
  const Floats weight_scale = load_first<Floats>(layer.weight_scale + column, columns);
  const Floats bias = layer.bias ? load_first<Floats>(layer.bias + column, columns) : Floats{};
  const float* scale = layer.activation_scale + (layer.scale_a_row ? row : 0);
  const float* residual = layer.residual;
  const bool has_bias = layer.bias, scale_a_row = layer.scale_a_row;
  void* output = layer.output;
  for (int64_t r = 0, at = row * outputs + column; r < count; ++r, at += outputs, scale += scale_a_row) {
    Floats value = to_floats(load<Integers>(sums + r * kPanel) - surplus) * (*scale * weight_scale);
    if (has_bias) value += bias;
    if (residual) value += load_first<Floats>(residual + at, columns);
    store_floats(output, TYPE, at, columns, value);
  }
}

template <Type TYPE>
void finish(const Layer& layer, const int32_t* sums, const Panel& panel, int64_t row, int64_t count, int64_t first) {
  for (int64_t part = 0; part < kPanel && first + part < layer.outputs; part += kLanes) {
    finish_column<TYPE>(layer, sums + part, panel.sums.data() + part, row, count, first + part);
  }
}

// Memory that a thread keeps from call to call: the system takes long to give new pages.
uint8_t* scratch(int64_t bytes) {
  thread_local std::vector<uint8_t> kept;
  if (kept.size() < static_cast<size_t>(bytes)) kept.resize(static_cast<size_t>(bytes));
  return kept.data();
}

// Large outputs are new memory each time, and the system gives it faster in large pages.
void ask_for_large_pages([[maybe_unused]] void* from, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  if (bytes < kLarge) return;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(from) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

void compute(const Layer& layer, const uint8_t* codes) {
  const auto finish_tile = layer.output_type == kFloat32 ? finish<kFloat32>
                                : layer.output_type == kFloat16 ? finish<kFloat16> : finish<kBfloat16>;
  const std::vector<int32_t> offsets = window_offsets(layer);
  const std::vector<const uint8_t*> windows = window_starts(layer, codes);
  const int64_t count = panels(layer.outputs), tiles = (layer.rows() + kTile - 1) / kTile;
  // As many blocks for each thread; where there are fewer than threads, several take parts of the panels of each.
  const int64_t rounds = (tiles + kBlock * layer.threads - 1) / (kBlock * layer.threads);
  const int64_t blocks = std::max<int64_t>(1, std::min(tiles, rounds * layer.threads));
  const int64_t parts = std::min(count, (layer.threads + blocks - 1) / blocks);
#pragma omp parallel for collapse(2) num_threads(layer.threads) if (layer.threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t part = 0; part < parts; ++part) {
      int32_t sums[kTile * kPanel];
      for (int64_t p = count * part / parts; p < count * (part + 1) / parts; ++p) {
        const Panel& panel = (*layer.panels)[static_cast<size_t>(p)];
        for (int64_t tile = tiles * block / blocks; tile < tiles * (block + 1) / blocks; ++tile) {
          const int64_t row = tile * kTile, rows = std::min(kTile, layer.rows() - row);
          multiply(windows.data() + row, rows, offsets.data(), panel, sums);
          finish_tile(layer, sums, panel, row, rows, p * kPanel);
        }
      }
    }
  }
}

}  // namespace
}  // namespace diffpress::DIFFPRESS_TIER

namespace tier = diffpress::DIFFPRESS_TIER;

extern "C" {

// Panels of weights [outputs, channels, taps], which live until they are released; null where memory is short.
SHOWN void* diffpress_pack(const int8_t* codes, int64_t outputs, int64_t channels, int64_t taps) try {
  constexpr int64_t kLargestCode = 255;
  return new std::vector<tier::Panel>(tier::pack({codes, outputs, channels, taps}, kLargestCode));
} catch (const std::bad_alloc&) {
  return nullptr;
}

SHOWN void diffpress_release(const std::vector<tier::Panel>* panels) { delete panels; }

SHOWN int64_t diffpress_bytes(const std::vector<tier::Panel>* panels) {
  int64_t bytes = 0;
  for (const tier::Panel& panel : *panels) bytes += panel.bytes();
  return bytes;
}

// Whether there was enough memory.
SHOWN bool diffpress_layer(const tier::Form* form, const void* x, const std::vector<tier::Panel>* panels,
                           const float* weight_scale, const float* activation_scale, const int32_t* zero_point,
                           const float* bias, const float* residual, void* output) try {
  const tier::Layer layer{*form, x, panels, weight_scale, activation_scale, zero_point, bias, residual, output};
  uint8_t* codes = tier::scratch(layer.batch * layer.stored_height() * layer.stored_width() * layer.stored_channels());
  tier::ask_for_large_pages(output, layer.rows() * layer.outputs * (layer.output_type == tier::kFloat32 ? 4 : 2));
  tier::store_codes(layer, codes);
  tier::compute(layer, codes);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

}  // extern "C"
