// A linear layer or a convolution on integers, from floats to floats in one call.
//
// A convolution is not unfolded: each output position keeps a pointer to its window in the padded codes (Dukhan 2019, The
// Indirect Convolution Algorithm, arXiv 1907.02129).
#include "layer.h"

#include <immintrin.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "numbers.h"

namespace diffpress {
namespace {

constexpr int64_t kLarge = int64_t{4} << 20;  // bytes

// Taps beside each other are one stretch where their pixels are neighbours.
Stretches window_stretches(const Layer& layer) {
  const int64_t pixel = layer.stored_channels(), row = layer.stored_width() * pixel;
  const int64_t joined = layer.dilation[1] == 1 ? layer.kernel[1] : 1;
  Stretches found{{}, joined * pixel / 4};
  for (int64_t y = 0; y < layer.kernel[0]; ++y) {
    for (int64_t x = 0; x < layer.kernel[1]; x += joined) {
      found.start.push_back(y * layer.dilation[0] * row + x * layer.dilation[1] * pixel);
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

// What a panel's sums become: floats in their place in the output. Nothing is fused, so that the bits are torch's.
void finish(const Layer& layer, const int32_t* sums, const int32_t* weight_sums, int64_t row, int64_t count, int64_t first) {
  const __m512i offset = _mm512_set1_epi32(static_cast<int>(layer.zero() + kOffset));
  for (int64_t half = 0; half < kPanel && first + half < layer.outputs; half += 16) {
    const int64_t column = first + half;
    const __mmask16 mask = first_lanes(layer.outputs - column);
    const __m512i surplus = _mm512_mullo_epi32(offset, _mm512_loadu_si512(weight_sums + half));
    const __m512 weight_scale = _mm512_maskz_loadu_ps(mask, layer.weight_scale + column);
    const __m512 bias = layer.bias ? _mm512_maskz_loadu_ps(mask, layer.bias + column) : _mm512_setzero_ps();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = (row + r) * layer.outputs + column;
      const __m512 scale = _mm512_set1_ps(layer.activation_scale[layer.scale_a_row ? row + r : 0]);
      const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums + r * kPanel + half), surplus);
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, weight_scale));
      if (layer.bias) value = _mm512_add_ps(value, bias);
      if (layer.residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, layer.residual + at));
      store(layer.output, layer.output_type, at, mask, value);
    }
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
  const Weights weights{layer.weight, layer.outputs, layer.channels, layer.taps()};
  const Stretches stretches = window_stretches(layer);
  const std::vector<const uint8_t*> windows = window_starts(layer, codes);
  const int64_t count = panels(layer.outputs), tiles = (layer.rows() + kTile - 1) / kTile;
  // Where there are fewer panels than threads, several threads take parts of the rows of each.
  const int64_t parts = std::min(tiles, (layer.threads + count - 1) / count);
#pragma omp parallel for collapse(2) num_threads(layer.threads) if (layer.threads > 1)
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t part = 0; part < parts; ++part) {
      thread_local std::vector<int8_t> panel;
      panel.resize(static_cast<size_t>(weights.panel_bytes()));
      int32_t weight_sums[kPanel], sums[kTile * kPanel];
      pack_panel(weights, p * kPanel, panel.data(), weight_sums);
      for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
        const int64_t row = tile * kTile;
        const int64_t rows = std::min(kTile, layer.rows() - row);
        multiply(windows.data() + row, rows, stretches, panel.data(), sums);
        finish(layer, sums, weight_sums, row, rows, p * kPanel);
      }
    }
  }
}

}  // namespace
}  // namespace diffpress

extern "C" __attribute__((visibility("default"))) void diffpress_layer(
    const diffpress::Form* form, const void* x, const int8_t* weight, const float* weight_scale,
    const float* activation_scale, const int32_t* zero_point, const float* bias, const float* residual, void* output) {
  using namespace diffpress;
  const Layer layer{*form, x, weight, weight_scale, activation_scale, zero_point, bias, residual, output};
  uint8_t* codes = scratch(layer.batch * layer.stored_height() * layer.stored_width() * layer.stored_channels());
  ask_for_large_pages(output, layer.rows() * layer.outputs * (layer.output_type == kFloat32 ? 4 : 2));
  store_codes(layer, codes);
  compute(layer, codes);
}
