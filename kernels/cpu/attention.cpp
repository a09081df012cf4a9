// Attention whose scores are products of codes, a tile of queries against all keys at a time.
#include <array>
#include <cmath>
#include <vector>

#include "panels.h"

namespace diffpress::DIFFPRESS_TIER {

constexpr int64_t kMostColumns = 128;  // of a head

struct Attention {
  int64_t type, batch, heads, queries, keys, columns;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // of picture, head and token, in elements
  int64_t integer_values, threads;
  const void *q, *k, *v;
  const float* k_mean;  // [B, H, D]
  void* output;  // [B, T, H, D]
};

namespace {

constexpr float kLargestCode = 127;

int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// 2^power for whole powers from -252 on, by two factors: one alone would lie below the smallest ordinary number.
Floats power_of_two(Floats value, Floats power) {
  const Integers whole = to_integers(power), half = whole >> 1;
  return value * same_bits<Floats>((half + 127) << 23) * same_bits<Floats>((whole - half + 127) << 23);
}

// exp(x) for x <= 0, by the polynomial of Cephes' expf: 2 units in the last place.
Floats exponential(Floats x) {
  x = larger(x, all(-110.0f));  // where it is 0
  const Floats power = rounded(x * 1.44269504f);
  x = fused(-power, all(0.693359375f), x);
  x = fused(-power, all(-2.12194440e-4f), x);
  Floats series = all(1.9875691500e-4f);
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    series = fused(series, x, all(term));
  }
  series = fused(x * x, series, x + 1.0f);
  return power_of_two(series, power);
}

float scale_of(float largest_value) { return largest_value > 0 ? largest_value / kLargestCode : 1; }

// Codes of a token less `mean`, higher by `offset`, and their scale.
float token_codes(const void* x, int64_t type, int64_t at, int64_t columns, const float* mean, int32_t offset, int8_t* codes) {
  Floats value[kMostColumns / kLanes];
  Floats most{};
  for (int64_t c = 0, i = 0; c < columns; c += kLanes, ++i) {
    value[i] = load_floats(x, type, at + c, columns - c);
    if (mean) value[i] -= load_first<Floats>(mean + c, columns - c);
    most = larger(most, magnitude(value[i]));
  }
  const float scale = scale_of(largest(most));
  for (int64_t c = 0, i = 0; c < columns; c += kLanes, ++i) {
    store_bytes(codes + c, columns - c, to_integers(rounded(value[i] / scale)) + offset);
  }
  return scale;
}

// One token's quads lie one after the other.
std::vector<int32_t> quads_in_order(int64_t bytes) {
  std::vector<int32_t> offsets(static_cast<size_t>(quads(bytes)));
  for (size_t q = 0; q < offsets.size(); ++q) offsets[q] = static_cast<int32_t>(4 * q);
  return offsets;
}

// What every query of a head is multiplied with.
struct Head {
  std::vector<Panel> key_panels, value_panels;
  std::vector<int32_t> key_offsets, value_offsets;
  std::vector<float> key_scale, value_scale, values;  // values as [columns / kPanel][keys][kPanel], zeros beyond the last

  float& value(const Attention& a, int64_t key, int64_t column) {
    return values[static_cast<size_t>((column / kPanel * a.keys + key) * kPanel + column % kPanel)];
  }
};

void pack_keys(const Attention& a, int64_t at, const float* mean, Head& head) {
  std::vector<int8_t> codes(static_cast<size_t>(a.keys * a.columns));
  head.key_scale.assign(static_cast<size_t>(rounded_up(a.keys, kPanel)), 0);
  for (int64_t s = 0; s < a.keys; ++s) {
    int8_t* to = codes.data() + s * a.columns;
    head.key_scale[s] = token_codes(a.k, a.type, at + s * a.k_stride[2], a.columns, mean, 0, to);
  }
  constexpr int64_t kLargestQuery = kOffset + static_cast<int64_t>(kLargestCode);
  head.key_panels = pack({codes.data(), a.keys, a.columns, 1}, kLargestQuery);
  head.key_offsets = quads_in_order(a.columns);
}

void copy_values(const Attention& a, int64_t at, Head& head) {
  head.values.resize(static_cast<size_t>(panels(a.columns) * kPanel * a.keys));
  for (int64_t s = 0; s < a.keys; ++s) {
    for (int64_t c = 0; c < panels(a.columns) * kPanel; c += kLanes) {
      store(&head.value(a, s, c), load_floats(a.v, a.type, at + s * a.v_stride[2] + c, a.columns - c));
    }
  }
}

// Codes of the values, with one scale a channel.
void pack_values(const Attention& a, Head& head) {
  std::vector<int8_t> codes(static_cast<size_t>(a.columns * a.keys));
  head.value_scale.assign(static_cast<size_t>(rounded_up(a.columns, kPanel)), 0);
  for (int64_t c = 0; c < a.columns; ++c) {
    float most = 0;
    for (int64_t s = 0; s < a.keys; ++s) most = std::max(most, std::fabs(head.value(a, s, c)));
    head.value_scale[c] = scale_of(most);
    for (int64_t s = 0; s < a.keys; ++s) {
      codes[c * a.keys + s] = static_cast<int8_t>(std::nearbyint(head.value(a, s, c) / head.value_scale[c]));
    }
  }
  head.value_panels = pack({codes.data(), a.columns, a.keys, 1}, static_cast<int64_t>(kLargestCode));
  head.value_offsets = quads_in_order(a.keys);
}

// A tile of queries: their scores, then probabilities, in memory of the thread.
struct Tile {
  const Attention& a;
  const Head& head;
  int64_t rows, step;  // keys, filled up to kPanel
  std::vector<float>& scores;  // [kTile][step]
  std::array<float, kTile> most, total;

  Tile(const Attention& attention, const Head& own, int64_t count, std::vector<float>& memory)
      : a(attention), head(own), rows(count), step(rounded_up(a.keys, kPanel)), scores(memory), most{}, total{} {
    scores.resize(static_cast<size_t>(kTile * step));
  }

  void score(int64_t at) {
    const int64_t bytes = quads(a.columns) * 4;
    std::array<uint8_t, kTile * kMostColumns> codes{};
    std::array<const uint8_t*, kTile> row{};
    std::array<float, kTile> scale{};
    Floats best[kTile];
    const float factor = static_cast<float>(std::pow(static_cast<double>(a.columns), -0.5));
    for (int64_t r = 0; r < rows; ++r) {
      row[r] = codes.data() + r * bytes;
      int8_t* to = reinterpret_cast<int8_t*>(codes.data() + r * bytes);
      scale[r] = factor * token_codes(a.q, a.type, at + r * a.q_stride[2], a.columns, nullptr, kOffset, to);
      best[r] = all(-INFINITY);
    }
    int32_t sums[kTile * kPanel];
    for (int64_t first = 0; first < step; first += kPanel) {
      const Panel& panel = head.key_panels[static_cast<size_t>(first / kPanel)];
      multiply(row.data(), rows, head.key_offsets.data(), panel, sums);
      for (int64_t part = 0; part < kPanel; part += kLanes) {
        const Integers surplus = load<Integers>(panel.sums.data() + part) * static_cast<int32_t>(kOffset);
        const Floats key_scale = load<Floats>(head.key_scale.data() + first + part);
        const Integers known = lanes_before(a.keys - first - part);
        for (int64_t r = 0; r < rows; ++r) {
          const Integers sum = load<Integers>(sums + r * kPanel + part) - surplus;
          const Floats value = known ? to_floats(sum) * scale[r] * key_scale : all(-INFINITY);
          best[r] = larger(best[r], value);
          store(scores.data() + r * step + first + part, value);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) most[r] = largest(best[r]);
  }

  void weigh() {
    for (int64_t r = 0; r < rows; ++r) {
      float* at = scores.data() + r * step;
      Floats sum{};
      for (int64_t s = 0; s < step; s += kLanes) {
        const Floats weight = exponential(load<Floats>(at + s) - most[r]);
        sum += weight;
        store(at + s, weight);
      }
      total[r] = sum_of<float>(sum);
    }
  }

  // The same in whole numbers up to kLargestCode: [kTile][step] bytes.
  void weigh_in_integers(uint8_t* codes) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* at = scores.data() + r * step;
      Integers sum{};
      for (int64_t s = 0; s < step; s += kLanes) {
        const Integers code = to_integers(rounded(exponential(load<Floats>(at + s) - most[r]) * kLargestCode));
        sum += code;
        store_bytes(codes + r * step + s, kLanes, code);
      }
      total[r] = static_cast<float>(sum_of<int64_t>(sum));
    }
  }

  // Of one panel of columns. Rows that the last tile lacks are computed from what is there, and left.
  template <int REGISTERS>
  void mix_columns(const float* values, int64_t c, int64_t output, int64_t output_step) const {
    Floats mixed[kTile][REGISTERS];
#pragma GCC unroll 12
    for (int64_t r = 0; r < kTile; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < REGISTERS; ++i) mixed[r][i] = Floats{};
    }
    for (int64_t s = 0; s < a.keys; ++s) {
      Floats value[REGISTERS];
#pragma GCC unroll 2
      for (int i = 0; i < REGISTERS; ++i) value[i] = load<Floats>(values + s * kPanel + i * kLanes);
#pragma GCC unroll 12
      for (int64_t r = 0; r < kTile; ++r) {
        const Floats weight = all(scores[r * step + s]);
#pragma GCC unroll 2
        for (int i = 0; i < REGISTERS; ++i) mixed[r][i] = fused(weight, value[i], mixed[r][i]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < REGISTERS; ++i) {
        const int64_t column = c + i * kLanes;
        store_floats(a.output, a.type, output + r * output_step + column, a.columns - column, mixed[r][i] / total[r]);
      }
    }
  }

  void mix(int64_t output, int64_t output_step) const {
    for (int64_t c = 0; c < a.columns; c += kPanel) {
      const float* values = head.values.data() + c * a.keys;
      if (a.columns - c > kLanes) mix_columns<2>(values, c, output, output_step);
      else mix_columns<1>(values, c, output, output_step);
    }
  }

  void mix_in_integers(const uint8_t* codes, int64_t output, int64_t output_step) const {
    std::array<const uint8_t*, kTile> row{};
    for (int64_t r = 0; r < rows; ++r) row[r] = codes + r * step;
    int32_t sums[kTile * kPanel];
    for (int64_t c = 0; c < a.columns; c += kLanes) {
      const int64_t half = c % kPanel;
      if (half == 0) {
        const Panel& panel = head.value_panels[static_cast<size_t>(c / kPanel)];
        multiply(row.data(), rows, head.value_offsets.data(), panel, sums);
      }
      const Floats scale = load<Floats>(head.value_scale.data() + c);
      for (int64_t r = 0; r < rows; ++r) {
        const Floats value = to_floats(load<Integers>(sums + r * kPanel + half)) / total[r] * scale;
        store_floats(a.output, a.type, output + r * output_step + c, a.columns - c, value);
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
}  // namespace diffpress::DIFFPRESS_TIER

extern "C" SHOWN void diffpress_attention(const diffpress::DIFFPRESS_TIER::Attention* attention) {
  using namespace diffpress::DIFFPRESS_TIER;
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
