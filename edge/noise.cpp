// The logarithm, sine and cosine are those of Julien Pommier's sse_mathfun.h and Giovanni Garberoglio's avx_mathfun.h in the
// form that torch compiles: multiplications and additions fused as its compiler fuses them. Altered from the original, which is
// Copyright (C) 2007 Julien Pommier, (C) 2012 Giovanni Garberoglio, under the zlib license (third_party/avx_mathfun/LICENSE).
#include "noise.h"

#include <cmath>
#include <cstring>

namespace diffpress {

namespace {

constexpr std::size_t kBlock = 16;
constexpr double kPi = 3.14159265358979323846;

std::uint32_t word_of(float value) {
  std::uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

float float_of(std::uint32_t word) {
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

float logarithm(float x) {
  float exponent = static_cast<float>(static_cast<int>(word_of(x) >> 23) - 0x7f) + 1.0f;
  x = float_of((word_of(x) & ~0x7f800000u) | word_of(0.5f));
  const bool small = x < 0.707106781186547524f;
  const float more = small ? x : 0.0f;
  exponent -= small ? 1.0f : 0.0f;
  x = (x - 1.0f) + more;
  const float square = x * x;
  float y = 7.0376836292e-2f;
  for (const float p : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                        2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    y = std::fma(y, x, p);
  y = std::fma(y * x, square, exponent * -2.12194440e-4f);
  y = std::fma(-square, 0.5f, y);
  return std::fma(exponent, 0.693359375f, x + y);
}

// Of an angle of 0 or more.
void sine_and_cosine(float x, float& sine, float& cosine) {
  const int octant = (static_cast<int>(x * 1.27323954473516f) + 1) & ~1;
  const float turns = static_cast<float>(octant);
  x = std::fma(turns, -0.78515625f, x);
  x = std::fma(turns, -2.4187564849853515625e-4f, x);
  x = std::fma(turns, -3.77489497744594108e-8f, x);
  const float square = x * x;
  float even = std::fma(2.443315711809948e-5f, square, -1.388731625493765e-3f);
  even = std::fma(even, square, 4.166664568298827e-2f) * square;
  even = std::fma(even, square, -(square * 0.5f)) + 1.0f;
  float odd = std::fma(-1.9515295891e-4f, square, 8.3321608736e-3f);
  odd = std::fma(odd, square, -1.6666654611e-1f) * square;
  odd = std::fma(odd, x, x);
  const bool turned = octant & 2;
  sine = (octant & 4) ? -(turned ? even : odd) : (turned ? even : odd);
  cosine = ((octant - 2) & 4) ? (turned ? odd : even) : -(turned ? odd : even);
}

// Eight radii, then eight angles. G. E. P. Box and M. E. Muller, A note on the generation of random normal deviates, 1958.
void box_muller(float* values) {
  for (float* radius = values; radius < values + kBlock / 2; ++radius) {
    float* angle = radius + kBlock / 2;
    float sine, cosine;
    sine_and_cosine(static_cast<float>(2.0f * kPi) * *angle, sine, cosine);
    const float length = std::sqrt(-2.0f * logarithm(1.0f - *radius));
    // torch adds a mean of 0, which makes 0 of -0.
    *radius = length * cosine + 0.0f;
    *angle = length * sine + 0.0f;
  }
}

float uniform(std::mt19937& twister) { return static_cast<float>(twister() & 0xffffff) * 0x1p-24f; }

double uniform_double(std::mt19937& twister) {
  const std::uint64_t high = twister(), low = twister();
  return static_cast<double>((high << 32 | low) & ((1ull << 53) - 1)) * 0x1p-53;
}

// torch draws fewer numbers than a block in pairs of doubles.
void few_numbers(std::mt19937& twister, std::vector<float>& values) {
  for (std::size_t i = 0; i < values.size(); i += 2) {
    const double turn = uniform_double(twister), radius = std::sqrt(-2.0 * std::log1p(-uniform_double(twister)));
    const double angle = 2.0 * kPi * turn;
    values[i] = static_cast<float>(radius * std::cos(angle));
    if (i + 1 < values.size()) values[i + 1] = static_cast<float>(radius * std::sin(angle));
  }
}

}  // namespace

std::vector<float> TorchNoise::draw(std::size_t size) {
  std::vector<float> values(size);
  if (size < kBlock) {
    few_numbers(twister_, values);
    return values;
  }
  for (float& value : values) value = uniform(twister_);
  for (std::size_t i = 0; i + kBlock <= size; i += kBlock) box_muller(&values[i]);
  if (size % kBlock != 0) {
    float* last = &values[size - kBlock];
    for (std::size_t i = 0; i < kBlock; ++i) last[i] = uniform(twister_);
    box_muller(last);
  }
  return values;
}

}  // namespace diffpress
