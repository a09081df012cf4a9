// Which tiers this processor has. The only file that every processor can run: its library is asked before another is opened.
#include <cpuid.h>

#include <initializer_list>

namespace {

enum Register { kEax, kEbx, kEcx, kEdx };

// One bit of what CPUID says (Intel's Software Developer's Manual, volume 2A).
bool says(unsigned leaf, unsigned subleaf, Register place, unsigned bit) {
  unsigned found[4];
  return __get_cpuid_count(leaf, subleaf, &found[kEax], &found[kEbx], &found[kEcx], &found[kEdx]) && found[place] >> bit & 1;
}

bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && says(1, 0, kEcx, 29); }

bool avxvnni() { return avx2() && says(7, 1, kEax, 4); }

bool avx512vnni() {
  return avx2() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

bool amx() { return avx512vnni() && says(7, 0, kEdx, 25); }

}  // namespace

// A bit each, from the lowest on in the order of library.py's TIERS.
extern "C" __attribute__((visibility("default"))) int diffpress_tiers() {
  int found = 0, bit = 1;
  for (const bool here : {amx(), avx512vnni(), avxvnni(), avx2()}) {
    if (here) found |= bit;
    bit *= 2;
  }
  return found;
}
