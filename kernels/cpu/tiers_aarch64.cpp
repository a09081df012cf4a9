// Which tiers this processor has. The only file that every aarch64 processor can run.
#ifdef __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <initializer_list>

namespace {

constexpr int kFirstBit = 4;  // behind the tiers of x86

bool neondot() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__ARM_FEATURE_DOTPROD)  // macOS runs on no processor that lacks what its compiler takes for granted
  return true;
#else
  return false;
#endif
}

bool neon() { return true; }

}  // namespace

// A bit each, in the order of library.py's TIERS.
extern "C" __attribute__((visibility("default"))) int diffpress_tiers() {
  int found = 0, bit = 1 << kFirstBit;
  for (const bool here : {neondot(), neon()}) {
    if (here) found |= bit;
    bit *= 2;
  }
  return found;
}
