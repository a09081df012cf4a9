// Which tiers this processor has. The only file that every aarch64 processor can run.
#ifdef __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <initializer_list>

namespace {

constexpr int kFirstBit = 4;  // behind the tiers of x86

#ifdef __linux__
bool neondot() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

bool i8mm() { return neondot() && getauxval(AT_HWCAP2) & HWCAP2_I8MM; }
#else
// What the compiler takes for granted, as that of macOS does with dot products.
bool neondot() {
#ifdef __ARM_FEATURE_DOTPROD
  return true;
#else
  return false;
#endif
}

bool i8mm() {
#ifdef __ARM_FEATURE_MATMUL_INT8
  return neondot();
#else
  return false;
#endif
}
#endif

}  // namespace

// A bit each, in the order of library.py's TIERS.
extern "C" __attribute__((visibility("default"))) int diffpress_tiers() {
  int found = 0, bit = 1 << kFirstBit;
  for (const bool here : {i8mm(), neondot(), true}) {
    if (here) found |= bit;
    bit *= 2;
  }
  return found;
}
