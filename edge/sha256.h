// SHA-256 (FIPS 180-4), with the processor's own instructions where it has some.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace diffpress {

class Sha256 {
 public:
  void update(const unsigned char* bytes, std::size_t count);
  // Of all bytes so far; the last thing that is asked.
  std::string hexadecimal();

 private:
  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> block_{};
  std::size_t held_ = 0;
  std::uint64_t total_ = 0;
};

}  // namespace diffpress
