// From floats to codes, rounded half to even as torch does.
#include <cstring>

#include "layer.h"

namespace diffpress::DIFFPRESS_TIER {
namespace {

struct Quantizer {
  float scale, low, high;
  int32_t shift;

  explicit Quantizer(const Layer& layer)
      : scale(layer.x_type == kInt8 ? 1.0f : *layer.activation_scale),
        low(static_cast<float>(layer.low - layer.zero())),
        high(static_cast<float>(layer.high - layer.zero())),
        shift(static_cast<int32_t>(layer.zero() + kOffset)) {}

  // The ends are whole numbers, so clipping may come before rounding.
  Integers operator()(Floats value) const {
    return to_integers(rounded(larger(all(low), smaller(all(high), value / scale)))) + shift;
  }
};

void codes_along_channels(const Layer& layer, const Quantizer& quantize, int64_t start, uint8_t* pixel) {
  for (int64_t c = 0; c < layer.channels; c += kLanes) {
    const int64_t count = layer.channels - c;
    store_bytes(pixel + c, count, quantize(load_floats(layer.x, layer.x_type, start + c, count)));
  }
}

void shift_codes(const Layer& layer, int64_t start, uint8_t* pixel) {
  const int8_t* x = static_cast<const int8_t*>(layer.x) + start;
  for (int64_t c = 0; c < layer.channels * layer.x_channel; c += layer.x_channel) {
    *pixel++ = static_cast<uint8_t>(x[c] + kOffset);
  }
}

// A register of columns and four channels at a time: a register then holds the four bytes of every pixel.
void codes_along_columns(const Layer& layer, const Quantizer& quantize, int64_t start, uint8_t* pixels) {
  const int64_t step = layer.stored_channels();
  for (int64_t column = 0; column < layer.width; column += kLanes) {
    const int64_t count = layer.width - column;
    for (int64_t c = 0; c < layer.channels; c += 4) {
      Integers quad{};
      for (int64_t i = 0; i < 4 && c + i < layer.channels; ++i) {
        const int64_t at = start + (c + i) * layer.x_channel + column;
        quad |= (quantize(load_floats(layer.x, layer.x_type, at, count)) & 0xFF) << static_cast<int32_t>(8 * i);
      }
      for (int64_t i = 0; i < std::min(kLanes, count); ++i) store(pixels + (column + i) * step + c, quad[i]);
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

}  // namespace diffpress::DIFFPRESS_TIER
