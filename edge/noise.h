// The noise of torch's CPU generator.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace diffpress {

// What `torch.randn(size, generator=torch.Generator().manual_seed(seed))` gives on x86, bit for bit.
std::vector<float> torch_noise(std::size_t size, std::uint64_t seed);

}  // namespace diffpress
