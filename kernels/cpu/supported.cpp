// Whether this processor can run the other files, which are compiled for AVX512. This one is not.
#include <cpuid.h>

namespace {

// Bit 25 of EDX (Intel's Software Developer's Manual, volume 2A, CPUID leaf 7).
bool has_amx() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 25 & 1);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int diffpress_supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni") && !has_amx();
}
