// How much memory there is, and how much was used.
#pragma once
#include <cstdint>

namespace diffpress {

// What this machine can still give: free memory, or less where the process is held to less.
std::uint64_t free_memory_bytes();
// The most that this process has used so far.
std::uint64_t peak_memory_bytes();

}  // namespace diffpress
