// The noise of torch's CPU generator.
#pragma once
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace diffpress {

// What `torch.Generator().manual_seed(seed)` draws on x86, one tensor after the other, bit for bit.
class TorchNoise {
 public:
  // torch seeds its Mersenne twister with the lower 32 bits.
  explicit TorchNoise(std::uint64_t seed) : twister_(static_cast<std::uint32_t>(seed)) {}

  // What `torch.randn` gives.
  std::vector<float> draw(std::size_t size);

 private:
  std::mt19937 twister_;
};

}  // namespace diffpress
