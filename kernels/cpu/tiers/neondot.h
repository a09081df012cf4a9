// aarch64 with dot products: most processors since 2018, and all of Apple's. Products are summed in 32 bits.
#pragma once

#include "neon.h"

namespace diffpress::DIFFPRESS_TIER {

inline int32x4_t dot(int32x4_t sum, int32x4_t codes, int32x4_t weights) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(weights));
}

}  // namespace diffpress::DIFFPRESS_TIER
