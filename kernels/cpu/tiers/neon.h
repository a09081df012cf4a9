// aarch64: the vectors that every one of its processors has. What differs from tier to tier, beside its products.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace diffpress::DIFFPRESS_TIER {

using Register = int32x4_t;
constexpr int64_t kLanes = 4;
// Rows that are computed together: with two registers each, 24 of 32.
constexpr int64_t kTile = 12;
// Products are of signed bytes: codes on the left are kept as they are.
constexpr int64_t kOffset = 0;

inline void store_low_bytes(int32x4_t value, void* to) {
  const int16x4_t halves = vmovn_s32(value);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(halves, halves));
  std::memcpy(to, &bytes, kLanes);
}

inline void store_low_halves(int32x4_t value, void* to) { vst1_s16(static_cast<int16_t*>(to), vmovn_s32(value)); }

inline auto widened(const uint16_t* from) { return vmovl_u16(vld1_u16(from)); }

inline auto fused(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }

inline auto from_half(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }

inline void to_half(float32x4_t value, uint16_t* to) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(value))); }

}  // namespace diffpress::DIFFPRESS_TIER
