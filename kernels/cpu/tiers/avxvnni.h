// x86 with AVX-VNNI: Intel's processors without AVX512 since the 12th generation. AVX2, and products summed in 32 bits.
#pragma once

#include "avx2.h"

namespace diffpress::DIFFPRESS_TIER {

inline __m256i dot(__m256i sum, __m256i codes, __m256i weights) { return _mm256_dpbusd_avx_epi32(sum, codes, weights); }

}  // namespace diffpress::DIFFPRESS_TIER
