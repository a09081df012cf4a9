// Attention whose scores are products of codes, a tile of queries against all keys at a time.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "numbers.h"
#include "products.h"

namespace diffpress {
namespace {

constexpr float kLargestCode = 127;
constexpr int64_t kLanes = 16;

int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

}  // namespace

struct Attention {
  int64_t type, batch, heads, queries, keys, columns;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // of picture, head and token, in elements
  int64_t integer_values, threads;
  const void *q, *k, *v;
  const float* k_mean;  // [B, H, D]
  void* output;  // [B, T, H, D]
};

namespace {

// exp(x) for x <= 0, by the polynomial of Cephes' expf: 2 units in the last place.
__m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-110));  // where it is 0
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  x = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
  x = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), x);
  __m512 series = _mm512_set1_ps(1.9875691500e-4f);
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    series = _mm512_fmadd_ps(series, x, _mm512_set1_ps(term));
  }
  series = _mm512_fmadd_ps(_mm512_mul_ps(x, x), series, _mm512_add_ps(x, _mm512_set1_ps(1)));
  return _mm512_scalef_ps(series, power);
}

float scale_of(float largest) { return largest > 0 ? largest / kLargestCode : 1; }

// Codes of a token less `mean`, higher by `offset`, and their scale.
float token_codes(const void* x, int64_t type, int64_t at, int64_t columns, const float* mean, int offset, int8_t* codes) {
  __m512 value[128 / kLanes];
  __m512 largest = _mm512_setzero_ps();
  for (int64_t c = 0, i = 0; c < columns; c += kLanes, ++i) {
    const __mmask16 mask = first_lanes(columns - c);
    value[i] = load(x, type, at + c, mask);
    if (mean) value[i] = _mm512_maskz_sub_ps(mask, value[i], _mm512_maskz_loadu_ps(mask, mean + c));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(value[i]));
  }
  const float scale = scale_of(_mm512_reduce_max_ps(largest));
  for (int64_t c = 0, i = 0; c < columns; c += kLanes, ++i) {
    const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(value[i], _mm512_set1_ps(scale)));
    store_bytes(codes + c, first_lanes(columns - c), _mm512_add_epi32(code, _mm512_set1_epi32(offset)));
  }
  return scale;
}

// What every query of a head is multiplied with.
struct Head {
  std::vector<int8_t> key_panels, value_panels;
  std::vector<int32_t> key_sums;
  std::vector<float> key_scale, value_scale, values;  // values as [keys][columns, filled up to kLanes]
};

void pack_keys(const Attention& a, int64_t at, const float* mean, Head& head) {
  std::vector<int8_t> codes(static_cast<size_t>(a.keys * a.columns));
  head.key_scale.assign(static_cast<size_t>(rounded_up(a.keys, kPanel)), 0);
  for (int64_t s = 0; s < a.keys; ++s) {
    int8_t* to = codes.data() + s * a.columns;
    head.key_scale[s] = token_codes(a.k, a.type, at + s * a.k_stride[2], a.columns, mean, 0, to);
  }
  const Weights weights{codes.data(), a.keys, a.columns, 1};
  head.key_panels.resize(static_cast<size_t>(panels(a.keys) * weights.panel_bytes()));
  head.key_sums.resize(static_cast<size_t>(panels(a.keys) * kPanel));
  for (int64_t p = 0; p < panels(a.keys); ++p) {
    pack_panel(weights, p * kPanel, head.key_panels.data() + p * weights.panel_bytes(), head.key_sums.data() + p * kPanel);
  }
}

void copy_values(const Attention& a, int64_t at, Head& head) {
  const int64_t step = rounded_up(a.columns, kLanes);
  head.values.resize(static_cast<size_t>(a.keys * step));
  for (int64_t s = 0; s < a.keys; ++s) {
    for (int64_t c = 0; c < a.columns; c += kLanes) {
      const __m512 value = load(a.v, a.type, at + s * a.v_stride[2] + c, first_lanes(a.columns - c));
      _mm512_storeu_ps(head.values.data() + s * step + c, value);
    }
  }
}

// Codes of the values, with one scale a channel.
void pack_values(const Attention& a, Head& head) {
  const int64_t step = rounded_up(a.columns, kLanes);
  std::vector<int8_t> codes(static_cast<size_t>(a.columns * a.keys));
  head.value_scale.assign(static_cast<size_t>(rounded_up(a.columns, kPanel)), 0);
  for (int64_t c = 0; c < a.columns; ++c) {
    float largest = 0;
    for (int64_t s = 0; s < a.keys; ++s) largest = std::max(largest, std::fabs(head.values[s * step + c]));
    head.value_scale[c] = scale_of(largest);
    for (int64_t s = 0; s < a.keys; ++s) {
      codes[c * a.keys + s] = static_cast<int8_t>(std::nearbyint(head.values[s * step + c] / head.value_scale[c]));
    }
  }
  const Weights weights{codes.data(), a.columns, a.keys, 1};
  head.value_panels.resize(static_cast<size_t>(panels(a.columns) * weights.panel_bytes()));
  int32_t sums[kPanel];
  for (int64_t p = 0; p < panels(a.columns); ++p) {
    pack_panel(weights, p * kPanel, head.value_panels.data() + p * weights.panel_bytes(), sums);
  }
}

// A tile of queries: their scores, then probabilities, in memory of the thread.
struct Tile {
  const Attention& a;
  const Head& head;
  int64_t rows, step;  // keys, filled up to kPanel
  std::vector<float>& scores;  // [kTile][step]
  std::array<float, kTile> largest, total;

  Tile(const Attention& attention, const Head& own, int64_t count, std::vector<float>& memory)
      : a(attention), head(own), rows(count), step(rounded_up(a.keys, kPanel)), scores(memory), largest{}, total{} {
    scores.resize(static_cast<size_t>(kTile * step));
  }

  void score(int64_t at) {
    const int64_t bytes = quads(a.columns) * 4;
    std::array<uint8_t, kTile * 128> codes{};
    std::array<const uint8_t*, kTile> row{};
    __m512 scale[kTile], best[kTile];
    const float factor = static_cast<float>(std::pow(static_cast<double>(a.columns), -0.5));
    for (int64_t r = 0; r < rows; ++r) {
      row[r] = codes.data() + r * bytes;
      int8_t* to = reinterpret_cast<int8_t*>(codes.data() + r * bytes);
      const float found = token_codes(a.q, a.type, at + r * a.q_stride[2], a.columns, nullptr, kOffset, to);
      scale[r] = _mm512_set1_ps(found * factor);
      best[r] = _mm512_set1_ps(-INFINITY);
    }
    const Stretches stretches{{0}, quads(a.columns)};
    int32_t sums[kTile * kPanel];
    for (int64_t p = 0; p < step / kPanel; ++p) {
      multiply(row.data(), rows, stretches, head.key_panels.data() + p * kPanel * bytes, sums);
      for (int64_t half = p * kPanel; half < (p + 1) * kPanel; half += kLanes) {
        const __mmask16 mask = first_lanes(std::max<int64_t>(a.keys - half, 0));
        const __m512i surplus = _mm512_slli_epi32(_mm512_loadu_si512(head.key_sums.data() + half), 7);
        const __m512 key_scale = _mm512_loadu_ps(head.key_scale.data() + half);
        for (int64_t r = 0; r < rows; ++r) {
          const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums + r * kPanel + half % kPanel), surplus);
          const __m512 value = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale[r]), key_scale);
          const __m512 known = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, value);
          best[r] = _mm512_max_ps(best[r], known);
          _mm512_storeu_ps(scores.data() + r * step + half, known);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) largest[r] = _mm512_reduce_max_ps(best[r]);
  }

  void weigh() {
    for (int64_t r = 0; r < rows; ++r) {
      float* at = scores.data() + r * step;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t s = 0; s < step; s += kLanes) {
        const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(at + s), _mm512_set1_ps(largest[r])));
        sum = _mm512_add_ps(sum, weight);
        _mm512_storeu_ps(at + s, weight);
      }
      total[r] = _mm512_reduce_add_ps(sum);
    }
  }

  // The same in whole numbers up to kLargestCode: [kTile][step] bytes.
  void weigh_in_integers(uint8_t* codes) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* at = scores.data() + r * step;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t s = 0; s < step; s += kLanes) {
        const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(at + s), _mm512_set1_ps(largest[r])));
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(weight, _mm512_set1_ps(kLargestCode)));
        sum = _mm512_add_epi32(sum, code);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + r * step + s), _mm512_cvtepi32_epi8(code));
      }
      total[r] = static_cast<float>(_mm512_reduce_add_epi32(sum));
    }
  }

  // Rows that the last tile lacks are computed from what is there, and left.
  template <int REGISTERS>
  void mix_columns(int64_t c, int64_t output, int64_t output_step) const {
    const int64_t width = rounded_up(a.columns, kLanes);
    __m512 mixed[kTile][REGISTERS];
#pragma GCC unroll 12
    for (int64_t r = 0; r < kTile; ++r) {
      for (int i = 0; i < REGISTERS; ++i) mixed[r][i] = _mm512_setzero_ps();
    }
    for (int64_t s = 0; s < a.keys; ++s) {
      __m512 value[REGISTERS];
      for (int i = 0; i < REGISTERS; ++i) value[i] = _mm512_loadu_ps(head.values.data() + s * width + c + i * kLanes);
#pragma GCC unroll 12
      for (int64_t r = 0; r < kTile; ++r) {
        const __m512 weight = _mm512_set1_ps(scores[r * step + s]);
        for (int i = 0; i < REGISTERS; ++i) mixed[r][i] = _mm512_fmadd_ps(weight, value[i], mixed[r][i]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < REGISTERS; ++i) {
        const int64_t column = c + i * kLanes;
        const __m512 mean = _mm512_div_ps(mixed[r][i], _mm512_set1_ps(total[r]));
        store(a.output, a.type, output + r * output_step + column, first_lanes(a.columns - column), mean);
      }
    }
  }

  void mix(int64_t output, int64_t output_step) const {
    int64_t c = 0;
    for (; c + kLanes < a.columns; c += 2 * kLanes) mix_columns<2>(c, output, output_step);
    if (c < a.columns) mix_columns<1>(c, output, output_step);
  }

  void mix_in_integers(const uint8_t* codes, int64_t output, int64_t output_step) const {
    std::array<const uint8_t*, kTile> row{};
    for (int64_t r = 0; r < rows; ++r) row[r] = codes + r * step;
    const Stretches stretches{{0}, quads(a.keys)};
    int32_t sums[kTile * kPanel];
    for (int64_t c = 0; c < a.columns; c += kLanes) {
      const int64_t half = c % kPanel;
      if (half == 0) multiply(row.data(), rows, stretches, head.value_panels.data() + c * quads(a.keys) * 4, sums);
      const __m512 scale = _mm512_loadu_ps(head.value_scale.data() + c);
      for (int64_t r = 0; r < rows; ++r) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + r * kPanel + half));
        const __m512 value = _mm512_mul_ps(_mm512_div_ps(sum, _mm512_set1_ps(total[r])), scale);
        store(a.output, a.type, output + r * output_step + c, first_lanes(a.columns - c), value);
      }
    }
  }
};

void attend(const Attention& a, const Head& head, int64_t number, int64_t first) {
  thread_local std::vector<float> scores;
  thread_local std::vector<uint8_t> codes;
  const int64_t picture = number / a.heads, own = number % a.heads, output_step = a.heads * a.columns;
  Tile tile(a, head, std::min(kTile, a.queries - first), scores);
  tile.score(picture * a.q_stride[0] + own * a.q_stride[1] + first * a.q_stride[2]);
  const int64_t output = ((picture * a.queries + first) * a.heads + own) * a.columns;
  if (a.integer_values) {
    codes.resize(static_cast<size_t>(kTile * tile.step));
    tile.weigh_in_integers(codes.data());
    tile.mix_in_integers(codes.data(), output, output_step);
  } else {
    tile.weigh();
    tile.mix(output, output_step);
  }
}

}  // namespace
}  // namespace diffpress

extern "C" __attribute__((visibility("default"))) void diffpress_attention(const diffpress::Attention* attention) {
  using namespace diffpress;
  const Attention& a = *attention;
  std::vector<Head> heads(static_cast<size_t>(a.batch * a.heads));
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1)
  for (int64_t i = 0; i < a.batch * a.heads; ++i) {
    const int64_t picture = i / a.heads, own = i % a.heads;
    pack_keys(a, picture * a.k_stride[0] + own * a.k_stride[1], a.k_mean + i * a.columns, heads[i]);
    copy_values(a, picture * a.v_stride[0] + own * a.v_stride[1], heads[i]);
    if (a.integer_values) pack_values(a, heads[i]);
  }
  const int64_t tiles = (a.queries + kTile - 1) / kTile;
#pragma omp parallel for collapse(2) num_threads(a.threads) if (a.threads > 1)
  for (int64_t i = 0; i < a.batch * a.heads; ++i) {
    for (int64_t tile = 0; tile < tiles; ++tile) attend(a, heads[i], i, tile * kTile);
  }
}
