// One call of a linear layer or a convolution on integers, as Python describes it (layer.py holds the same fields).
#pragma once

#include <cstdint>

#include "panels.h"

namespace diffpress::DIFFPRESS_TIER {

// A linear layer is the convolution of one picture of one row with a kernel of one pixel.
struct Form {
  int64_t x_type, output_type;
  int64_t batch, channels, height, width;
  int64_t x_batch, x_channel, x_row, x_column;  // strides of x, in elements
  int64_t outputs, output_height, output_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t low, high;  // ends of the range of codes
  int64_t scale_a_row;  // whether activation_scale is one an output row
  int64_t threads;
};

struct Layer : Form {
  const void* x;  // [B, C, H, W], either its channels or its columns beside each other; codes where it is int8
  const std::vector<Panel>* panels;
  const float* weight_scale;  // [O]
  const float* activation_scale;  // [1], or one an output row
  const int32_t* zero_point;  // [1] or null
  const float* bias;  // [O] or null
  const float* residual;  // [B, H', W', O] or null
  void* output;  // [B, H', W', O]

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t rows() const { return batch * output_height * output_width; }
  int64_t zero() const { return zero_point ? *zero_point : 0; }
  int64_t stored_channels() const { return quads(channels) * 4; }
  int64_t stored_height() const { return height + 2 * padding[0]; }
  int64_t stored_width() const { return width + 2 * padding[1]; }
};

// The codes of x, higher by kOffset, in pictures with their padding: [B, stored height, stored width, stored channels].
void store_codes(const Layer& layer, uint8_t* codes);

}  // namespace diffpress::DIFFPRESS_TIER
