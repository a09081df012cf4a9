// From floats to codes, rounded half to even as torch does.
#include <immintrin.h>

#include <cstring>

#include "layer.h"
#include "numbers.h"

namespace diffpress {
namespace {

struct Quantizer {
  __m512 scale, low, high;
  __m512i shift;

  explicit Quantizer(const Layer& layer)
      : scale(_mm512_set1_ps(layer.x_type == kInt8 ? 1.0f : *layer.activation_scale)),
        low(_mm512_set1_ps(static_cast<float>(layer.low - layer.zero()))),
        high(_mm512_set1_ps(static_cast<float>(layer.high - layer.zero()))),
        shift(_mm512_set1_epi32(static_cast<int>(layer.zero() + kOffset))) {}

  // The ends are whole numbers, so clipping may come before rounding.
  __m512i operator()(__m512 value) const {
    const __m512 clipped = _mm512_max_ps(low, _mm512_min_ps(high, _mm512_div_ps(value, scale)));
    return _mm512_add_epi32(_mm512_cvtps_epi32(clipped), shift);
  }
};

void codes_along_channels(const Layer& layer, const Quantizer& quantize, int64_t start, uint8_t* pixel) {
  for (int64_t c = 0; c < layer.channels; c += 16) {
    const __mmask16 mask = first_lanes(layer.channels - c);
    store_bytes(pixel + c, mask, quantize(load(layer.x, layer.x_type, start + c, mask)));
  }
}

void shift_codes(const Layer& layer, int64_t start, uint8_t* pixel) {
  const int8_t* x = static_cast<const int8_t*>(layer.x) + start;
  for (int64_t c = 0; c < layer.channels * layer.x_channel; c += layer.x_channel) {
    *pixel++ = static_cast<uint8_t>(x[c] + kOffset);
  }
}

// 16 columns and four channels at a time: a register then holds the four bytes of every pixel.
void codes_along_columns(const Layer& layer, const Quantizer& quantize, int64_t start, uint8_t* pixels) {
  const int64_t step = layer.stored_channels();
  alignas(64) int32_t quads[16];
  for (int64_t column = 0; column < layer.width; column += 16) {
    const __mmask16 mask = first_lanes(layer.width - column);
    for (int64_t c = 0; c < layer.channels; c += 4) {
      __m512i quad = _mm512_setzero_si512();
      for (int64_t i = 0; i < 4 && c + i < layer.channels; ++i) {
        const int64_t at = start + (c + i) * layer.x_channel + column;
        const __m512i code = quantize(load(layer.x, layer.x_type, at, mask));
        quad = _mm512_or_si512(quad, _mm512_slli_epi32(code, static_cast<unsigned>(8 * i)));
      }
      _mm512_store_si512(quads, quad);
      for (int64_t i = 0; i < 16 && column + i < layer.width; ++i) {
        std::memcpy(pixels + (column + i) * step + c, quads + i, 4);
      }
    }
  }
}

void store_row(const Layer& layer, const Quantizer& quantize, int64_t start, uint8_t* pixels) {
  if (layer.x_type != kInt8 && layer.x_channel != 1) return codes_along_columns(layer, quantize, start, pixels);
  for (int64_t column = 0; column < layer.width; ++column) {
    const int64_t at = start + column * layer.x_column;
    uint8_t* pixel = pixels + column * layer.stored_channels();
    if (layer.x_type == kInt8) shift_codes(layer, at, pixel);
    else codes_along_channels(layer, quantize, at, pixel);
  }
}

}  // namespace

void store_codes(const Layer& layer, uint8_t* codes) {
  const Quantizer quantize(layer);
  const int zero = static_cast<int>(layer.zero() + kOffset);
  const int64_t pixel = layer.stored_channels(), row = layer.stored_width() * pixel, margin = layer.padding[1] * pixel;
#pragma omp parallel for num_threads(layer.threads) if (layer.threads > 1)
  for (int64_t i = 0; i < layer.batch * layer.stored_height(); ++i) {
    const int64_t picture = i / layer.stored_height(), y = i % layer.stored_height() - layer.padding[0];
    uint8_t* target = codes + i * row;
    if (y < 0 || y >= layer.height) {
      std::memset(target, zero, static_cast<size_t>(row));
      continue;
    }
    std::memset(target, zero, static_cast<size_t>(margin));
    std::memset(target + row - margin, zero, static_cast<size_t>(margin));
    store_row(layer, quantize, picture * layer.x_batch + y * layer.x_row, target + margin);
  }
}

}  // namespace diffpress
