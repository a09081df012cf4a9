#include "sha256.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace diffpress {

namespace {

constexpr std::size_t kBlock = 64;
using State = std::array<std::uint32_t, 8>;

alignas(16) constexpr std::uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t rotated(std::uint32_t word, int bits) { return word >> bits | word << (32 - bits); }

std::uint32_t big_endian(const unsigned char* bytes) {
  return std::uint32_t(bytes[0]) << 24 | std::uint32_t(bytes[1]) << 16 | std::uint32_t(bytes[2]) << 8 | bytes[3];
}

void compress_portably(State& state, const unsigned char* bytes, std::size_t blocks) {
  for (; blocks > 0; --blocks, bytes += kBlock) {
    std::uint32_t words[64];
    for (int i = 0; i < 16; ++i) words[i] = big_endian(bytes + 4 * i);
    for (int i = 16; i < 64; ++i) {
      const std::uint32_t early = words[i - 15], late = words[i - 2];
      words[i] = words[i - 16] + (rotated(early, 7) ^ rotated(early, 18) ^ early >> 3) + words[i - 7] +
                 (rotated(late, 17) ^ rotated(late, 19) ^ late >> 10);
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (int i = 0; i < 64; ++i) {
      const std::uint32_t first =
          h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + kRounds[i] + words[i];
      const std::uint32_t second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
    }
    const State worked{a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state[i] += worked[i];
  }
}

#if defined(__x86_64__)
bool has_instructions() {
  unsigned a, b, c, d;
  const bool extended = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
  return extended && __get_cpuid(1, &a, &b, &c, &d) && (c >> 19 & 1);
}

__attribute__((target("sha,sse4.1"))) void compress_by_instructions(State& state, const unsigned char* bytes, std::size_t blocks) {
  const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const auto load = [](const std::uint32_t* words) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(words)); };
  const auto store = [](std::uint32_t* words, __m128i value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(words), value); };
  // The instructions want a, b, e, f in one register and c, d, g, h in the other.
  const __m128i badc = _mm_shuffle_epi32(load(&state[0]), 0xb1), efgh = _mm_shuffle_epi32(load(&state[4]), 0x1b);
  __m128i first = _mm_alignr_epi8(badc, efgh, 8), second = _mm_blend_epi16(efgh, badc, 0xf0);
  for (; blocks > 0; --blocks, bytes += kBlock) {
    const __m128i first_before = first, second_before = second;
    __m128i words[4];
    for (int i = 0; i < 4; ++i)
      words[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i)), order);
    for (int group = 0; group < 16; ++group) {
      __m128i& now = words[group & 3];
      if (group >= 4) {
        const __m128i last = words[(group + 3) & 3];
        const __m128i part = _mm_add_epi32(_mm_sha256msg1_epu32(now, words[(group + 1) & 3]), _mm_alignr_epi8(last, words[(group + 2) & 3], 4));
        now = _mm_sha256msg2_epu32(part, last);
      }
      const __m128i added = _mm_add_epi32(now, load(&kRounds[4 * group]));
      second = _mm_sha256rnds2_epu32(second, first, added);
      first = _mm_sha256rnds2_epu32(first, second, _mm_shuffle_epi32(added, 0x0e));
    }
    first = _mm_add_epi32(first, first_before);
    second = _mm_add_epi32(second, second_before);
  }
  const __m128i feba = _mm_shuffle_epi32(first, 0x1b), dchg = _mm_shuffle_epi32(second, 0xb1);
  store(&state[0], _mm_blend_epi16(feba, dchg, 0xf0));
  store(&state[4], _mm_alignr_epi8(dchg, feba, 8));
}
#endif

void compress(State& state, const unsigned char* bytes, std::size_t blocks) {
#if defined(__x86_64__)
  static const bool instructions = has_instructions();
  if (instructions) return compress_by_instructions(state, bytes, blocks);
#endif
  compress_portably(state, bytes, blocks);
}

}  // namespace

void Sha256::update(const unsigned char* bytes, std::size_t count) {
  total_ += count;
  if (held_ > 0) {
    const std::size_t taken = std::min(count, kBlock - held_);
    std::memcpy(&block_[held_], bytes, taken);
    held_ += taken, bytes += taken, count -= taken;
    if (held_ < kBlock) return;
    compress(state_, block_.data(), 1);
  }
  compress(state_, bytes, count / kBlock);
  held_ = count % kBlock;
  std::memcpy(block_.data(), bytes + count - held_, held_);
}

std::string Sha256::hexadecimal() {
  const std::uint64_t bits = 8 * total_;
  const unsigned char mark = 0x80, zero = 0;
  update(&mark, 1);
  while (held_ != kBlock - 8) update(&zero, 1);
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
  update(length, 8);
  std::string text;
  for (const std::uint32_t word : state_)
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
  return text;
}

}  // namespace diffpress
